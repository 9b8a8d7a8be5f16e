"""What the laboratory found: the gold that each reward gained and lost again, and best-of-n beside.

Scores are normalised to the starting policy: 0 is the mean of its scores, 1 their standard deviation.

Legend: K members, P prompts, N samples of a prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from conch.atomic_files import replace_text
from conch.evaluation.best_of_n import best_of_n_curve
from conch.evaluation.records import GOLD, read_record, records_of

LARGEST_LOSS_OF_ENSEMBLES = 1 / 3
"""Share of a single member's loss that an ensemble may lose, for the claim to hold."""


@dataclass(frozen=True)
class Outcome:
    """Gold of a PPO run.

    peak: the highest of its evaluations. peak_step: when that was.
    final: of the last evaluation. standard_error: of that, over its samples.
    loss: share of the gain at the peak that is gone at the end, (peak - final) / (peak - start); start is 0.
    sqrt_kl: at the end, in sqrt(nats per sample).
    """

    peak: float
    peak_step: int
    final: float
    standard_error: float
    loss: float
    sqrt_kl: float


def outcome(run_dir: Path) -> Outcome:
    """Measure a run by the evaluations that it kept."""
    records = [read_record(path) for path in records_of(run_dir)]
    columns = [np.array(record.column(GOLD)) for record in records]
    mean, std = columns[0].mean(), columns[0].std()
    gold = [float((column.mean() - mean) / std) for column in columns]
    peak = max(gold)
    last = columns[-1]
    return Outcome(
        peak=peak,
        peak_step=records[gold.index(peak)].step,
        final=gold[-1],
        standard_error=float(last.std() / std / math.sqrt(len(last))),
        loss=(peak - gold[-1]) / peak if peak > 0 else math.nan,
        sqrt_kl=math.sqrt(max(0.0, records[-1].metrics["eval/kl"] or 0.0)),
    )


def ensemble_reward(
    arm: str, members: Float[np.ndarray, "K P N"], uwo_weight: float
) -> Float[np.ndarray, "P N"]:
    """What `reward.combine` makes of the members' scores; `single` is the first member's."""
    if arm == "single":
        return members[0]
    if arm == "wco":
        return members.min(axis=0)
    mean = members.mean(axis=0)
    return mean if arm == "mean" else mean - uwo_weight * members.var(axis=0)


def best_of_n_gold(scores: Path, arm: str, uwo_weight: float) -> dict[int, float]:
    """Gold of the best of n by a reward, for n = 1, 2, 4, ..., mean over prompts.

    scores: file of the members' scores and gold.
    """
    with np.load(scores) as arrays:
        members, gold = arrays["members"], arrays["gold"]
    gold = (gold - gold.mean()) / gold.std()
    reward = ensemble_reward(arm, members, uwo_weight)
    ns = [2**power for power in range(gold.shape[1].bit_length()) if 2**power <= gold.shape[1]]
    rows = [best_of_n_curve(proxy, of_prompt, ns) for proxy, of_prompt in zip(reward, gold, strict=True)]
    return dict(zip(ns, np.mean(rows, axis=0).tolist(), strict=True))


def report(
    runs: Mapping[int, Mapping[str, Path]],
    scores: Mapping[int, Path],
    uwo_weight: float,
    output: Path,
    seconds: float,
) -> dict[str, Any]:
    """Write `summary.json`, and print a table; returns what the file holds.

    runs: seed -> arm -> folder of its PPO run.
    scores: seed -> file of best-of-n's scores.
    seconds: that the command took.
    """
    ppo = {seed: {arm: outcome(folder) for arm, folder in arms.items()} for seed, arms in runs.items()}
    best = {
        seed: {arm: best_of_n_gold(scores[seed], arm, uwo_weight) for arm in arms}
        for seed, arms in runs.items()
    }
    arms = list(next(iter(runs.values())))
    summary = {
        "seconds": seconds,
        "uwo_weight": uwo_weight,
        "ppo": {seed: {arm: asdict(found) for arm, found in of.items()} for seed, of in ppo.items()},
        "best_of_n": best,
        "mean_loss": {arm: float(np.mean([of[arm].loss for of in ppo.values()])) for arm in arms},
    }
    replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(table(ppo, best))
    return summary


def table(
    ppo: Mapping[int, Mapping[str, Outcome]], best: Mapping[int, Mapping[str, Mapping[int, float]]]
) -> str:
    """Lines of what each arm of each seed gained and lost."""
    heads = f"{'peak':>7}{'step':>6}{'final':>8}{'+-':>6}{'lost':>7}{'sqrt(KL)':>10}"
    lines = [f"{'seed':>4} {'reward':8}{heads}  gold of the best of n"]
    for seed, arms in ppo.items():
        for arm, found in arms.items():
            shown = _some(best[seed][arm])
            lines.append(
                f"{seed:>4} {arm:8}{found.peak:>7.2f}{found.peak_step:>6}{found.final:>8.2f}"
                f"{found.standard_error:>6.2f}{found.loss:>7.0%}{found.sqrt_kl:>10.2f}  {shown}"
            )
    return "\n".join(lines)


def _some(curve: Mapping[int, float]) -> str:
    ns: Sequence[int] = [n for n in curve if n in (1, 4, 16, 64, 256, 1024, 4096)]
    return "  ".join(f"{n}: {curve[n]:.2f}" for n in ns)
