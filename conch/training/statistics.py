"""Statistics of a step: rewards, completions and updates, as metrics and as a log of rollouts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.data.rollout_batch import Sequences
from conch.distributed.collectives import Collectives
from conch.distributed.train_engine import TrainEngine, UpdateReport
from conch.evaluation.metrics import mean_of_finite
from conch.log import get_logger
from conch.ops import Reduce, masked_mean
from conch.rewards.combined import disagreement
from conch.rewards.replay import facts_in_json
from conch.rewards.scorer import total_reward
from conch.rewards.steering.source import FACTS as STEERING_FACTS
from conch.training.kl import mean_kl
from conch.training.logprobs import LogprobOutputs
from conch.training.loop import Run
from conch.types import Metrics, RewardResult, Rollout

_log = get_logger(__name__)


def reward_metrics(
    rewards: Sequence[RewardResult], weights: Mapping[str, float], objectives: Sequence[str], reduce: Reduce
) -> Metrics:
    """Mean and spread of the rewards of all ranks, NaN where there are none, and the share that failed.

    Of ensembles the mean over samples of the variance of their members' scores as well.

    objectives: where there are several, each one's mean is reported as well; the same on all ranks.
    """
    metrics = _spread([total_reward(reward, weights) for reward in rewards], reduce)
    if len(objectives) > 1:
        for name in objectives:
            column = [reward.scores.get(name, math.nan) for reward in rewards]
            metrics[f"reward/mean/{name}"] = _spread(column, reduce)["reward/mean"]
    variances = [disagreement(reward) for reward in rewards]
    members = _spread([math.nan if each is None else each for each in variances], reduce)
    if members["reward/failed_fraction"] < 1:  # over all ranks, which so agree
        metrics["reward/members_variance"] = members["reward/mean"]
    return metrics


def fact_metrics(rewards: Sequence[RewardResult], names: Sequence[str], reduce: Reduce) -> Metrics:
    """Means of facts over the samples of all ranks that they apply to, NaN where there is none.

    names: of the facts, the same on all ranks; those of steering bring their stage along.
    """
    columns = {name: [reward.facts.get(name, math.nan) for reward in rewards] for name in names}
    return {
        name if name.startswith(STEERING_FACTS) else f"verifier/{name}": _spread(column, reduce)[
            "reward/mean"
        ]
        for name, column in columns.items()
    }


def _spread(values: Sequence[float], reduce: Reduce) -> Metrics:
    raw = torch.tensor(values, dtype=torch.float64)
    valid = raw.isfinite()
    share = float(masked_mean(valid.double(), torch.ones_like(valid), reduce))
    mean = float(masked_mean(raw, valid, reduce)) if share else math.nan
    variance = float(masked_mean((raw - mean) ** 2, valid, reduce)) if share else math.nan
    return {"reward/mean": mean, "reward/std": variance**0.5, "reward/failed_fraction": 1 - share}


def rollout_metrics(
    rollouts: Sequence[Rollout], sequences: Sequences, reduce: Reduce, greatest: Reduce
) -> Metrics:
    """Lengths, and the share cut by the limit.

    greatest: takes the maximum over all ranks.
    """
    mask = sequences.response_mask
    reasons = [rollout.completion.finish_reason for rollout in rollouts]
    cut = torch.tensor([reason == "length" for reason in reasons], device=mask.device)
    everyone, lengths = torch.ones_like(cut), mask.sum(dim=1)
    return {
        "rollout/length_mean": float(masked_mean(lengths.float(), everyone, reduce)),
        "rollout/length_max": float(greatest(lengths.max())),
        "rollout/truncated_fraction": float(masked_mean(cut.float(), everyone, reduce)),
    }


@dataclass(frozen=True)
class NewestRollouts:
    """Those of a step that the newest weights sampled: by them the sampler is held against the trainer, for
    the others' log-probs differ by what the policy has learned since.

    A rollout is as old as its first token: where weights changed under way, later tokens were sampled by the
    new ones from keys and values of the old.

    rows: True at the newest, of this rank; False everywhere where another rank has newer ones.
    age: updates that the policy has seen since it sampled them; 0 in synchronous training.
    """

    rows: Bool[Tensor, " B"]
    age: int


def newest_rollouts(
    rollouts: Sequence[Rollout], version: int, greatest: Reduce, device: torch.device
) -> NewestRollouts:
    """Find the newest rollouts over all ranks.

    version: updates that the policy has seen.
    greatest: takes the maximum over all ranks.
    """
    versions = torch.tensor([rollout.policy_version for rollout in rollouts], device=device)
    newest = greatest(versions.max())
    return NewestRollouts(versions == newest, max(0, version - int(newest)))


def logprob_diff(
    logprobs: Float[Tensor, "B R"],
    sequences: Sequences,
    reduce: Reduce,
    alarm: float | None = None,
    newest: NewestRollouts | None = None,
) -> float:
    """Distance of the sampler's log-probs from the trainer's: mean of absolute differences, nats a token.

    alarm: see `warn_of_logprob_diff`.
    newest: rollouts that the alarm goes by; None for all, sampled by the present policy.
    """
    distance, mask = (logprobs - sequences.sampling_logprobs).abs(), sequences.response_mask
    gap = float(masked_mean(distance, mask, reduce))
    if newest is None:
        warn_of_logprob_diff(gap, alarm)
    else:
        of_newest = float(masked_mean(distance, mask & newest.rows.unsqueeze(1), reduce))
        warn_of_logprob_diff(of_newest, alarm, newest.age)
    return gap


def policy_metrics(
    outputs: LogprobOutputs,
    reduce: Reduce,
    alarm: float | None = None,
    newest: NewestRollouts | None = None,
) -> Metrics:
    """Entropy, distance from the sampler and, where there is a reference, KL to it; {} without log-probs.

    alarm, newest: see `logprob_diff`.
    """
    if outputs.logprobs is None or outputs.entropy is None:
        return {}
    mask = outputs.sequences.response_mask
    metrics = {
        "policy/entropy": float(masked_mean(outputs.entropy, mask, reduce)),
        "rollout/logprob_diff": logprob_diff(outputs.logprobs, outputs.sequences, reduce, alarm, newest),
    }
    if outputs.ref_logprobs is not None:
        metrics["policy/kl"] = mean_kl(outputs.logprobs, outputs.ref_logprobs, mask, reduce)
    return metrics


def warn_of_logprob_diff(gap: float, alarm: float | None, age: int = 0) -> None:
    """Write a warning where the distance of the newest rollouts is above `alarm`, in nats a token.

    age: updates that the policy has seen since it sampled them.
    """
    if alarm is None or gap <= alarm:
        return
    causes = "another precision, stale weights, or a cut by `generation.top_k` or `top_p`"
    if not age:
        _log.warning(
            "the sampler's log-probs are %.3g nats a token from the trainer's, above "
            "`rollout.logprob_diff_alarm` = %g: what is trained on was sampled from another distribution "
            "(%s)",
            gap,
            alarm,
            causes,
        )
        return
    _log.warning(
        "the sampler's log-probs are %.3g nats a token from the trainer's, above "
        "`rollout.logprob_diff_alarm` = %g: the newest samples of this step are %d %s old, in which the "
        "policy moved that far, or the sampler computes otherwise (%s); a step on samples of the present "
        "policy, as the first of a run is, warns in the second case only",
        gap,
        alarm,
        age,
        "update" if age == 1 else "updates",
        causes,
    )


def log_rollouts(
    collectives: Collectives,
    run: Run,
    rollouts: Sequence[Rollout],
    rewards: Sequence[RewardResult],
    kl: Float[Tensor, " B"] | None = None,
) -> None:
    """Write what all ranks are about to train on to `rollouts/step_N.jsonl`.

    kl: to the reference, in nats per sample; None where there is no reference.
    """
    nats_of_each = [None] * len(rollouts) if kl is None else kl.tolist()
    rows = [
        {
            "prompt": rollout.prompt.text,
            "output": rollout.completion.text,
            "finish_reason": rollout.completion.finish_reason,
            "policy_version": rollout.policy_version,
            "reward_status": reward.status.value,
            "scores": dict(reward.scores),
            "token_scores": reward.token_scores,
            "members": dict(reward.members),
            "facts": facts_in_json(reward),
            "kl": nats,
        }
        for rollout, reward, nats in zip(rollouts, rewards, nats_of_each, strict=True)
    ]
    rows = collectives.all_gather(rows)
    if collectives.is_main:
        folder = run.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"step_{run.step + 1}.jsonl").write_text(text, encoding="utf-8")


def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], reduce: Reduce
) -> float:
    """1 - Var(returns - values) / Var(returns) over all ranks: 1 for values off by a constant at most,
    0 for those no better than a constant; NaN where the returns do not vary by more than rounding."""

    def variance(of: Tensor) -> Tensor:
        return masked_mean((of - masked_mean(of, mask, reduce)) ** 2, mask, reduce)

    spread = variance(returns)
    if spread <= 1e-12 * masked_mean(returns**2, mask, reduce):
        return math.nan
    return float(1 - variance(returns - values) / spread)


@contextmanager
def timer(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's seconds to `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def update_with_statistics(
    engine: TrainEngine,
    num_rows: int,
    micro_batches: int,
    loss_of: Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> tuple[Metrics, UpdateReport]:
    """One optimizer update from `num_rows` rows, and statistics summed over micro-batches and ranks.

    loss_of: from a micro-batch's rows, its share of the loss and its share of each statistic.
    """
    summed: dict[str, torch.Tensor] = {}

    def noted(rows: torch.Tensor) -> torch.Tensor:
        loss, shares = loss_of(rows)
        for name, share in shares.items():
            summed[name] = summed.get(name, torch.zeros_like(share)) + share.detach()
        return loss

    report = engine.update(torch.arange(num_rows).chunk(micro_batches), noted)
    totals = engine.collectives.all_reduce(torch.stack(list(summed.values()))).tolist()
    return dict(zip(summed, totals, strict=True)), report


def updates_over(
    num_rows: int,
    epochs: int,
    minibatches: int,
    update: Callable[[torch.Tensor], tuple[Metrics, UpdateReport]],
) -> Metrics:
    """All epochs over one step's samples, dealt anew each time; means over the updates, and what the first
    one found.

    Within an update samples keep their order, on which its gradient does not depend: a micro-batch has the
    completions of a prompt together and reads it once, and one that has the samples of a forward pass has its
    rows, too.

    update: one optimizer update on these rows.
    """
    columns: list[Metrics] = []
    reports: list[UpdateReport] = []
    for _ in range(epochs):
        for rows in torch.randperm(num_rows).chunk(minibatches):
            stats, report = update(rows.sort().values)
            columns.append(stats)
            reports.append(report)
    means = {name: sum(stats[name] for stats in columns) / len(columns) for name in columns[0]}
    first = {f"{name}_first": columns[0][name] for name in _FIRST}
    return {**means, **first, **update_metrics(reports)}


def update_metrics(reports: Sequence[UpdateReport]) -> Metrics:
    """What one or more optimizer updates in a row did to the weights; the rate is the last one's."""
    return {
        "train/grad_norm": mean_of_finite([report.grad_norm for report in reports if not report.skipped]),
        "train/learning_rate": reports[-1].learning_rate,
        "train/skipped_updates": float(sum(report.skipped for report in reports)),
    }


_FIRST = ("train/ratio", "train/approx_kl", "train/clip_fraction")
"""Statistics also reported for the first minibatch alone, where the policy is still the one that sampled:
they must be 1, 0 and 0."""
