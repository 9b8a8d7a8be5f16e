"""Real PPO trainers of a tiny policy: what a step must be, by hand or against unpadded float64 loops."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2LMHeadModel

from conch.data.rollout_batch import collate
from conch.errors import ConfigError, DataError, ModelError
from conch.trainers.ppo import PPOBatch, PPOTrainer
from conch.types import RewardResult, RewardStatus, Rollout
from tests.numerics import rounding
from tests.runs import (
    LINEAR_ADAM,
    PAD,
    PROMPTS,
    TOKENIZER,
    batch_and_metrics,
    batch_of,
    letters_rollout,
    parameters,
    policy,
    ppo_trainer,
    scored,
    shake,
)
from tests.tiny import char_tokenizer

ROLLOUTS = [
    letters_rollout("a", "bcd"),
    letters_rollout("bcd", "e"),
    letters_rollout("ef", "ghabc", "length"),
    letters_rollout("g", ""),
    letters_rollout("ha", "aa", "stop"),
    letters_rollout("b", "hg"),
    letters_rollout("cdefg", "abcd"),
    letters_rollout("d", "f", "length"),
]
SCORES = (1.0, -2.0, 0.5, 3.0, 0.0, 1.5, -1.0, 2.0)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def token_logprobs(lm: GPT2LMHeadModel, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of a completion from a forward pass of this one sample, without padding, in float64."""
    prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = copy.deepcopy(lm).double()(input_ids=ids).logits[0] / temperature
    steps = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    found = [logits[step].log_softmax(-1)[ids[0, step + 1]] for step in steps]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def returns_of(trainer: PPOTrainer, rewards: Sequence[RewardResult]) -> list[float]:
    """Each sample's return at its first token: with gamma = lambda = 1 and no KL, its whole reward."""
    return batch_of(trainer, ROLLOUTS, rewards).returns[:, 0].tolist()


def plain(**ppo: Any) -> dict[str, Any]:
    """Settings under which a sample's return is its reward."""
    return {"lam": 1.0, "kl": {"coef": 0.0}, **ppo}


# --------------------------------------------------------------------------------------------- the first step


@pytest.mark.parametrize("num_layers_unfrozen", [-1, 1])
def test_first_minibatch_is_on_policy(run_dir: Path, num_layers_unfrozen: int) -> None:
    trainer = ppo_trainer(
        run_dir,
        model={"num_layers_unfrozen": num_layers_unfrozen},
        ppo={"epochs": 2, "minibatches": 4},
        optimizer={"learning_rate": 0.01},
        generation={"temperature": 0.7},
    )
    metrics = trainer.step()
    assert metrics["train/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["train/approx_kl_first"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["train/clip_fraction_first"] == 0.0
    assert metrics["policy/kl"] == 0.0
    # Later minibatches are not: the figures above say something.
    assert metrics["train/approx_kl"] > 1e-4
    assert trainer.step()["policy/kl"] != 0.0


def test_log_probs_of_the_trainer_are_those_of_the_sampler(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, generation={"max_new_tokens": 5, "temperature": 0.6})
    rollouts = trainer.rollout(trainer.prompts)
    batch, metrics = batch_and_metrics(trainer, rollouts, trainer.score(rollouts))
    assert metrics["rollout/logprob_diff"] < 1e-5
    for row, rollout in enumerate(rollouts):
        expected = token_logprobs(trainer.policy.lm, rollout, temperature=0.6)
        found = batch.old_logprobs[row, : len(expected)].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        sampled = torch.tensor(rollout.completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=rounding(expected, 8))


def test_log_probs_are_computed_while_rewards_are_under_way(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    trainer = ppo_trainer(run_dir, reward_fn=lambda outputs, **_: [float(looked.wait(30.0)) for _ in outputs])
    compute = trainer.compute_logprobs
    monkeypatch.setattr(
        trainer,
        "compute_logprobs",
        lambda rollouts: (compute(rollouts), looked.set())[0],
    )

    assert trainer.step()["reward/mean"] == 1.0, "rewards were waited for before"


def test_first_values_are_zero(run_dir: Path) -> None:
    batch = batch_of(ppo_trainer(run_dir), ROLLOUTS, scored(*SCORES))
    assert not batch.old_values.any()


def test_a_model_passed_with_dropout_trains_without(run_dir: Path) -> None:
    model = policy(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    assert ppo_trainer(run_dir, lm=model).step()["train/approx_kl_first"] < 1e-9


# ----------------------------------------------------------------------------------------- rewards to returns


def test_returns_are_the_scores_where_nothing_is_added(run_dir: Path) -> None:
    assert returns_of(ppo_trainer(run_dir, ppo=plain()), scored(*SCORES)) == pytest.approx(list(SCORES))


def test_kl_of_every_token_is_taken_off(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain(kl={"coef": 0.3}))
    start = copy.deepcopy(trainer.policy.lm)
    shake(trainer.policy, 0.05)
    trainer.policy.value_head.out.weight.data.zero_()
    trainer.policy.value_head.out.bias.data.zero_()
    batch, metrics = batch_and_metrics(trainer, ROLLOUTS, scored(*SCORES))
    kls = []
    for row, rollout in enumerate(ROLLOUTS):
        kl = token_logprobs(trainer.policy.lm, rollout) - token_logprobs(start, rollout)
        kls.append(float(kl.sum()))
        for t in range(len(kl)):
            expected = SCORES[row] - 0.3 * float(kl[t:].sum())
            assert float(batch.returns[row, t]) == pytest.approx(expected, abs=1e-4)
    # Prompts and padding are of all lengths here and do not count.
    assert metrics["policy/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    assert trainer.kl_to_start(ROLLOUTS) == pytest.approx(sum(kls) / len(kls), abs=1e-4)


def test_missing_eos_is_penalised_and_counted(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain(), shaping={"missing_eos_penalty": 10.0})
    expected = [score - (10.0 if index in (2, 7) else 0.0) for index, score in enumerate(SCORES)]
    batch, metrics = batch_and_metrics(trainer, ROLLOUTS, scored(*SCORES))
    assert batch.returns[:, 0].tolist() == pytest.approx(expected)
    assert metrics["rollout/truncated_fraction"] == 2 / 8
    assert metrics["reward/mean"] == pytest.approx(sum(SCORES) / 8)


def test_scores_are_clipped_first_and_scaled_second(run_dir: Path) -> None:
    shaping = {"clip": 2.0, "scaling": "running", "missing_eos_penalty": 5.0}
    trainer = ppo_trainer(run_dir, ppo=plain(), shaping=shaping)
    rewards = scored(10.0, -10.0, 2.0, -2.0, 0.0, 0.0, None, 0.0)
    # Clipped 2, -2, 2, -2, 0, 0, 0: variance 16 / 7 without the failure; the penalty is not scaled.
    std = math.sqrt(16 / 7)
    expected = [2 / std, -2 / std, 2 / std - 5, -2 / std, 0, 0, 0, -5]
    assert returns_of(trainer, rewards) == pytest.approx(expected, abs=1e-6)
    # The second batch is scaled by what both have shown: 15 scores, squares 16 + 8, sum 8.
    std = math.sqrt(24 / 15 - (8 / 15) ** 2)
    assert returns_of(trainer, scored(*[1.0] * 8))[0] == pytest.approx(1 / std, abs=1e-6)


def test_dense_rewards_land_on_their_tokens(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain())
    rewards = scored(*SCORES)
    rewards[0] = RewardResult(RewardStatus.OK, token_scores=(1.0, 0.0, -2.0, 5.0))
    returns = batch_of(trainer, ROLLOUTS, rewards).returns
    assert returns[0].tolist() == pytest.approx([4.0, 3.0, 3.0, 5.0, 0.0])
    assert returns[1, :2].tolist() == pytest.approx([-2.0, -2.0])


def test_objectives_are_weighed(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain(), reward={"weights": {"style": 0.5}})
    both = RewardResult(RewardStatus.OK, scores={"truth": 2.0, "style": 3.0})
    assert returns_of(trainer, [both] * 8) == pytest.approx([3.5] * 8)


def test_weight_of_an_objective_that_the_reward_lacks_is_refused_with_the_scores(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, reward={"weights": {"stile": 0.5}})
    rollouts = trainer.rollout(trainer.prompts[:2])
    with pytest.raises(ConfigError, match=r"reward\.weights names `stile`"):
        trainer.score(rollouts)


def test_advantages_are_whitened_over_valid_tokens(run_dir: Path) -> None:
    batch = batch_of(ppo_trainer(run_dir), ROLLOUTS, scored(*SCORES[:-1], None))
    valid = batch.advantages[batch.loss_mask].double()
    assert valid.numel() == sum(len(rollout.completion.token_ids) for rollout in ROLLOUTS[:-1])
    assert abs(float(valid.mean())) < 1e-6
    assert float(valid.var(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert not batch.advantages[~batch.loss_mask].any()


def test_experience_of_a_sample_does_not_depend_on_its_neighbours(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain())
    shake(trainer.policy, 0.05)
    together = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    for row, rollout in enumerate(ROLLOUTS):
        alone = batch_of(trainer, [rollout], scored(SCORES[row]))
        length = int(alone.loss_mask.sum())
        for name in ("old_logprobs", "old_values", "returns"):
            one, many = getattr(alone, name)[0, :length], getattr(together, name)[row, :length]
            torch.testing.assert_close(one, many, rtol=0, atol=1e-10)


def test_kl_in_the_loss_leaves_the_rewards_alone(run_dir: Path) -> None:
    start = policy()
    trainer = ppo_trainer(
        run_dir,
        lm=copy.deepcopy(start),
        optimizer={"learning_rate": 1e-6},
        ppo={"lam": 1.0, "value_coef": 0.0, "kl": {"coef": 0.3, "placement": "loss", "estimator": "k3"}},
    )
    shake(trainer.policy.lm, 0.05)
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    assert batch.returns[:, 0].tolist() == pytest.approx(SCORES, abs=1e-5)
    metrics = trainer.update(batch)
    k3, tokens = 0.0, 0
    for rollout in ROLLOUTS:
        ratio = token_logprobs(start, rollout) - token_logprobs(trainer.policy.lm, rollout)
        k3, tokens = k3 + float((ratio.exp() - 1 - ratio).sum()), tokens + len(ratio)
    assert k3 / tokens > 1e-3
    kl_loss = metrics["train/loss"] - metrics["train/policy_loss"]
    assert kl_loss == pytest.approx(0.3 * k3 / tokens, rel=1e-3)


def test_whitened_rewards_keep_their_mean(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain(whiten_rewards=True))
    raw = torch.zeros(8, 6)
    for row, rollout in enumerate(ROLLOUTS):
        raw[row, len(rollout.completion.token_ids) - 1] = SCORES[row]
    mask = batch_of(trainer, ROLLOUTS, scored(*SCORES)).loss_mask
    std = float(raw[:, : mask.shape[1]][mask].std(correction=0))
    expected = [score / std for score in SCORES]
    assert returns_of(trainer, scored(*SCORES)) == pytest.approx(expected, abs=1e-5)


def test_reference_scaling_divides_by_the_spread_of_the_first_step(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo=plain(), shaping={"scaling": "reference"})
    std = float(torch.tensor(SCORES).std(correction=0))
    assert returns_of(trainer, scored(*SCORES))[0] == pytest.approx(1.0 / std)
    assert returns_of(trainer, scored(*[score * 10 for score in SCORES]))[0] == pytest.approx(10.0 / std)


def test_delta_reward_is_what_an_output_is_better_by(run_dir: Path) -> None:
    prompts = [{"prompt": letter, "original_output": "ae" * n} for n, letter in enumerate("abcd")]
    trainer = ppo_trainer(
        run_dir,
        prompts=prompts,
        reward={"delta": True},
        reward_fn=lambda outputs, **_: [float(len(output)) for output in outputs],
    )
    rollouts = trainer.rollout(trainer.prompts)
    found = [result.scores["reward"] for result in trainer.score(rollouts)]
    assert found == [len(rollout.completion.text) - 2 * n for n, rollout in enumerate(rollouts)]


def test_delta_reward_without_an_original_is_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match=r"prompt 1 has none.*original_output"):
        ppo_trainer(run_dir, reward={"delta": True}, prompts=[{"prompt": "a", "original_output": "b"}, "c"])


def test_rollouts_are_written_where_asked_for(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, tracking={"rollouts": True}, train={"total_steps": 2})
    trainer.fit()
    rows = [json.loads(line) for line in (run_dir / "rollouts" / "step_2.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    vowels = [sum(letter in "ae" for letter in row["output"]) for row in rows]
    assert [row["scores"]["reward"] for row in rows] == vowels
    assert {row["policy_version"] for row in rows} == {1} and any(row["kl"] != 0.0 for row in rows)


def test_evaluation_sweeps_one_argument(run_dir: Path) -> None:
    sweep = {"max_new_tokens": [1, 4], "temperature": 0.5}
    metrics = ppo_trainer(
        run_dir,
        eval_generation=sweep,
        metric_fn=lambda outputs, **_: {"length": [len(output) for output in outputs]},
    ).evaluate(repeats=4)
    assert metrics["eval/length@max_new_tokens=1"] <= 1 < metrics["eval/length@max_new_tokens=4"]
    assert metrics["eval/length"] == metrics["eval/length@max_new_tokens=4"]
    assert {"eval/reward@max_new_tokens=1", "eval/kl@max_new_tokens=4"} < metrics.keys()


def test_greedy_evaluation_gives_the_same_output_each_time(run_dir: Path) -> None:
    seen: list[tuple[str, str]] = []

    def metric(prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        seen.extend(zip(prompts, outputs, strict=True))
        return {}

    ppo_trainer(run_dir, eval_generation={"do_sample": False}, metric_fn=metric).evaluate(repeats=5)
    assert len(seen) == 5 * len(PROMPTS) and len(set(seen)) == len(PROMPTS)


# ------------------------------------------------------------------------------------------ failures and gaps


def updated(run_dir: Path, rollouts: list[Rollout], rewards: list[RewardResult]) -> torch.Tensor:
    trainer = ppo_trainer(run_dir, optimizer=LINEAR_ADAM)
    trainer.update(batch_of(trainer, rollouts, rewards))
    return parameters(trainer.policy)


def test_a_sample_without_reward_leaves_the_loss(tmp_path: Path) -> None:
    rewards = scored(*SCORES[:3], None, *SCORES[4:])
    other = [*ROLLOUTS[:3], letters_rollout("hgf", "hhhhh", "length"), *ROLLOUTS[4:]]
    assert torch.allclose(
        updated(tmp_path / "1", ROLLOUTS, rewards),
        updated(tmp_path / "2", other, rewards),
        rtol=0,
        atol=1e-10,
    )
    zeroed = updated(tmp_path / "3", other, scored(*SCORES[:3], 0.0, *SCORES[4:]))
    assert not torch.allclose(updated(tmp_path / "4", other, rewards), zeroed, atol=1e-4)


def test_failures_are_counted_and_not_averaged_in(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir)
    _, metrics = batch_and_metrics(trainer, ROLLOUTS, scored(1.0, None, 3.0, *[2.0] * 5))
    assert metrics["reward/mean"] == 2.0
    assert metrics["reward/failed_fraction"] == 1 / 8


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_empty_responses_do_no_harm(run_dir: Path, reason: Any) -> None:
    trainer = ppo_trainer(run_dir)
    empty = [letters_rollout(prompt, "", reason) for prompt in PROMPTS]
    before = parameters(trainer.policy)
    metrics = trainer.update(batch_of(trainer, empty, scored(*SCORES)))
    assert metrics["train/loss"] == 0.0 and torch.equal(parameters(trainer.policy), before)
    some = trainer.update(batch_of(trainer, [*empty[:4], *ROLLOUTS[4:]], scored(*SCORES)))
    assert all(math.isfinite(value) for value in some.values())
    assert parameters(trainer.policy).isfinite().all()


def test_non_finite_gradient_is_skipped_and_counted(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, scheduler={"name": "linear"})
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    broken = copy.deepcopy(batch)
    broken.advantages[0, 0] = math.inf
    before = parameters(trainer.policy)
    metrics = trainer.update(broken)
    assert metrics["train/skipped_updates"] == 1.0 and math.isnan(metrics["train/grad_norm"])
    assert torch.equal(parameters(trainer.policy), before)
    metrics = trainer.update(batch)
    assert metrics["train/skipped_updates"] == 0.0 and metrics["train/grad_norm"] > 0
    assert metrics["train/learning_rate"] == pytest.approx(1e-4)  # a skipped update is no update
    assert parameters(trainer.policy).isfinite().all() and not torch.equal(parameters(trainer.policy), before)


# ----------------------------------------------------------------------------------------------------- update


def off_policy_batch(trainer: PPOTrainer) -> PPOBatch:
    """A batch of samples that another policy drew, with anything as advantages and returns."""
    generator = torch.Generator().manual_seed(3)
    sequences = collate(ROLLOUTS, PAD)
    mask = sequences.response_mask.clone()
    mask[5] = False  # a sample without reward
    shape = mask.shape

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    outputs = trainer.compute_logprobs(ROLLOUTS)
    logprobs, values = outputs.logprobs, outputs.values
    return PPOBatch(
        sequences,
        mask,
        old_logprobs=logprobs + 0.4 * noise(),
        ref_logprobs=logprobs,
        old_values=values + 0.4 * noise(),
        advantages=noise(),
        returns=values + noise(),
        kl_coef=0.0,
    )


def reference_statistics(trainer: PPOTrainer, batch: PPOBatch) -> dict[str, float]:
    """Token by token from unpadded forward passes in float64."""
    totals = dict.fromkeys(("policy_loss", "value_loss", "ratio", "approx_kl", "clip_fraction"), 0.0)
    count = 0
    for row, rollout in enumerate(ROLLOUTS):
        for t, logprob in enumerate(token_logprobs(trainer.policy.lm, rollout)):
            if not batch.loss_mask[row, t]:
                continue
            count += 1
            advantage = float(batch.advantages[row, t])
            rho = math.exp(float(logprob) - float(batch.old_logprobs[row, t]))
            kept = min(max(rho, 0.8), 1.2)
            # The value head's output is 0 still.
            old, target = float(batch.old_values[row, t]), float(batch.returns[row, t])
            near = min(max(0.0, old - 0.2), old + 0.2)
            totals["policy_loss"] += max(-advantage * rho, -advantage * kept)
            totals["value_loss"] += max(target**2, (near - target) ** 2) / 2
            totals["ratio"] += rho
            totals["approx_kl"] += rho - 1 - math.log(rho)
            totals["clip_fraction"] += -advantage * kept > -advantage * rho
    return {name: total / count for name, total in totals.items()}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_statistics_of_an_update_are_means_over_valid_tokens(run_dir: Path, accumulation: int) -> None:
    trainer = ppo_trainer(
        run_dir, train={"gradient_accumulation_steps": accumulation}, ppo={"value_coef": 0.3}
    )
    batch = off_policy_batch(trainer)
    expected = reference_statistics(trainer, batch)
    metrics = trainer.update(batch)
    for name, value in expected.items():
        assert metrics[f"train/{name}"] == pytest.approx(value, rel=1e-4), name
    assert metrics["train/loss"] == pytest.approx(
        expected["policy_loss"] + 0.3 * expected["value_loss"], rel=1e-4
    )
    assert 0 < expected["clip_fraction"] < 1


def test_minibatches_cover_every_sample_once_an_epoch(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo={"epochs": 2, "minibatches": 4}, optimizer={"learning_rate": 1e-12})
    batch = off_policy_batch(trainer)
    # Returns that name their row, and values of 0: the value loss of a minibatch tells which rows it held.
    batch.returns.copy_(torch.arange(1.0, 9.0).sqrt().unsqueeze(1).expand_as(batch.returns))
    batch.old_values.zero_()
    batch.loss_mask.fill_(False)
    batch.loss_mask[:, 0] = True
    for _ in range(2):
        metrics = trainer.update(batch)
        assert metrics["train/value_loss"] == pytest.approx(sum(range(1, 9)) / 8 / 2, rel=1e-4)


def test_learning_rate_falls_to_zero_over_all_updates(run_dir: Path) -> None:
    trainer = ppo_trainer(
        run_dir,
        ppo={"epochs": 2, "minibatches": 2},
        train={"total_steps": 3},
        scheduler={"name": "linear"},
        optimizer={"learning_rate": 0.012},
    )
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    rates = [trainer.update(batch)["train/learning_rate"] for _ in range(3)]
    # 12 updates from 0.012 down by 0.001: the 4th, 8th and 12th.
    assert rates == pytest.approx([0.009, 0.005, 0.001])
    before = parameters(trainer.policy)
    trainer.update(batch)
    assert torch.equal(parameters(trainer.policy), before)


def test_adaptive_controller_counts_the_samples_of_the_step(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, ppo={"kl": {"coef": 0.1, "target": 2.0, "horizon": 100}})
    assert trainer.step()["policy/kl_coef"] == 0.1
    # The first KL is 0: an error of -1, cut to -0.2, over 8 samples of 100.
    assert trainer.kl_controller.coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 100))


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    lm = policy(dtype=torch.float32)
    wide = ppo_trainer(tmp_path / "wide", lm=copy.deepcopy(lm))
    batch = off_policy_batch(wide)
    expected = wide.update(batch)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = ppo_trainer(tmp_path / "half", lm=lm, train={"mixed_precision": "bf16"})
    prompts = half.prompts
    rollouts = half.rollout(prompts)
    own, metrics = batch_and_metrics(half, rollouts, half.score(rollouts))
    assert metrics["policy/kl"] == 0.0
    assert metrics["rollout/logprob_diff"] < 0.05
    for tensor in (own.old_logprobs, own.old_values, own.advantages, own.returns):
        assert tensor.dtype == torch.float32
    found = half.update(batch)
    for name in ("train/policy_loss", "train/value_loss", "train/ratio"):
        assert found[name] == pytest.approx(expected[name], rel=0.02, abs=0.01), name
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=0.05)


# --------------------------------------------------------------------------------------------------- the loop


def test_evaluate_measures_every_prompt_and_the_distance_to_the_start(run_dir: Path) -> None:
    seen: list[str] = []

    def metric(prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        seen.extend(prompts)
        return {"length": [len(output) for output in outputs], "half": 0.5}

    trainer = ppo_trainer(run_dir, metric_fn=metric, eval_prompts=["a", "bc"])
    metrics = trainer.evaluate(repeats=3)
    assert sorted(seen) == ["a"] * 3 + ["bc"] * 3
    assert metrics["eval/kl"] == 0.0 and metrics["eval/half"] == 0.5
    assert 0 <= metrics["eval/length"] <= 5 and 0 <= metrics["eval/reward"] <= 5
    shake(trainer.policy, 0.1)
    assert trainer.evaluate(repeats=20)["eval/kl"] > 0.05


def test_fit_learns_the_reward_and_saves(run_dir: Path) -> None:
    trainer = ppo_trainer(
        run_dir,
        ppo={
            "rollouts_per_step": 16,
            "epochs": 2,
            "minibatches": 2,
            "kl": {"coef": 0.01},
            "forward_batch_size": 32,
        },
        train={"total_steps": 8, "eval_every": 8, "eval_repeats": 8, "max_grad_norm": 1.0},
        optimizer={"learning_rate": 5e-3},
    )
    assert trainer.fit() == run_dir
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert rewards[-1] > rewards[0] + 1
    saved = GPT2LMHeadModel.from_pretrained(run_dir / "checkpoints" / "step_8")
    assert torch.equal(parameters(saved), parameters(trainer.policy.lm))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"ppo": {"rollouts_per_step": 8, "minibatches": 3}},
            ConfigError,
            r"= 8 .* 8 rows.*`ppo.minibatches` = 3",
        ),
        (
            {"ppo": {"rollouts_per_step": 8, "minibatches": 2}, "train": {"gradient_accumulation_steps": 3}},
            ConfigError,
            r"`ppo.rollouts_per_step` = 8 .*= 2 times `train.gradient_accumulation_steps` = 3",
        ),
        (
            {"generation": {"max_new_tokens": 16}},
            ConfigError,
            r"`generation.max_new_tokens` = 16 .* of 16",
        ),
        (
            {"eval_generation": {"temperature": [0.5, 0.0]}},
            ConfigError,
            r"(?s)`eval_generation`.*`temperature`.*greater than 0",
        ),
        (
            {"eval_generation": {"temperature": [0.5], "top_k": [1]}},
            ConfigError,
            r"only one key may be a list, not both `temperature` and `top_k`",
        ),
        ({"generation": {"temperature": [0.5, 1.0]}}, ConfigError, r"`generation\.temperature`"),
        ({"shaping": {"reference_std": 2.0}}, ConfigError, r"`reference_std` needs `scaling: reference`"),
        ({"prompts": []}, DataError, "empty"),
        ({"prompts": ["a" * 12]}, DataError, r"prompt 0 has 12"),
        (
            {"prompts": [{"prompt": "a", "answer": "b"}], "reward_fn": lambda samples, prompts, outputs: []},
            ConfigError,
            "answer",
        ),
        ({"tokenizer": char_tokenizer("abcdefghijkl")}, ModelError, r"pad token has id 12.* ends at 10"),
    ],
)
def test_bad_settings_are_refused_before_training(
    run_dir: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ppo_trainer(run_dir, **settings)


def test_a_tokenizer_without_pad_gets_one_and_the_users_stays_as_it_is(run_dir: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = None
    trainer = ppo_trainer(run_dir, tokenizer=tokenizer)
    assert trainer.tokenizer.pad_token == "<pad>" and tokenizer.pad_token is None
