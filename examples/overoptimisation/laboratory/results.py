"""What the laboratory found: the gold that each reward gained and lost again, and best-of-n beside.

Scores are normalised to the starting policy: 0 is the mean of its scores, 1 their standard deviation.

Legend: K members, P prompts, N samples of a prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from conch.atomic_files import replace_text
from conch.evaluation.best_of_n import best_of_n
from conch.evaluation.curves import RESULTS, Curve, Start, curve_of, results_json, run_curve
from conch.evaluation.pictures import draw
from conch.evaluation.records import GOLD, PROXY, read_record, records_of

ALL = "all"
"""All seeds together, in the place of a seed."""
_VARIANCE = "members_variance"
_SECONDS = "seconds.json"


@dataclass
class Seconds:
    """What the calls on one output took, kept in `seconds.json`: an interrupted call counts.

    calls: of all calls before this one. call: of this one so far.
    parts: seed -> name of a part -> of all calls that worked on it.
    """

    calls: float = 0.0
    parts: dict[int, dict[str, float]] = field(default_factory=dict)
    call: float = 0.0

    @classmethod
    def read(cls, output: Path) -> Seconds:
        """Of the calls so far; none where no file is."""
        try:
            content = json.loads((output / _SECONDS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        return cls(content["calls"], {int(seed): parts for seed, parts in content["parts"].items()})

    def add(self, seed: int, part: str, seconds: float) -> None:
        """Count what a part took in this call."""
        parts = self.parts.setdefault(seed, {})
        parts[part] = round(parts.get(part, 0.0) + seconds, 1)

    def keep(self, output: Path, call: float) -> None:
        """Write the file. call: seconds of this call so far."""
        self.call = call
        replace_text(
            output / _SECONDS, json.dumps({"calls": self.total, "parts": self.parts}, indent=2) + "\n"
        )

    @property
    def total(self) -> float:
        """Of all calls, one after another."""
        return self.calls + self.call


@dataclass(frozen=True)
class Outcome:
    """Gold of the PPO runs on a reward; of several runs the means.

    peak: the highest of a run. peak_step: when that was, of several runs the median.
    final: of the last evaluation. standard_error: of that, over its samples.
    loss: share of what the runs had gained at their peaks that is gone at the end: the sum of (peak - final)
        over the sum of (peak - start), each run by its own peak; the start is 0. None where nothing was
        gained.
    sqrt_kl: at the end, in sqrt(nats per sample).
    """

    peak: float
    peak_step: int
    final: float
    standard_error: float
    loss: float | None
    sqrt_kl: float


def outcome(run_dirs: Sequence[Path]) -> Outcome:
    """Measure runs by the evaluations that they kept, at the same steps."""
    measured = [run_curve(run_dir) for run_dir in run_dirs]
    curves = [each.normalised() for each in measured]
    errors = [_standard_error(run_dir, each) for run_dir, each in zip(run_dirs, measured, strict=True)]
    peak = float(np.mean([curve.gold.max() for curve in curves]))
    final = float(np.mean([curve.gold[-1] for curve in curves]))
    return Outcome(
        peak=peak,
        peak_step=int(np.median([curve.step[curve.gold.argmax()] for curve in curves])),
        final=final,
        standard_error=float(np.linalg.norm(errors) / len(errors)),
        loss=(peak - final) / peak if peak > 0 else None,
        sqrt_kl=float(np.mean([curve.distance[-1] for curve in curves])),
    )


def _standard_error(run_dir: Path, curve: Curve) -> float:
    """Of normalised gold in a run's last evaluation."""
    assert curve.gold_start is not None
    scores = np.array(read_record(records_of(run_dir)[-1]).column(GOLD)) / curve.gold_start.std
    return float(scores.std(ddof=1) / math.sqrt(len(scores)))


def ensemble_reward(
    name: str, members: Float[np.ndarray, "K P N"], uwo_weight: float
) -> Float[np.ndarray, "P N"]:
    """What `reward.combine` makes of the members' scores; `single_0` is the first member's."""
    if name == "wco":
        return members.min(axis=0)
    if name in ("mean", "uwo"):
        mean = members.mean(axis=0)
        return mean if name == "mean" else mean - uwo_weight * members.var(axis=0)
    return members[int(name.rpartition("_")[2])]


def measure_best_of_n(scores: Path, name: str, uwo_weight: float, folder: Path) -> dict[int, float]:
    """Estimate what the best of n by a reward is worth, for n = 1, 2, 4, ...

    scores: file of the members' scores and gold, [prompts, samples] each.
    folder: gets `results.json`, as of `conch best-of-n`.

    Returns:
        n -> gold, normalised.
    """
    with np.load(scores) as arrays:
        members, gold = arrays["members"], arrays["gold"]
    reward = ensemble_reward(name, members, uwo_weight)
    columns = {PROXY: reward, GOLD: gold, _VARIANCE: members.var(axis=0)}
    ns = [2**power for power in range(gold.shape[1].bit_length()) if 2**power <= gold.shape[1]]
    rows = [{name: column[prompt] for name, column in columns.items()} for prompt in range(len(gold))]
    found = best_of_n(rows, ns, proxy=PROXY)
    starts = {name: Start.of(columns[name].ravel()) for name in (PROXY, GOLD)}
    content = results_json(found, starts, {PROXY: name, GOLD: "hidden preference"}, _VARIANCE)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / RESULTS, json.dumps(content, indent=2) + "\n")
    gains = curve_of(folder).normalised().gold
    return dict(zip(ns, gains.tolist(), strict=True))


def report(
    folders: Mapping[int, Path],
    rewards: Mapping[str, Sequence[str]],
    uwo_weight: float,
    output: Path,
    seconds: Seconds,
) -> dict[str, Any]:
    """Write `summary.json` and the figures `ppo` and `best_of_n` with their CSV files, and print a table.

    folders: of the seeds, each with `ppo_<name>` and `best_of_n.npz`; get `best_of_n_<name>`.
    rewards: that are compared -> names of what PPO was run on.
    seconds: that all calls took so far.

    Returns:
        what `summary.json` holds.
    """
    ppo, best = {}, {}
    for seed, folder in folders.items():
        ppo[seed] = {
            reward: outcome([folder / f"ppo_{name}" for name in names]) for reward, names in rewards.items()
        }
        best[seed] = {
            reward: _mean_of(
                [
                    measure_best_of_n(
                        folder / "best_of_n.npz", name, uwo_weight, folder / f"best_of_n_{name}"
                    )
                    for name in names
                ]
            )
            for reward, names in rewards.items()
        }
    together = {
        reward: outcome([folder / f"ppo_{name}" for folder in folders.values() for name in names])
        for reward, names in rewards.items()
    }
    best_together = {reward: _mean_of([best[seed][reward] for seed in folders]) for reward in rewards}
    summary = {
        "seconds": round(seconds.total, 1),
        "part_seconds": {seed: seconds.parts.get(seed, {}) for seed in folders},
        "uwo_weight": uwo_weight,
        "ppo": {seed: {reward: asdict(found) for reward, found in of.items()} for seed, of in ppo.items()},
        "best_of_n": best,
        "all_seeds": {
            "ppo": {reward: asdict(found) for reward, found in together.items()},
            "best_of_n": best_together,
        },
    }
    replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(table({**ppo, ALL: together}, {**best, ALL: best_together}))
    for kind in ("ppo", "best_of_n"):
        curves = {
            reward: [
                curve_of(folder / f"{kind}_{name}", label=f"seed_{seed}/{kind}_{name}")
                for seed, folder in folders.items()
                for name in names
            ]
            for reward, names in rewards.items()
        }
        print(*draw(curves, output, kind), sep="\n")
    return summary


def _mean_of(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {n: float(np.mean([curve[n] for curve in curves])) for n in curves[0]}


def table(
    ppo: Mapping[Any, Mapping[str, Outcome]], best: Mapping[Any, Mapping[str, Mapping[int, float]]]
) -> str:
    """Lines of what each arm of each seed, and of `ALL`, gained and lost."""
    heads = f"{'peak':>7}{'step':>6}{'final':>8}{'+-':>6}{'lost':>7}{'sqrt(KL)':>10}"
    lines = [f"{'seed':>4} {'reward':8}{heads}  gold of the best of n"]
    for seed, arms in ppo.items():
        for arm, found in arms.items():
            lost = "-" if found.loss is None else f"{found.loss:.0%}"
            shown = _some(best[seed][arm])
            lines.append(
                f"{seed:>4} {arm:8}{found.peak:>7.2f}{found.peak_step:>6}{found.final:>8.2f}"
                f"{found.standard_error:>6.2f}{lost:>7}{found.sqrt_kl:>10.2f}  {shown}"
            )
    return "\n".join(lines)


def _some(curve: Mapping[int, float]) -> str:
    ns: Sequence[int] = [n for n in curve if n in (1, 4, 16, 64, 256, 1024, 4096)]
    return "  ".join(f"{n}: {curve[n]:.2f}" for n in ns)
