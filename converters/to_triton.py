"""Convert a reward-model checkpoint into a model that Triton serves, and prove that it scores the same.

    conch-to-triton --checkpoint outputs/reward_model --name walks
    conch-to-triton --checkpoint Dahoas/gptj-rm-static --base_model EleutherAI/gpt-j-6B --revision 676bfd4d
    conch-to-triton --checkpoint outputs/reward_model --verify 127.0.0.1:8001/walks

Exit codes: 0 published, verified, or the dry run went well; 1 cannot be converted; 2 scores differ, and
nothing is published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from conch.cli import written_with
from conch.converters.options import Conversion, ConversionOptions, Normalise, ReadOptions, Side, default_name
from conch.errors import ConchError, ParityError
from conch.log import setup_logging
from conch.store.manifest import Aggregate, Backend, Pooling, ServedDtype
from conch.triton.contract import Form, Granularity

_POOLINGS = tuple(rule for rule in get_args(Pooling) if rule != "steps")


def to_triton(
    checkpoint: str | Path,
    *,
    name: str | None = None,
    model_store: str | Path = "model_store",
    form: Form = "text",
    backend: Backend = "python",
    dtype: ServedDtype = "float32",
    max_batch_size: int = 64,
    max_queue_delay_us: int = 1000,
    batch_invariant: bool = False,
    instances: int = 1,
    instance_kind: Literal["cpu", "gpu"] = "gpu",
    gpu: int = 0,
    keep: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    reading: ReadOptions | None = None,
) -> Conversion:
    """Publish a checkpoint as the next version of a model in the store.

    Args:
        checkpoint: folder, file of tensors, or hub id; docs/converting.md lists the kinds.
        name: model in the store; None takes the checkpoint's last name.
        reading: how to read the checkpoint, where not as its `reward_model.json` or its kind says.

    The other arguments are those of `ConversionOptions`.

    Raises:
        ConversionError: the checkpoint cannot be served faithfully, or the name is another checkpoint's.
        ParityError: the converted model scores differently; nothing was published.
        ModelStoreError: the store cannot be written.
    """
    options = ConversionOptions(
        checkpoint=str(checkpoint),
        name=default_name(str(checkpoint)) if name is None else name,
        model_store=Path(model_store),
        form=form,
        backend=backend,
        dtype=dtype,
        max_batch_size=max_batch_size,
        max_queue_delay_us=max_queue_delay_us,
        batch_invariant=batch_invariant,
        instances=instances,
        instance_kind=instance_kind,
        gpu=gpu,
        keep=keep,
        force=force,
        dry_run=dry_run,
        reading=reading or ReadOptions(),
    )
    # torch and transformers are imported here, so that --help and mistakes in the arguments answer at once.
    from conch.converters.pipeline import convert

    return convert(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = vars(_parser().parse_args(written_with("_", sys.argv[1:] if argv is None else argv)))
    if not arguments.pop("quiet"):
        setup_logging()
    arguments["rewards"] = tuple(arguments["rewards"])
    reading = ReadOptions(**{name: arguments.pop(name) for name in ReadOptions.__dataclass_fields__})
    endpoint = arguments.pop("verify")
    try:
        if endpoint is not None:
            return _verify(endpoint, arguments["checkpoint"], arguments["dtype"], reading)
        conversion = to_triton(**arguments, reading=reading)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParityError) else 1
    print(conversion.parity.table())
    print(f"published {conversion.path}" if conversion.path else "dry run: nothing was published")
    return 0


def _verify(endpoint: str, checkpoint: str, dtype: ServedDtype, reading: ReadOptions) -> int:
    from conch.converters.parity.live_server import verify

    report = verify(endpoint, checkpoint, dtype, reading)
    print(report.table())
    print(f"{endpoint} scores {'' if report.ok else 'NOT '}like {checkpoint}")
    return 0 if report.ok else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conch convert",
        description="Convert a reward model for Triton Inference Server, and prove that it scores the same.",
        epilog="Dashes will do for underscores. Exit codes: 0 done, 1 cannot be done, 2 scores differ.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH_OR_HUB_ID", help="folder, file of tensors, or hub id"
    )
    _add_reading(parser.add_argument_group("how to read the checkpoint (default: as it says)").add_argument)
    _add_serving(parser.add_argument_group("how to serve it").add_argument)
    _add_publishing(parser.add_argument_group("what to do").add_argument)
    return parser


def _add_reading(add: Any) -> None:
    add("--base_model", metavar="PATH_OR_HUB_ID", help="what a value head or adapter builds on")
    add("--revision", help="hub revision of the checkpoint")
    add("--template", help="format string like {prompt}{output}{eos}, or `chat`")
    add("--max_length", type=int, help="tokens a sample may have; default: the model's window")
    add("--truncation_side", choices=get_args(Side), help="where too long text loses tokens")
    add("--pooling", choices=_POOLINGS, help="which tokens' states become the score")
    names = {"dest": "rewards", "metavar": "NAME_OR_INDEX"}
    add("--reward", nargs="+", default=(), help="outputs to serve; default: all", **names)
    statistics = "mean and std: into the head's weights, applied by the server, or only recorded"
    add("--normalise", choices=get_args(Normalise), help=statistics)
    add("--step_separator", metavar="TOKEN", help="process rewards: text of the token that ends a step")
    add("--aggregate", choices=get_args(Aggregate), help="process rewards: one score of the steps'")
    add(
        "--granularity",
        choices=get_args(Granularity),
        default="sample",
        help="what gets a score of its own beside the sample; default: %(default)s",
    )
    add("--device", default="cpu", help="where scores are compared: cpu or cuda; default: %(default)s")
    add("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def _add_serving(add: Any) -> None:
    dtypes = get_args(ServedDtype)
    add("--form", choices=get_args(Form), default="text", help="what clients send; default: %(default)s")
    add(
        "--backend",
        choices=get_args(Backend),
        default="python",
        help="docs/backends.md; default: %(default)s",
    )
    add("--dtype", choices=dtypes, default="float32", help="of the served weights; default: %(default)s")
    add("--max_batch_size", type=int, default=64, help="most rows in a request; default: %(default)s")
    add(
        "--max_queue_delay_us",
        type=int,
        default=1000,
        help="microseconds to wait for a fuller batch; default: %(default)s",
    )
    add("--batch_invariant", action="store_true", help="scores the same to the last bit in any batch; slower")
    add("--instances", type=int, default=1, help="copies of the model in a server; default: %(default)s")
    add(
        "--instance_kind", choices=("cpu", "gpu"), default="gpu", help="in config.pbtxt; default: %(default)s"
    )
    add("--gpu", type=int, default=0, help="of the cards that the server sees; default: %(default)s")


def _add_publishing(add: Any) -> None:
    add("--name", help="model in the store; default: the checkpoint's last name")
    add("--model_store", default="model_store", help="default: %(default)s")
    add("--keep", type=int, metavar="N", help="old versions that stay in the store; default: all")
    add("--force", action="store_true", help="take the name even if it is in use by other weights")
    add("--dry_run", action="store_true", help="do everything, the comparison too, but publish nothing")
    add("--verify", metavar="HOST:PORT/NAME", help="only compare a running server with the checkpoint")
    add("--quiet", action="store_true", help="no progress on stderr")


if __name__ == "__main__":
    sys.exit(main())
