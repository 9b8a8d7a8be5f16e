"""Best-of-n by ensembles of reward models that run_bon_pipeline.py has asked already:

    python run_bon_ensembles.py study --seeds 1,2,3,4,5 --uwo-weights 0.1,0.5

Reads `runs/study/seedN/proxy_labelled_sorted.json`, asks nobody, and writes `runs/study/ensemble_mean/`,
`ensemble_WCO/` and `ensemble_UWO-<weight>/`. One of other seeds, or with the variance over n - 1, stands
beside these with that in its name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.atomic_files import replace_text
from conch.cli import run_main
from conch.errors import ConfigError, DataError
from conch.evaluation.curves import RESULTS, curve_of
from conch.evaluation.pictures import draw
from conch.log import get_logger
from examples.overoptimisation.bon_files import (
    SORTED,
    Variance,
    aligned,
    objective_of,
    read_sorted,
    write_scored,
)

_log = get_logger("conch.overoptimisation")

_ABOUT = "ensemble.json"
_SEED_FOLDER = re.compile(r"seed(\d+)")


def study_folder(output_dir: str) -> Path:
    """`runs/<output_dir>`, which may also be given whole."""
    given = Path(output_dir)
    return given if given.is_absolute() or given.parts[:1] == ("runs",) else Path("runs") / given


def run_ensembles(
    folder: Path,
    seeds: Sequence[int],
    ns: Sequence[int] | None,
    uwo_weights: Sequence[float],
    *,
    variance: Variance = "population",
) -> list[Path]:
    """Write the files of each ensemble; returns their folders.

    Raises:
        ConfigError, DataError: a seed was not scored, or the seeds do not fit together.
    """
    entries, tables = aligned([read_sorted(folder / f"seed{seed}" / SORTED) for seed in seeds])
    written: list[Path] = []
    for objective, weight in [("mean", 0.0), ("WCO", 0.0), *(("UWO", weight) for weight in uwo_weights)]:
        pairs = [objective_of(table, objective, weight, variance) for table in tables]
        about = {
            "objective": objective,
            "weight": weight if objective == "UWO" else None,
            "variance": variance,
            "seeds": [*seeds],
        }
        run = _ensemble_folder(folder, about)
        members = ", ".join(f"seed{seed}" for seed in seeds)
        write_scored(
            run,
            entries,
            [proxy for proxy, _ in pairs],
            ns,
            sources={"reward": f"{run.name} of {members}"},
            variances=[spread for _, spread in pairs],
        )
        replace_text(run / _ABOUT, json.dumps(about) + "\n")
        _log.info("%s: %s", run.name, run)
        written.append(run)
    return written


def _ensemble_folder(folder: Path, about: dict[str, object]) -> Path:
    """`ensemble_<objective>`; with the seeds in its name where another ensemble has that folder."""
    name = f"ensemble_{about['objective']}" + ("" if about["weight"] is None else f"-{about['weight']:g}")
    plain = folder / name
    if not (plain / _ABOUT).is_file() or json.loads((plain / _ABOUT).read_bytes()) == about:
        return plain
    seeds = about["seeds"]
    assert isinstance(seeds, list)
    apart = "" if about["variance"] == "population" else f"_{about['variance']}"
    return folder / f"{name}_seeds{'-'.join(map(str, seeds))}{apart}"


def draw_study(folder: Path) -> None:
    """Draw all seeds as one group, and each ensemble as one of its own."""
    seeds = [path for path in _with_results(folder) if _SEED_FOLDER.fullmatch(path.name)]
    ensembles = [path for path in _with_results(folder) if path.name.startswith("ensemble_")]
    curves = {"single": [curve_of(path) for path in seeds]} if seeds else {}
    curves |= {path.name.removeprefix("ensemble_"): [curve_of(path)] for path in ensembles}
    try:
        for path in draw(curves, folder):
            _log.info("%s", path)
    except DataError as error:
        _log.warning("no picture: %s", error)


def _with_results(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))


def scored_seeds(folder: Path) -> list[int]:
    """Seeds that a study has scored.

    Raises:
        ConfigError: none.
    """
    names = [_SEED_FOLDER.fullmatch(path.parent.name) for path in folder.glob(f"*/{SORTED}")]
    seeds = sorted(int(match[1]) for match in names if match)
    if not seeds:
        raise ConfigError(f"{folder} holds no scored seeds: run run_bon_pipeline.py -o {folder.name} first")
    return seeds


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between."""
    return [int(word) for word in text.split(",")]


def decimals(text: str) -> list[float]:
    """Numbers with commas between."""
    return [float(word) for word in text.split(",")]


def add_ensemble_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both programs have."""
    add = parser.add_argument
    add(
        "-ns",
        "--sample-ns",
        "--sample_ns",
        type=numbers,
        help="numbers of answers to choose from (default: those of the paper that the answers give)",
    )
    add(
        "--uwo-weights",
        "--uwo_weights",
        type=decimals,
        default=[0.5],
        help="cost of a variance of 1; an ensemble for each (default: 0.5)",
    )
    add(
        "--variance",
        choices=("population", "sample"),
        default="population",
        help="of the members: over n, as in the paper's best-of-n, or over n - 1, as in its PPO",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_bon_ensembles.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", help="folder below runs/ with the seeds' results")
    parser.add_argument("--seeds", type=numbers, help="members (default: all that were scored)")
    add_ensemble_options(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    folder = study_folder(arguments.output_dir)
    seeds = arguments.seeds or scored_seeds(folder)
    run_ensembles(folder, seeds, arguments.sample_ns, arguments.uwo_weights, variance=arguments.variance)
    draw_study(folder)


if __name__ == "__main__":
    run_main(main)
