"""Best-of-n over answers that gold has scored, with the options of the reward-ensemble paper's program:

    python run_bon_pipeline.py "models/rm_seed{seed}" -o study --gold-labelled-generations answers.jsonl \\
        --seeds 1,2,3,4,5 --ensembles --uwo-weights 0.5

Each reward model scores all answers; results are in `runs/study/seed1/` and so on, with ensembles in
`runs/study/ensemble_mean/`, `ensemble_WCO/` and `ensemble_UWO-0.5/`, and a figure in `runs/study/`. Ensembles
are made unless `--no-ensembles` is given, as the paper's README says (its program made none unless asked).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import run_main
from conch.errors import ConfigError
from conch.log import get_logger
from examples.overoptimisation.bon_files import choices, read_entries, write_scored
from examples.overoptimisation.bon_models import TEMPLATE, score_entries
from examples.overoptimisation.run_bon_ensembles import (
    add_ensemble_options,
    draw_study,
    numbers,
    run_ensembles,
    study_folder,
)

_log = get_logger("conch.overoptimisation")

_SEED = "{seed}"


def models_of(path: str, seeds: Sequence[int]) -> dict[int, str]:
    """Reward model of each seed.

    Raises:
        ConfigError: several seeds, and no place for them in the path.
    """
    if len(set(seeds)) > 1 and _SEED not in path:
        raise ConfigError(f"{path} names one reward model for {len(set(seeds))} seeds: put {_SEED} into it")
    return {seed: path.replace(_SEED, str(seed)) for seed in dict.fromkeys(seeds)}


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    models = models_of(arguments.proxy_rm_path, arguments.seeds or (1, 2, 3, 4, 5))
    folder = study_folder(arguments.output_dir)
    entries = read_entries(arguments.gold_labelled_generations, arguments.big_n)
    choices(arguments.sample_ns, min(len(entry.answers) for entry in entries))  # before long work starts
    sources = {"gold": arguments.gold_labelled_generations}
    for seed, model in models.items():
        run = folder / f"seed{seed}"
        proxies = score_entries(
            model, entries, run / "scores", store=arguments.model_store, template=arguments.template
        )
        write_scored(run, entries, proxies, arguments.sample_ns, sources={"reward": model, **sources})
        _log.info("seed %d: %s", seed, run)
    if arguments.ensembles and len(models) > 1:
        run_ensembles(
            folder, [*models], arguments.sample_ns, arguments.uwo_weights, variance=arguments.variance
        )
    draw_study(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_bon_pipeline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "proxy_rm_path",
        help="reward models, {seed} in place of the seed: checkpoints, models of the store, or addresses",
    )
    now = time.strftime("bon_sampling_%Y-%m-%d_%H-%M-%S")
    add("-o", "--output-dir", "--output_dir", default=now, help="folder below runs/ (default: by the time)")
    add(
        "-gold",
        "--gold-labelled-generations",
        "--gold_labelled_generations",
        default="tlc4418/gold_labelled_gens",
        help="rows with instruction, answers and gold_scores: a file, a folder or a dataset of the hub "
        "(default: %(default)s)",
    )
    add("--big-n", "--big_n", type=int, default=12600, help="answers of each row (default: %(default)s)")
    add("--seeds", type=numbers, help="seeds of the reward models (default: 1,2,3,4,5)")
    add(
        "--ensembles",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also choose by ensembles of all seeds: mean, WCO, and UWO with each weight",
    )
    add("--template", default=TEMPLATE, help="what a model of texts reads before an answer")
    add("--model-store", "--model_store", type=Path, default=Path("model_store"), help="of converted models")
    add_ensemble_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
