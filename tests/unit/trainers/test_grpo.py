"""Real GRPO trainers of a tiny policy: what a step must be, against unpadded float64 loops."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from conch.config import load
from conch.errors import ConfigError
from conch.losses import LossForm, token_weights
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.training.kl import kl_before_update
from conch.training.logprobs import pack
from conch.types import Rollout
from tests.runs import (
    LINEAR_ADAM,
    PROMPTS,
    batch_and_metrics,
    batch_of,
    grpo_trainer,
    letters_rollout,
    parameters,
    policy,
    scored,
    shake,
)

ROLLOUTS = [
    letters_rollout("ab", "bcd"),
    letters_rollout("ab", "e"),
    letters_rollout("ab", "ghabc", "length"),
    letters_rollout("ab", "", "stop"),
    letters_rollout("h", "aa", "stop"),
    letters_rollout("h", "hg"),
    letters_rollout("h", "abcd"),
    letters_rollout("h", "f", "length"),
]
SCORES = (1.0, -2.0, 0.5, 9.0, 0.0, 1.5, None, 2.0)
FORMS: tuple[LossForm, ...] = ("grpo", "dr_grpo", "dapo", "gspo")
CLIPS = {"clip_low": 0.1, "clip_high": 0.3}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def token_logprobs(lm: GPT2LMHeadModel, rollout: Rollout) -> torch.Tensor:
    """Log-probs of a completion from a forward pass of this one sample, without padding, in float64."""
    prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
    with torch.no_grad():
        logits = copy.deepcopy(lm).double()(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logprobs = logits.log_softmax(-1)
    return torch.stack(
        [logprobs[len(prompt) - 1 + place, token] for place, token in enumerate(completion)]
        or [torch.zeros((), dtype=torch.float64)]
    )[: len(completion)]


def loss_by_loop(
    form: LossForm,
    new: GPT2LMHeadModel,
    old: GPT2LMHeadModel,
    kl_coef: float,
    longest: int,
    correct: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like,
) -> float:
    """The loss as the papers write it, sample by sample; the reference is the old policy.

    correct: weights of a response's tokens, from old over sampling probabilities; the latter are all 1/e.
    """
    used = [
        row for row, score in enumerate(SCORES) if score is not None and ROLLOUTS[row].completion.token_ids
    ]
    num_tokens = sum(len(ROLLOUTS[row].completion.token_ids) for row in used)
    total = 0.0
    for row in used:
        group = [SCORES[other] for other in used if other // 4 == row // 4]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((score - mean) ** 2 for score in group) / (len(group) - 1))
        advantage = (SCORES[row] - mean) / (1.0 if form == "dr_grpo" else std)
        log_ratio = token_logprobs(new, ROLLOUTS[row]) - token_logprobs(old, ROLLOUTS[row])
        if form == "gspo":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.exp()
        gain = torch.minimum(advantage * ratio, advantage * ratio.clamp(0.9, 1.3))
        gain = gain * correct((token_logprobs(old, ROLLOUTS[row]) + 1.0).exp())
        to_reference = token_logprobs(old, ROLLOUTS[row]) - token_logprobs(new, ROLLOUTS[row])
        terms = kl_coef * (to_reference.exp() - 1 - to_reference) - gain
        per = {"dapo": num_tokens, "dr_grpo": len(used) * longest}.get(form, len(used) * len(ratio))
        total += float(terms.sum()) / per
    return total


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_that_of_the_paper(run_dir: Path, form: LossForm) -> None:
    old = policy()
    trainer = grpo_trainer(
        run_dir,
        lm=policy(),
        grpo={"loss": form, **CLIPS, "epochs": 2, "kl": {"coef": 0.5, "estimator": "k3"}},
    )
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    shake(trainer.policy.lm, 0.1, seed=5)
    mask = batch.loss_mask
    shares = mask.float() / mask.sum()
    loss, stats = trainer._loss(batch, token_weights(mask, form, 5), shares)
    assert float(stats["train/clip_fraction"]) > 0  # the clip is part of what is compared
    assert loss.item() == pytest.approx(loss_by_loop(form, trainer.policy.lm, old, 0.5, longest=5), abs=1e-5)


CORRECTIONS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "truncate": ({"kind": "truncate", "cap": 1.2}, lambda ratio: ratio.clamp(max=1.2)),
    "mask": ({"kind": "mask", "high": 1.5}, lambda ratio: ratio * ((ratio >= 0.5) & (ratio <= 1.5))),
    "sequence": (
        {"kind": "truncate", "level": "sequence"},
        lambda ratio: ratio.prod().clamp(max=2.0).expand_as(ratio),
    ),
    "geometric": (
        {"kind": "mask", "level": "geometric", "low": 0.9},
        lambda ratio: (mean := ratio.log().mean().exp().expand_as(ratio)) * (mean >= 0.9) * (mean <= 5.0),
    ),
}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *(("grpo", name) for name in CORRECTIONS),
        *(("dapo", "mask"), ("dr_grpo", "sequence"), ("gspo", "sequence"), ("gspo", "geometric")),
    ],
)
def test_corrected_loss_has_two_ratios(run_dir: Path, form: LossForm, name: str) -> None:
    """pi / pi_old is clipped as ever; pi_old / pi_sampler weighs, and the KL stands apart."""
    settings, correct = CORRECTIONS[name]
    grpo = {"loss": form, **CLIPS, "correction": settings, "kl": {"coef": 0.5}}
    trainer = grpo_trainer(run_dir, lm=policy(), grpo=grpo)
    old = policy()
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    shake(trainer.policy.lm, 0.1, seed=5)
    loss, _ = trainer._loss(batch, token_weights(batch.loss_mask, form, 5), batch.loss_mask.float())
    new, plain = trainer.policy.lm, loss_by_loop(form, trainer.policy.lm, old, 0.5, longest=5)
    assert loss.item() == pytest.approx(loss_by_loop(form, new, old, 0.5, 5, correct), abs=1e-5)
    assert abs(loss.item() - plain) > 1e-3, "the weights change something"


@pytest.mark.parametrize("form", FORMS)
def test_first_minibatch_is_on_policy(run_dir: Path, form: LossForm) -> None:
    grpo = {"loss": form, "epochs": 2, "minibatches": 2}
    trainer = grpo_trainer(
        run_dir, grpo=grpo, optimizer={"learning_rate": 0.01}, generation={"temperature": 0.7}
    )
    metrics = trainer.step()
    assert metrics["train/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["train/approx_kl_first"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["train/clip_fraction_first"] == 0.0
    assert metrics["policy/kl"] == 0.0
    # Later minibatches are not: the figures above say something.
    assert metrics["train/approx_kl"] > 1e-5 and 0 < metrics["train/effective_sample_size"] < 1


@pytest.mark.parametrize("form", FORMS)
def test_accumulation_changes_nothing(tmp_path: Path, form: LossForm) -> None:
    found = []
    for steps in (1, 2, 4):
        trainer = grpo_trainer(
            tmp_path / str(steps),
            grpo={"loss": form},
            train={"gradient_accumulation_steps": steps},
            optimizer=LINEAR_ADAM,
        )
        trainer.update(batch_of(trainer, ROLLOUTS, scored(*SCORES)))
        found.append(parameters(trainer.policy.lm))
    assert not torch.equal(found[0], parameters(policy()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-10)


def test_samples_without_reward_or_tokens_are_left_out(run_dir: Path) -> None:
    batch = batch_of(grpo_trainer(run_dir), ROLLOUTS, scored(*SCORES))
    assert [bool(row.any()) for row in batch.loss_mask] == [True, True, True, False, True, True, False, True]
    assert batch.advantages[3] == batch.advantages[6] == 0.0
    assert float(batch.advantages[:3].sum()) == pytest.approx(0.0, abs=1e-6)


def test_completions_of_a_prompt_stand_together(run_dir: Path) -> None:
    trainer = grpo_trainer(run_dir)
    rollouts = trainer.rollout(trainer.prompts[:3])
    assert [rollout.prompt.text for rollout in rollouts] == [text for text in PROMPTS[:3] for _ in range(4)]
    assert len({rollout.completion.text for rollout in rollouts}) > 3
    assert len(trainer.score(rollouts)) == 12


def test_kl_in_the_rewards_is_compared_with_them(run_dir: Path) -> None:
    kl = {"coef": 0.5, "placement": "reward", "estimator": "k1"}
    trainer = grpo_trainer(run_dir, grpo={"kl": kl, "advantage": "group_mean"})
    start = policy()
    shake(trainer.policy.lm, 0.1, seed=5)
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    totals = [
        score
        - 0.5 * float((token_logprobs(trainer.policy.lm, rollout) - token_logprobs(start, rollout)).sum())
        for rollout, score in zip(ROLLOUTS[:3], SCORES[:3], strict=True)
    ]
    mean = sum(totals) / 3
    assert batch.advantages[:3].tolist() == pytest.approx([total - mean for total in totals], abs=1e-4)


def test_without_a_kl_there_is_no_reference(run_dir: Path) -> None:
    trainer = grpo_trainer(run_dir, grpo={"kl": {"coef": 0.0}})
    assert trainer.reference is None
    assert {"policy/kl", "policy/kl_coef", "train/kl_loss"}.isdisjoint(trainer.step())
    assert "eval/kl" not in trainer.evaluate()


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_a_steps_only_update_finds_the_old_log_probs_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kl_coef: float
) -> None:
    found = []
    for passes_first in (True, False):
        trainer = grpo_trainer(
            tmp_path / str(passes_first),
            grpo={"kl": {"coef": kl_coef, "target": 1.0} if kl_coef else {"coef": 0.0}},
            rollout={"logprob_diff_alarm": 0.1},
            optimizer=LINEAR_ADAM,
            train={"gradient_accumulation_steps": 2},
        )
        assert not trainer.computes_old_logprobs
        monkeypatch.setattr(GRPOTrainer, "computes_old_logprobs", passes_first)
        shake(trainer.policy.lm, 0.1, seed=5)
        calls: list[bool] = []
        trainer.policy.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))  # noqa: B023
        batch, metrics = batch_and_metrics(trainer, ROLLOUTS, scored(*[0.0, 1.0, 0.0, 2.0] * 2))
        with caplog.at_level(logging.WARNING):
            metrics |= trainer.update(batch)
        assert calls == [False] * 3 * passes_first + [True] * 2
        of_batch = (batch.old_logprobs, batch.ref_logprobs, batch.sequences)
        shown = kl_before_update(*of_batch, cuts=False)
        assert (kl_before_update(*of_batch, cuts=True) is None) == (kl_coef == 0.0 or not passes_first)
        assert (shown is None) == (kl_coef == 0.0)
        if shown is not None and passes_first:
            assert metrics["policy/kl"] == pytest.approx(float(shown.mean())) != 0.0
        if shown is not None and not passes_first:
            drawn_under = torch.tensor([sum(rollout.completion.logprobs) for rollout in ROLLOUTS])
            torch.testing.assert_close(shown, drawn_under - batch.ref_logprobs.sum(dim=1))
        found.append((parameters(trainer.policy.lm), metrics, trainer.kl_controller.coef))
        monkeypatch.undo()
    (first, metrics_first, coef_first), (alone, metrics_alone, coef_alone) = found
    torch.testing.assert_close(alone, first, rtol=0, atol=1e-10)
    assert not torch.equal(alone, parameters(policy()))
    # What the sampler's weights are worth is known before an update only.
    measured = {name: value for name, value in metrics_first.items() if name in metrics_alone}
    known_first = metrics_first.keys() - measured.keys()
    assert all(re.search("importance_ratio|effective_sample_size", name) for name in known_first)
    assert metrics_alone == pytest.approx(measured, abs=1e-5)
    assert coef_alone == pytest.approx(coef_first, rel=1e-6) and (coef_alone != kl_coef) == bool(kl_coef)
    assert metrics_alone["rollout/logprob_diff"] > 0.1 and metrics_alone["policy/entropy"] > 0.1
    assert [
        text for text in caplog.messages if "`rollout.logprob_diff_alarm` = 0.1" in text
    ] == caplog.messages
    assert len(caplog.messages) == 2


@pytest.mark.usefixtures("fresh_accelerate")
def test_logits_are_not_copied_to_float32_under_mixed_precision(run_dir: Path) -> None:
    trainer = grpo_trainer(run_dir, lm=policy().float(), train={"mixed_precision": "bf16"})
    sequences = trainer.compute_logprobs(ROLLOUTS).sequences
    output = trainer.engine.module(pack(trainer.packer, sequences).inputs)
    assert output.logits.dtype == torch.bfloat16
    metrics = trainer.step()
    assert metrics["rollout/logprob_diff"] < 0.05 and metrics["train/grad_norm"] > 0


def test_evaluation_measures_the_policys_distance_where_steps_make_no_pass_of_it(run_dir: Path) -> None:
    trainer = grpo_trainer(run_dir, grpo={"kl": {"coef": 0.3}})
    assert not trainer.computes_old_logprobs
    shake(trainer.policy.lm, 0.1, seed=5)
    assert trainer.evaluate()["eval/kl"] > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"grpo": {"kl": {"coef": 0.1}}, "model": {"num_layers_unfrozen": 1}},
        {"grpo": {"kl": {"coef": 0.1, "placement": "reward"}}},
        {"grpo": {"epochs": 2}},
        {"grpo": {"minibatches": 2}},
        {"grpo": {"correction": {"kind": "mask"}}},
        {"model": {"disable_dropout": False}},
    ],
)
def test_old_log_probs_come_first_where_something_needs_them(run_dir: Path, settings: dict[str, Any]) -> None:
    settings = {**settings, "grpo": {"kl": {"coef": 0.0}, **settings.get("grpo", {})}}
    trainer = grpo_trainer(run_dir, **settings)
    assert batch_of(trainer, ROLLOUTS, scored(*SCORES)).old_logprobs is not None


def test_long_responses_are_penalised_before_they_are_compared(run_dir: Path) -> None:
    trainer = grpo_trainer(
        run_dir, grpo={"overlong_buffer": 2, "overlong_penalty": 4.0, "advantage": "group_mean"}
    )
    batch = batch_of(trainer, ROLLOUTS, scored(*[0.0] * 8))
    # Of "bcd" and eos (4 tokens), "e" and eos, and "ghabc" (5): less 2, 0 and 4.
    assert batch.advantages[:3].tolist() == pytest.approx([0.0, 2.0, -2.0])


def test_groups_without_spread_are_replaced(run_dir: Path) -> None:
    """Only completions of "a" and "bc" differ in reward."""

    def reward(prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
        return [float(number) * (prompt in ("a", "bc")) for number, prompt in enumerate(prompts)]

    def sampled(max_resamples: int) -> tuple[list[str], dict[str, float]]:
        trainer = grpo_trainer(
            run_dir.with_name(f"resamples_{max_resamples}"),
            reward_fn=reward,
            grpo={"max_resamples": max_resamples},
        )
        seconds: dict[str, float] = {}
        rollouts, rewards, resamples = trainer._sample_groups(seconds)
        assert len(rollouts) == len(rewards) == 8 and seconds["time/rollout_s"] > 0
        _, metrics = batch_and_metrics(trainer, rollouts, rewards)
        return [rollout.prompt.text for rollout in rollouts[::4]], {**metrics, "resamples": resamples}

    once, metrics = sampled(0)
    assert set(once) != {"a", "bc"} and metrics["grpo/frac_reward_zero_std"] > 0 and metrics["resamples"] == 0
    often, metrics = sampled(7)
    assert (
        set(often) <= {"a", "bc"}
        and metrics["grpo/frac_reward_zero_std"] == 0.0
        and 0 < metrics["resamples"] <= 3
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_groups_without_spread_fill_up_where_resamples_run_out(run_dir: Path, micro_batches: int) -> None:
    trainer = grpo_trainer(
        run_dir,
        reward_fn=lambda outputs, **_: [1.0] * len(outputs),
        grpo={"max_resamples": 1, "forward_batch_size": 8 // micro_batches},
        train={"gradient_accumulation_steps": micro_batches},
    )
    before = parameters(trainer.policy.lm)
    metrics = trainer.step()
    assert metrics["grpo/resamples"] == 1 and metrics["grpo/frac_reward_zero_std"] == 1.0
    # Nothing to learn, and the KL is exactly 0: policy and reference read the same rows in the same batches.
    assert torch.equal(parameters(trainer.policy.lm), before)


def test_importance_ratios_are_measured_with_and_without_a_correction(run_dir: Path) -> None:
    grpo = {"epochs": 2}
    metrics = grpo_trainer(run_dir, grpo=grpo).step()
    for level in ("", "sequence_"):
        for name in ("effective_sample_size", "importance_ratio_mean", "importance_ratio_max"):
            assert metrics[f"rollout/{level}{name}"] == pytest.approx(1.0, abs=1e-4)
    assert not [name for name in metrics if "cut_fraction" in name]
    correction = {"kind": "truncate", "cap": 1.2}
    trainer = grpo_trainer(run_dir.with_name("corrected"), grpo={"correction": correction})
    # These claim that the sampler gave each token a log-probability of -2.5.
    claimed = [
        replace(each, completion=replace(each.completion, logprobs=(-2.5,) * len(each.completion.token_ids)))
        for each in ROLLOUTS
    ]
    batch, metrics = batch_and_metrics(trainer, claimed, scored(*SCORES))
    expected = (batch.old_logprobs + 2.5).exp().clamp(max=1.2)
    torch.testing.assert_close(batch.correction[batch.loss_mask], expected[batch.loss_mask])
    assert 0 < metrics["rollout/importance_ratio_cut_fraction"] < 1 < metrics["rollout/importance_ratio_max"]
    cut = grpo_trainer(run_dir.with_name("cut"), grpo=grpo, generation={"top_k": 3}).step()
    assert "rollout/logprob_diff" in cut and "rollout/effective_sample_size" not in cut


@pytest.mark.parametrize("passes_first", [True, False])
@pytest.mark.parametrize(
    ("ages", "wrong", "said"),
    [
        ((0, 2), 2, None),
        ((0, 2), 0, "sampled from another distribution"),
        ((1, 3), 1, "the newest samples of this step are 1 update old"),
        ((1, 3), 3, None),
        ((3, 3), 3, "the newest samples of this step are 3 updates old"),
    ],
)
def test_alarm_goes_by_the_newest_samples(
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    passes_first: bool,
    ages: tuple[int, int],
    wrong: int,
    said: str | None,
) -> None:
    """Each group has an age; the sampler of one of them is off by a nat."""
    trainer = grpo_trainer(
        run_dir,
        grpo={"epochs": 2 if passes_first else 1, "kl": {"coef": 0.0}},
        rollout={"logprob_diff_alarm": 0.5},
    )
    trainer.policy_version = 7
    sampled: list[Rollout] = []
    for row, each in enumerate(ROLLOUTS):
        age = ages[row // 4]
        true = token_logprobs(trainer.policy.lm, each) - float(age == wrong)
        completion = replace(each.completion, logprobs=tuple(true.tolist()))
        sampled.append(replace(each, completion=completion, policy_version=7 - age))
    with caplog.at_level(logging.WARNING):
        batch, metrics = batch_and_metrics(trainer, sampled, scored(*SCORES))
        assert (batch.old_logprobs is not None) == passes_first
        metrics |= trainer.update(batch)
    assert 0.3 < metrics["rollout/logprob_diff"] <= 1.001, "of all samples"
    assert not [name for name in metrics if name.startswith("newest")]
    assert len(caplog.messages) == (said is not None)
    if said is not None:
        assert said in caplog.messages[0] and "1 nats a token" in caplog.messages[0]


def test_log_probs_are_computed_while_rewards_are_under_way(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    trainer = grpo_trainer(
        run_dir, reward_fn=lambda outputs, **_: [float(looked.wait(30.0)) for _ in outputs]
    )
    compute = trainer.compute_logprobs
    monkeypatch.setattr(
        trainer,
        "compute_logprobs",
        lambda rollouts: (compute(rollouts), looked.set())[0],
    )
    assert trainer.step()["reward/mean"] == 1.0, "rewards were waited for before"


def test_letters_are_learned(run_dir: Path) -> None:
    trainer = grpo_trainer(
        run_dir,
        grpo={
            "prompts_per_step": 8,
            "group_size": 8,
            "minibatches": 2,
            "kl": {"coef": 0.0},
            "forward_batch_size": 32,
        },
        optimizer={"learning_rate": 0.01},
        train={"total_steps": 25, "eval_every": 25, "eval_repeats": 8},
    )
    trainer.fit()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/reward"] < 2 and rows[-1]["eval/reward"] > 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grpo": {"group_size": 1}}, "`group_size` = 1 leaves nothing to compare with: take at least 2"),
        ({"grpo": {"loss": "dr_grpo", "advantage": "group_std"}}, "divides by no standard deviation"),
        (
            {"grpo": {"correction": {"kind": "truncate"}}, "generation": {"top_p": 0.9}},
            "`grpo.correction` compares whole distributions",
        ),
        (
            {"grpo": {"overlong_buffer": 9}, "generation": {"max_new_tokens": 8}},
            "`grpo.overlong_buffer` = 9 is longer than `generation.max_new_tokens` = 8",
        ),
        ({"grpo": {"loss": "gpro"}}, "grpo.loss"),
        (
            {"grpo": {"loss": "gspo", "correction": {"kind": "truncate"}}},
            "`grpo`: `correction.level: token` weighs each token, `loss: gspo` knows whole responses only: ",
        ),
        ({"grpo": {"correction": {"kind": "tis"}}}, "`grpo.correction.kind`: Input should be 'none', 'trunc"),
        ({"grpo": {"correction": "truncate"}}, "did you mean `grpo.correction.kind=truncate`"),
        ({"grpo": {"correction": {"cap": 3.0}}}, "`cap` is a bound of `kind: truncate`, but `kind` is none"),
        ({"grpo": {"correction": {"kind": "truncate", "low": 0.1}}}, "`low` is a bound of `kind: mask`, but"),
        (
            {"grpo": {"correction": {"kind": "mask", "low": 7.0}}},
            "no weight lies between `low` = 7 and `high` = 5",
        ),
        ({"grpo": {"importance_sampling_cap": 2.0}}, "did you mean `grpo.correction.cap`"),
        (
            {"grpo": {"prompts_per_step": 512, "group_size": 16, "kl": {"target": 1.0, "horizon": 1000}}},
            r"`kl.horizon` = 1000 is shorter than `prompts_per_step` \* `group_size` = 8192: one step could",
        ),
        ({"grpo": {"kl": {"coef": 0.0, "target": 1.0}}}, "from 0 it never moves: start above 0"),
        (
            {"grpo": {"kl": {"target": 1.0}}, "generation": {"top_k": 5}},
            "`grpo.kl.target` steers by the KL .* cut by `generation.top_k` or `top_p` do not measure",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(GRPORunConfig, {"model": {"path": "gpt2"}, **settings})


def test_a_batch_that_does_not_come_out_whole_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"group_size` = 8 gives .* into `grpo\.minibatches` = 3"):
        grpo_trainer(run_dir, grpo={"minibatches": 3})


def test_dr_grpo_takes_the_mean_alone_by_itself(run_dir: Path) -> None:
    trainer: GRPOTrainer = grpo_trainer(run_dir, grpo={"loss": "dr_grpo"})
    batch = batch_of(trainer, ROLLOUTS, scored(*SCORES))
    mean = (1.0 - 2.0 + 0.5) / 3
    assert batch.advantages[:3].tolist() == pytest.approx([1.0 - mean, -2.0 - mean, 0.5 - mean])
