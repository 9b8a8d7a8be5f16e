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
from conch.evaluation.best_of_n import best_of_n
from conch.evaluation.curves import RESULTS, Start, curve_of, results_json, run_curve
from conch.evaluation.pictures import draw
from conch.evaluation.records import GOLD, PROXY, read_record, records_of

_VARIANCE = "members_variance"


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
    measured = run_curve(run_dir)
    curve = measured.normalised()
    assert measured.gold_start is not None
    last = np.array(read_record(records_of(run_dir)[-1]).column(GOLD)) / measured.gold_start.std
    top, final = int(curve.gold.argmax()), float(curve.gold[-1])
    peak = float(curve.gold[top])
    return Outcome(
        peak=peak,
        peak_step=int(curve.step[top]),
        final=final,
        standard_error=float(last.std(ddof=1) / math.sqrt(len(last))),
        loss=(peak - final) / peak if peak > 0 else math.nan,
        sqrt_kl=float(curve.distance[-1]),
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


def measure_best_of_n(scores: Path, arm: str, uwo_weight: float, folder: Path) -> dict[int, float]:
    """Estimate what the best of n by a reward is worth, for n = 1, 2, 4, ...

    scores: file of the members' scores and gold, [prompts, samples] each.
    folder: gets `results.json`, as of `conch best-of-n`.

    Returns:
        n -> gold, normalised.
    """
    with np.load(scores) as arrays:
        members, gold = arrays["members"], arrays["gold"]
    reward = ensemble_reward(arm, members, uwo_weight)
    columns = {PROXY: reward, GOLD: gold}
    if arm != "single":
        columns[_VARIANCE] = members.var(axis=0)
    ns = [2**power for power in range(gold.shape[1].bit_length()) if 2**power <= gold.shape[1]]
    rows = [{name: column[prompt] for name, column in columns.items()} for prompt in range(len(gold))]
    found = best_of_n(rows, ns, proxy=PROXY)
    starts = {name: Start.of(columns[name].ravel()) for name in (PROXY, GOLD)}
    content = results_json(
        found, starts, {PROXY: arm, GOLD: "hidden preference"}, _VARIANCE if arm != "single" else ""
    )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / RESULTS, json.dumps(content, indent=2) + "\n")
    gains = curve_of(folder).normalised().gold
    return dict(zip(ns, gains.tolist(), strict=True))


def report(
    folders: Mapping[int, Path], arms: Sequence[str], uwo_weight: float, output: Path, seconds: float
) -> dict[str, Any]:
    """Write `summary.json` and the figures `ppo` and `best_of_n` with their CSV files, and print a table.

    folders: of the seeds, each with `ppo_<arm>` and `best_of_n.npz`; get `best_of_n_<arm>`.
    seconds: that the command took.

    Returns:
        what `summary.json` holds.
    """
    runs = {arm: [folder / f"ppo_{arm}" for folder in folders.values()] for arm in arms}
    choices = {arm: [folder / f"best_of_n_{arm}" for folder in folders.values()] for arm in arms}
    ppo = {seed: {arm: outcome(folder / f"ppo_{arm}") for arm in arms} for seed, folder in folders.items()}
    best = {
        seed: {
            arm: measure_best_of_n(folder / "best_of_n.npz", arm, uwo_weight, folder / f"best_of_n_{arm}")
            for arm in arms
        }
        for seed, folder in folders.items()
    }
    summary = {
        "seconds": seconds,
        "uwo_weight": uwo_weight,
        "ppo": {seed: {arm: asdict(found) for arm, found in of.items()} for seed, of in ppo.items()},
        "best_of_n": best,
        "mean_loss": {arm: float(np.mean([of[arm].loss for of in ppo.values()])) for arm in arms},
    }
    replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(table(ppo, best))
    for name, groups in (("ppo", runs), ("best_of_n", choices)):
        curves = {arm: [curve_of(folder) for folder in of] for arm, of in groups.items()}
        print(*draw(curves, output, name), sep="\n")
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
