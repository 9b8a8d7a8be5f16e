"""Real ILQL trainers of a tiny policy: losses against an unpadded loop, evaluation, what is refused."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from conch.data.files import Rows
from conch.errors import ConfigError, DataError, ModelError
from conch.models.ilql import ILQLPolicy
from conch.models.policy import captured_head_input
from conch.runs.checkpoint import steps_of
from conch.trainers.ilql import ILQLTrainer
from tests.numerics import network_rounding
from tests.runs import EOS, LINEAR_ADAM, PAD, TOKENIZER, ilql_trainer, parameters, policy

SAMPLES = ["abc", ("ab", "cdefg"), ["a", "bc", "def", "gh"], ("hg", "")]
REWARDS = [1.0, -0.5, 2.0, 0.25]
# Token ids of each sample, and the positions of its actions.
IDS = [[0, 1, 2, EOS], [0, 1, 2, 3, 4, 5, 6, EOS], [0, 1, 2, 3, 4, 5, 6, 7, EOS], [7, 6, EOS]]
ACTIONS = [[1, 2, 3], [2, 3, 4, 5, 6, 7], [1, 2, 6, 7, 8], [2]]
NUM_ACTIONS = 3 + 6 + 5 + 1
RAW = {"batch_size": 4, "normalise_rewards": False, "gamma": 0.9, "tau": 0.8, "awac_beta": 0.3}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def paper_parts(made: ILQLPolicy, rewards: Sequence[float]) -> dict[str, torch.Tensor]:
    """The four losses in float64, sample by sample without padding and action by action; gamma 0.9, tau 0.8,
    eta 0.3."""
    sums = dict.fromkeys(("q_loss", "v_loss", "cql_loss", "awac_loss"), torch.zeros((), dtype=torch.float64))
    for ids, positions, reward in zip(IDS, ACTIONS, rewards, strict=True):
        with captured_head_input(made.lm) as captured:
            logits = made.lm(input_ids=torch.tensor([ids])).logits[0]
        states = captured[0][0]
        for number, now in enumerate(positions):
            state, action = states[now - 1], ids[now]
            value = made.value_head(state)[0]
            target = torch.tensor(reward, dtype=torch.float64)
            if number + 1 < len(positions):
                target = 0.9 * made.value_head(states[positions[number + 1] - 1])[0].detach()
            for head in made.q_heads:
                scores = head(state)
                sums["q_loss"] = sums["q_loss"] + (target - scores[action]) ** 2
                sums["cql_loss"] = sums["cql_loss"] + scores.exp().sum().log() - scores[action]
            least = min(head(state)[action].detach() for head in made.target_q_heads)
            advantage = least - value
            sums["v_loss"] = sums["v_loss"] + (0.8 if advantage >= 0 else 0.2) * advantage**2
            log_pi = logits[now - 1][action] - logits[now - 1].exp().sum().log()
            sums["awac_loss"] = sums["awac_loss"] - (0.3 * advantage.detach()).exp() * log_pi
    return {name: total / NUM_ACTIONS for name, total in sums.items()}


def total_of(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss with the weights of the test below."""
    return 2 * parts["q_loss"] + 3 * parts["v_loss"] + 0.1 * parts["cql_loss"] + parts["awac_loss"]


def test_update_is_adam_on_the_losses_of_the_paper(run_dir: Path) -> None:
    settings: dict[str, Any] = {"ilql": {**RAW, "q_coef": 2.0, "v_coef": 3.0, "steps_for_target_q_sync": 2}}
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, optimizer=LINEAR_ADAM, **settings)
    trainer.policy.double()
    start = copy.deepcopy(trainer.policy)
    parts = paper_parts(start, REWARDS)
    total_of(parts).backward()
    metrics = trainer.step()

    for name, part in parts.items():
        assert metrics[f"train/{name}"] == pytest.approx(float(part.detach()), rel=1e-6)
    assert metrics["train/loss"] == pytest.approx(float(total_of(parts).detach()), rel=1e-6)
    # Adam's first step is lr * g / (|g| + eps), with lr 0.1 and eps 1.
    for (name, moved), old in zip(trainer.policy.named_parameters(), start.parameters(), strict=True):
        if name.startswith("target_q_heads."):
            assert torch.equal(moved, old)
            continue
        assert old.grad is not None, name
        expected = old.detach() - 0.1 * old.grad / (old.grad.abs() + 1.0)
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-7, atol=1e-9)


def test_accumulation_of_unequal_micro_batches_equals_one_batch(run_dir: Path) -> None:
    found = []
    for steps in (1, 2, 4):
        trainer = ilql_trainer(
            run_dir / str(steps),
            SAMPLES,
            REWARDS,
            ilql=RAW,
            optimizer=LINEAR_ADAM,
            train={
                "run_dir": run_dir / str(steps),
                "max_grad_norm": 1e6,
                "gradient_accumulation_steps": steps,
            },
        )
        trainer.policy.double()
        metrics = trainer.step()
        metrics.pop("train/epoch")
        found.append((parameters(trainer.policy), metrics))
    for weights, metrics in found[1:]:
        torch.testing.assert_close(weights, found[0][0], rtol=1e-10, atol=1e-12)
        assert metrics == pytest.approx(found[0][1], rel=1e-6)


def test_frozen_trunk_stays_and_heads_learn(run_dir: Path) -> None:
    model = {"architecture": {"model_type": "gpt2"}, "num_layers_unfrozen": 1}
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, model=model)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    trainer.step()
    moved = {name for name, p in trainer.policy.named_parameters() if not torch.equal(p, before[name])}

    assert "lm.transformer.h.0.mlp.c_fc.weight" not in moved and "lm.transformer.wte.weight" not in moved
    assert {"lm.transformer.h.1.mlp.c_fc.weight", "q_heads.0.out.weight", "value_head.out.weight"} <= moved


def test_adapter_and_heads_learn_and_are_saved_whole(run_dir: Path, tmp_path: Path) -> None:
    model = {
        "architecture": {"model_type": "gpt2"},
        "peft_config": {"r": 2, "target_modules": ["c_attn"]},
        "merge_adapter": True,
    }
    trainer = ilql_trainer(
        run_dir,
        SAMPLES,
        REWARDS,
        lm=policy(dtype=torch.float32),
        model=model,
        optimizer={"learning_rate": 1e-2},
    )
    trained = {name for name, p in trainer.policy.named_parameters() if p.requires_grad}
    for _ in range(3):
        trainer.step()
    loaded = ILQLPolicy.from_pretrained(trainer.save_pretrained(tmp_path / "saved"))
    batch = trainer.experience(trainer.samples, trainer.rewards).turns
    inputs = (batch.input_ids, batch.attention_mask, batch.num_response)
    expected, found = trainer.policy(*inputs), loaded(*inputs)

    assert all("lora" in name for name in trained if name.startswith("lm."))
    assert {"q_heads.1.out.weight", "value_head.out.weight"} < trained
    for one, wanted in ((found.logits, expected.logits), (found.target_q, expected.target_q)):
        torch.testing.assert_close(one, wanted, rtol=0, atol=network_rounding(wanted))


def test_targets_follow_every_few_updates(run_dir: Path) -> None:
    trainer = ilql_trainer(
        run_dir, SAMPLES, REWARDS, ilql={**RAW, "alpha": 0.5, "steps_for_target_q_sync": 3}
    )
    target, online = (heads[0].out.bias for heads in (trainer.policy.target_q_heads, trainer.policy.q_heads))
    start = target.detach().clone()
    for _ in range(2):
        trainer.step()
    assert torch.equal(target, start)
    trainer.step()
    torch.testing.assert_close(target, 0.5 * start + 0.5 * online.detach())


def test_rewards_are_normalised_over_the_whole_dataset(run_dir: Path) -> None:
    trainer = ilql_trainer(run_dir, SAMPLES, [1.0, 2.0, 3.0, 6.0])
    assert trainer.rewards == pytest.approx([-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 3 / 3.5**0.5])


# ------------------------------------------------------------------------------------ evaluation and decoding


def spelling(samples: Sequence[str], outputs: Sequence[str], **_: Any) -> dict[str, list[float]]:
    return {"length": [float(len(output)) for output in outputs]}


def teach_to_end(trainer: ILQLTrainer) -> None:
    """Make the heads, and them alone, say that eos is the best of all tokens."""
    with torch.no_grad():
        for head in [*trainer.policy.target_q_heads, trainer.policy.value_head]:
            head.out.weight.zero_()
            head.out.bias.zero_()
        for head in trainer.policy.target_q_heads:
            head.out.bias[EOS] = 1.0


def test_each_beta_is_evaluated_and_the_last_one_names_the_rest(run_dir: Path) -> None:
    trainer = ilql_trainer(
        run_dir,
        SAMPLES,
        REWARDS,
        eval_prompts=["a", "bc"],
        metric_fn=spelling,
        reward_fn=lambda outputs, **_: [10.0 * len(output) for output in outputs],
        eval_generation={"beta": [0, 1, 100]},
        train={"run_dir": run_dir, "eval_repeats": 50},
    )
    teach_to_end(trainer)
    metrics = trainer.evaluate()

    assert metrics["eval/length@beta=100"] == 0.0 == metrics["eval/length"]
    assert metrics["eval/length@beta=0"] > metrics["eval/length@beta=1"] > 0.5
    assert metrics["eval/reward@beta=0"] == pytest.approx(10 * metrics["eval/length@beta=0"])
    assert trainer.default_best_metric == "eval/length"


def test_generate_takes_another_beta(run_dir: Path) -> None:
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, generation={"max_new_tokens": 5, "beta": 100})
    teach_to_end(trainer)

    assert trainer.generate(["a"] * 20) == [""] * 20 == trainer.generate(["a"] * 20, greedy=True)
    assert len("".join(trainer.generate(["a"] * 20, beta=0.0))) > 20


def test_logit_mask_holds_in_evaluation(run_dir: Path) -> None:
    size = len(TOKENIZER)
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[torch.arange(size), (torch.arange(size) + 1) % size] = False
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, logit_mask=mask)
    assert trainer.generate(["a", "bc"]) == ["bcdef", "defgh"]


def test_without_prompts_nothing_is_evaluated_and_no_window_is_asked_for(run_dir: Path) -> None:
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, generation={"max_new_tokens": 1000})
    assert trainer.evaluate() == {}


def test_a_server_that_only_the_environment_names_is_not_asked(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_HOST", "localhost:1/nobody")
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, eval_prompts=["a"], metric_fn=spelling)
    assert set(trainer.evaluate()) == {"eval/length", "eval/length_mean"}


def test_saved_folder_generates_what_the_trainer_does(run_dir: Path, tmp_path: Path) -> None:
    generation = {"max_new_tokens": 6, "beta": 2.5, "top_k": 5, "temperature": 0.8}
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, generation=generation)
    loaded = ILQLPolicy.from_pretrained(trainer.save_pretrained(tmp_path / "saved"))
    prompts = torch.arange(8).unsqueeze(1)
    torch.manual_seed(5)
    expected = trainer.generate(["a", "b", "c", "d", "e", "f", "g", "h"])
    torch.manual_seed(5)
    ids = loaded.generate(prompts, torch.ones_like(prompts))
    found = TOKENIZER.batch_decode(ids[:, 1:], skip_special_tokens=True)

    assert found == expected and len(set(found)) > 4
    assert loaded.decoding == {**generation, "top_p": 1.0, "eos_token_id": [EOS], "pad_token_id": PAD}


# ---------------------------------------------------------------------------------------------------- the run


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def make(folder: Path, **train: Any) -> ILQLTrainer:
        return ilql_trainer(
            folder,
            [*SAMPLES, "hgfa", ("c", "ba"), "dd"],
            [*REWARDS, 0.0, 1.0, -1.0],
            ilql={"batch_size": 4, "alpha": 0.3, "steps_for_target_q_sync": 3},
            optimizer={"learning_rate": 5e-3},
            scheduler={"name": "cosine"},
            eval_prompts=["a", "bc"],
            metric_fn=spelling,
            train={"run_dir": folder, "total_steps": 6, "eval_every": 2, "save_every": 2, **train},
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make(whole).fit()
    make(cut).fit()
    for saved, folder in steps_of(cut).items():
        if saved > 2:
            for file in sorted(folder.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            folder.rmdir()
    resumed = make(cut, resume="auto")
    assert resumed.run.step == 2
    resumed.fit()

    assert (cut / "metrics.jsonl").read_text().count("\n") == 7
    rows = [
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, cut)
    ]
    assert rows[0] == rows[1]
    for name in ("model.safetensors", "heads.safetensors"):
        saved = [(folder / "checkpoints/step_6" / name).read_bytes() for folder in (whole, cut)]
        assert saved[0] == saved[1]


def test_learns_which_letter_is_rewarded(run_dir: Path) -> None:
    """Samples go on with any letter; only `c` is rewarded."""
    samples = [("a", letter) for letter in "bcdefgh"]
    trainer = ilql_trainer(
        run_dir,
        samples,
        [float(output == "c") for _, output in samples],
        ilql={"batch_size": 7, "alpha": 0.5, "cql_scale": 0.01},
        optimizer={"learning_rate": 3e-3},
        generation={"max_new_tokens": 2},
        train={"run_dir": run_dir, "total_steps": 60},
    )
    for _ in range(60):
        trainer.step()
    chosen = {beta: "".join(trainer.generate(["a"] * 70, beta=beta)) for beta in (0.0, 100.0)}

    assert chosen[100.0].count("c") >= 60
    assert 3 <= chosen[0.0].count("c") <= 30


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("samples", "rewards", "message"),
    [
        (SAMPLES, REWARDS[:3], "3 rewards for 4 samples"),
        (SAMPLES, [*REWARDS[:3], math.nan], "reward of sample 3 is nan"),
        ([*SAMPLES[:3], ("a", "b", "c")], REWARDS, "sample 3 has 3 turns"),
        ([], [], "list of samples is empty"),
    ],
)
def test_bad_data_is_refused_before_a_run_folder_is_made(
    run_dir: Path, samples: list[Any], rewards: list[float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ilql_trainer(run_dir, samples, rewards)
    assert not run_dir.exists()


def test_samples_beyond_the_window_are_cut_on_the_configured_side(run_dir: Path) -> None:
    sides = {
        side: ilql_trainer(
            run_dir / side,
            [("ab", "cdefgh")],
            [1.0],
            lm=policy(n_positions=6),
            tokenizer={"truncation_side": side},
            ilql={"batch_size": 1},
            train={"run_dir": run_dir / side},
        )
        for side in ("left", "right")
    }
    assert sides["left"].samples[0].token_ids == (3, 4, 5, 6, 7, EOS)
    assert sides["right"].samples[0].token_ids == (0, 1, 2, 3, 4, 5)


def test_a_sample_without_an_action_in_the_window_is_named_by_its_place(
    run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    samples = ["", "ab", ("abcdefgh", "a"), "abc"]
    places = [f"d.jsonl line {number}" for number in (1, 2, 5, 6)]
    for given, name in ((samples, "sample 2"), (Rows(samples, places), "d.jsonl line 5")):
        caplog.clear()
        trainer = ilql_trainer(
            run_dir / name,
            given,
            [1.0, 2.0, 3.0, 4.0],
            lm=policy(n_positions=6),
            tokenizer={"truncation_side": "right"},
            data={"min_tokens": 4},
            ilql={"batch_size": 1, "normalise_rewards": False},
            train={"run_dir": run_dir / name},
        )
        assert f"1 of 2 samples left out: {name} has no action left" in caplog.text
        assert [len(sample.token_ids) for sample in trainer.samples] == [4]
        assert list(trainer.rewards) == [4.0]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"generation": {"beta": [0, 1]}}, ConfigError, r"`generation\.beta`"),
        (
            {"eval_generation": {"beta": [0, -1]}, "eval_prompts": ["a"]},
            ConfigError,
            r"(?s)eval_generation.*beta",
        ),
        ({"ilql": {"batch_size": 4, "tau": 1.0}}, ConfigError, r"`ilql\.tau`"),
        ({"ilql": {"batch_size": 4, "beta": 1.0}}, ConfigError, r"unknown key `ilql\.beta`"),
        ({"reward": {"delta": True}}, ConfigError, r"`reward\.delta`"),
        ({"logit_mask": torch.zeros(2, 2, dtype=torch.bool)}, ModelError, "logit_mask"),
        ({"generation": {"max_new_tokens": 99}, "eval_prompts": ["a"]}, ConfigError, "max_new_tokens"),
        ({"eval_generation": {"max_new_tokens": 16}, "eval_prompts": ["a"]}, ConfigError, "max_new_tokens"),
    ],
)
def test_bad_settings_are_refused_before_a_run_folder_is_made(
    run_dir: Path, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ilql_trainer(run_dir, SAMPLES, REWARDS, **settings)
    assert not run_dir.exists()


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 11}
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return T5ForConditionalGeneration(T5Config(**shape, **special, dropout_rate=0.0))


def test_an_encoder_decoder_takes_pairs_and_learns_from_them(run_dir: Path) -> None:
    trainer = ilql_trainer(
        run_dir, [("ab", "c"), ("d", "efg"), ("h", ""), ("ba", "aa")], REWARDS, lm=tiny_t5()
    )
    before = parameters(trainer.policy)
    metrics = trainer.step()

    assert math.isfinite(metrics["train/loss"]) and metrics["train/grad_norm"] > 0
    assert not torch.equal(parameters(trainer.policy), before)
    assert len(trainer.generate(["ab", "c"])) == 2


def test_an_encoder_decoder_refuses_strings(run_dir: Path) -> None:
    with pytest.raises(DataError, match="sample 0 is one string; an encoder-decoder"):
        ilql_trainer(run_dir, SAMPLES, REWARDS, lm=tiny_t5())


def test_a_special_token_among_the_stop_strings_ends_what_a_saved_policy_generates(run_dir: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    pad = str(tokenizer.pad_token)
    trainer = ilql_trainer(run_dir, SAMPLES, REWARDS, generation={"stop": [pad], "stop_token_ids": [3]})
    assert trainer.policy.decoding["eos_token_id"] == sorted({3, EOS, PAD})
