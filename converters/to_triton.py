"""Convert a reward-model checkpoint into a model that Triton serves, and prove that it scores the same.

    conch-to-triton --checkpoint outputs/reward_model --name walks
    python -m conch.converters.to_triton --checkpoint outputs/reward_model --name walks

Exit codes: 0 published, 1 cannot be converted, 2 converted but scores differ; nothing is published then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from conch.config import Dtype
from conch.converters.conversion import Conversion, Options, default_name
from conch.errors import ConchError, ParityError
from conch.serving.spec import Form


def to_triton(
    checkpoint: str | Path,
    *,
    name: str | None = None,
    model_store: str | Path = "model_store",
    form: Form = "text",
    revision: str | None = None,
    max_length: int | None = None,
    template: str | None = None,
    max_batch_size: int = 64,
    normalise: bool | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Conversion:
    """Publish a checkpoint as the next version of a model in the store.

    Args:
        checkpoint: folder or hub id that `AutoModelForSequenceClassification` and `AutoTokenizer` load; its
            `reward_model.json`, where there is one, gives the defaults of `max_length`, `template` and
            `normalise`.
        name: model in the store; None takes the checkpoint's last name.
        form: `text` (the server tokenises) or `token` (the client sends ids).
        max_length: tokens a sample may have, special tokens included; None takes the model's window.
        template: format string over {text}, the client's sample, and {eos}.
        max_batch_size: most rows in a request.
        normalise: return (raw - mean) / std with the statistics of `reward_model.json`; None does what that
            file says.
        dtype: precision of the served weights; the comparison is always with float32.
        device: where the comparison runs, `cpu` or `cuda`.
        trust_remote_code: run code that comes with the checkpoint, here and in the server.

    Raises:
        ConversionError: the checkpoint cannot be served faithfully.
        ParityError: the converted model scores differently; nothing was published.
        ModelStoreError: the store cannot be written.
    """
    options = Options(
        checkpoint=str(checkpoint),
        name=default_name(str(checkpoint)) if name is None else name,
        model_store=Path(model_store),
        form=form,
        revision=revision,
        max_length=max_length,
        template=template,
        max_batch_size=max_batch_size,
        normalise=normalise,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    # torch and transformers are imported here, so that --help and mistakes in the arguments answer at once.
    from conch.converters.pipeline import convert

    return convert(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    try:
        conversion = to_triton(**arguments)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParityError) else 1
    print(conversion.parity.table())
    print(f"published {conversion.path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conch-to-triton", description="Convert a reward model for Triton Inference Server."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub id of a sequence classifier with its tokenizer")
    add("--name", help="model in the store; default: the checkpoint's last name")
    add("--model-store", default="model_store", help="default: %(default)s")
    add("--form", choices=get_args(Form), default="text", help="what clients send; default: %(default)s")
    add("--revision", help="hub revision of the checkpoint")
    add("--max-length", type=int, help="tokens a sample may have; default: the model's window")
    add("--template", help="format string over {text} and {eos}; default: {text}{eos}")
    add("--max-batch-size", type=int, default=64, help="most rows in a request; default: %(default)s")
    add(
        "--normalise",
        action=argparse.BooleanOptionalAction,
        help="serve (raw - mean) / std of reward_model.json; default: as that file says",
    )
    add(
        "--dtype",
        choices=get_args(Dtype),
        default="float32",
        help="of the served weights; default: %(default)s",
    )
    add("--device", default="cpu", help="where scores are compared: cpu or cuda; default: %(default)s")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return parser


if __name__ == "__main__":
    sys.exit(main())
