"""Convert a reward-model checkpoint into a model that Triton serves, and prove that it scores the same.

    conch-to-triton --checkpoint outputs/reward_model --name walks
    conch-to-triton --checkpoint Dahoas/gptj-rm-static --base_model EleutherAI/gpt-j-6B --revision 676bfd4d
    conch-to-triton --checkpoint outputs/reward_model --verify 127.0.0.1:8001/walks
    conch-to-triton --explain RLHFlow/ArmoRM-Llama3-8B-v0.1
    conch-to-triton --recipe list

Exit codes: 0 published, verified, or the dry run went well; 1 cannot be converted; 2 scores differ, and
nothing is published.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.cli import CommandParser, add_options, keywords_of, written_with
from conch.config import load
from conch.converters.explain import explain
from conch.converters.options import (
    Conversion,
    ConversionOptions,
    ReadOptions,
    check_exists,
    check_name,
    default_name,
)
from conch.converters.parity.forked_python import forked_python
from conch.converters.recipes import recipe_list, with_recipe
from conch.errors import ConchError, ConversionError, ParityError
from conch.log import quieten_libraries, setup_logging
from conch.machine.imports import uncollected


@keywords_of(ConversionOptions)
def to_triton(checkpoint: str | Path, **settings: Any) -> Conversion:
    """Publish a checkpoint as the next version of a model in the store.

    Args:
        checkpoint: folder, file of tensors, or hub id; docs/converting.md lists the kinds.
        settings: fields of `ConversionOptions`, which documents them.

    Raises:
        ConfigError: a setting is unknown or of a wrong type.
        ConversionError: the checkpoint cannot be served faithfully, or the name is another checkpoint's.
        ParityError: the converted model scores differently; nothing was published.
        ModelStoreError: the store cannot be written.
    """
    options = load(ConversionOptions, with_recipe(settings, str(checkpoint)))
    name = options.name or default_name(str(checkpoint))
    check_name(name)
    check_exists("checkpoint", str(checkpoint))
    with contextlib.ExitStack() as stack:
        # torch and transformers are imported here: --help and mistakes in the arguments answer at once.
        with uncollected():
            # Graphs take no fork: they are served without torch, and so they are run without.
            is_forked = options.backend == "python" and options.device == "cpu"
            fork = stack.enter_context(forked_python()) if is_forked else None
            from conch.converters.pipeline import convert

        return convert(str(checkpoint), name, options, fork)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    settings = vars(parser.parse_args(written_with("-", sys.argv[1:] if argv is None else argv)))
    checkpoint, endpoint = settings.pop("checkpoint"), settings.pop("verify")
    explained = settings.pop("explain")
    if settings.get("recipe") == "list":
        print(recipe_list())
        return 0
    checkpoint = checkpoint or (explained if isinstance(explained, str) else None)
    if checkpoint is None:
        parser.error("--checkpoint is missing: a folder, a file of tensors, or a hub id")
    if settings.pop("quiet"):
        quieten_libraries()
    else:
        setup_logging()
    try:
        if explained is not None:
            print(explain(checkpoint, _to_explain(checkpoint, settings)))
            return 0
        if endpoint is not None:
            return _verify(endpoint, checkpoint, load(ConversionOptions, with_recipe(settings, checkpoint)))
        conversion = to_triton(checkpoint, **settings)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParityError) else 1
    print(conversion.parity.table())
    print(f"published {conversion.path}" if conversion.path else "dry run: nothing was published")
    return 0


def _to_explain(checkpoint: str, settings: Mapping[str, Any]) -> ReadOptions:
    """Return the options of reading; of a recipe that must be chosen first, the explanation tells."""
    reading = {name: value for name, value in settings.items() if name in ReadOptions.model_fields}
    with contextlib.suppress(ConversionError):
        if "recipe" not in reading:
            reading = with_recipe(reading, checkpoint)
    return load(ReadOptions, with_recipe(reading))


def _verify(endpoint: str, checkpoint: str, options: ConversionOptions) -> int:
    from conch.converters.parity.live_server import verify

    report = verify(endpoint, checkpoint, options, options.dtype)
    print(report.table())
    print(f"{endpoint} scores {'' if report.ok else 'NOT '}like {checkpoint}")
    return 0 if report.ok else 2


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="conch convert",
        description="Convert a reward model for Triton Inference Server, and prove that it scores the same.",
        epilog="Underscores will do for dashes. Exit codes: 0 done, 1 cannot be done, 2 scores differ.",
    )
    parser.add_argument(
        "--checkpoint", metavar="PATH_OR_HUB_ID", help="folder, file of tensors, or hub id; required"
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const=True,
        metavar="PATH_OR_HUB_ID",
        help="only say what the checkpoint is, what would be done with it, and what is missing",
    )
    parser.add_argument(
        "--verify", metavar="HOST:PORT/NAME", help="only compare a running server with the checkpoint"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    reading = parser.add_argument_group("how to read the checkpoint (default: as it says)")
    add_options(reading, ReadOptions)
    serving = parser.add_argument_group("how to serve and publish it")
    add_options(serving, ConversionOptions, without=ReadOptions.model_fields)
    return parser


if __name__ == "__main__":
    sys.exit(main())
