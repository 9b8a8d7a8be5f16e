"""Overoptimisation on a CPU, in one command: from the checkout,

    python -m examples.overoptimisation.laboratory
    python -m examples.overoptimisation.laboratory seed=1 output=outputs/lab

A hidden preference (gold) over short texts labels 1,000 pairs of texts of the starting policy, a quarter of
the labels wrong. Five reward models (proxies) learn from these; PPO without a KL penalty trains the policy on
one of them, and on the mean, the worst case (WCO) and the uncertainty-weighted mean (UWO) of all five. Gold
watches. Best-of-n of the starting policy, chosen by the same rewards, stands beside. The numbers come with a
figure, a CSV and `summary.json`; docs/overoptimisation.md explains them.

Every finished part stays in `output`, and training goes on from its last checkpoint: after an interruption
the same command does what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from conch.cli import load_run_config, run_main
from examples.overoptimisation.laboratory.settings import LaboratoryConfig


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of the settings above."""
    config = load_run_config(LaboratoryConfig, argv, default_name="laboratory/laboratory")
    # It loads torch, which help and mistyped keys do without.
    from examples.overoptimisation.laboratory.chain import run

    run(config)


if __name__ == "__main__":
    run_main(main)
