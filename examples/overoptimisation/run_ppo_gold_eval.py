"""Gold scores for evaluations that have none, or not all: from this folder,

    python run_ppo_gold_eval.py runs/ppo/seed1/eval models/gold
    python run_ppo_gold_eval.py EVAL_DIR tlc4418/gold --is-alpacafarm-rm --batch-size 64

EVAL_DIR holds files `eval-<k>.json`, of `trainer_rl.py`, also of a run that was stopped, or of the paper's
code. GOLD_RM is what `gold_config.model_name` may be: a checkpoint, a model of the store, or an address. A
sample that has a score is not asked for again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import run_main, written_with
from conch.config import load
from conch.errors import ConfigError
from conch.evaluation.gold import summary
from examples.overoptimisation.gold import gold_scores
from examples.overoptimisation.settings import GoldSettings

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def main(argv: Sequence[str]) -> None:
    """Command line; see this file's docstring.

    Raises:
        ConchError: there are no evaluations, or the gold model cannot be had; what was scored is kept.
        SystemExit: 2 where samples were left without a score.
    """
    arguments = _parser().parse_args(written_with("-", argv))
    settings = {
        "model_name": arguments.gold_rm_model_name,
        "is_alpacafarm_rm": arguments.is_alpacafarm_rm,
        "batch_size": arguments.batch_size,
        "template": arguments.template,
        "dtype": arguments.dtype,
    }
    gold = load(GoldSettings, settings)
    rows = gold_scores(Path(arguments.eval_dir), gold, arguments.model_store, force=arguments.force)
    print(summary(rows))
    if any(row.failed for row in rows):
        raise SystemExit(2)


def _truth(word: str) -> bool:
    if word.lower() not in _WORDS:
        raise ConfigError(f"--is-alpacafarm-rm {word}: it is true or false")
    return _WORDS[word.lower()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_ppo_gold_eval.py",
        description="Add gold scores to the evaluations of a PPO run.",
        epilog="Underscores will do for dashes. Exit codes: 0 all samples have scores, 1 it could not begin "
        "or the server went away, 2 some have none.",
    )
    parser.add_argument("eval_dir", help="folder of files eval-<k>.json, which get the scores")
    parser.add_argument(
        "gold_rm_model_name",
        help="checkpoint (folder or hub id), model of the store, host:port/model, or a function as "
        "file.py:name",
    )
    parser.add_argument(
        "--is-alpacafarm-rm",
        nargs="?",
        type=_truth,
        const=True,
        default=False,
        help="show it Alpaca's prompt with the instruction in it",
    )
    parser.add_argument("--no-is-alpacafarm-rm", dest="is_alpacafarm_rm", action="store_false")
    parser.add_argument("--batch-size", type=int, default=32, help="most samples in a request (default: 32)")
    parser.add_argument("--template", help="how a text is presented to a checkpoint, as in conch convert")
    parser.add_argument("--dtype", help="precision that a checkpoint is served in")
    parser.add_argument(
        "--model-store",
        type=Path,
        default=Path("model_store"),
        help="folder of converted models (default: model_store)",
    )
    parser.add_argument("--force", action="store_true", help="score anew what has scores")
    return parser


if __name__ == "__main__":
    run_main(main)
