"""Trainers of tiny models, and hand-made rollouts for them. Eight letters, one token each: `a` is 0, `h` is
7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from conch.config import load
from conch.models.ilql import ILQLPolicy
from conch.trainers.async_grpo import AsyncGRPORunConfig, AsyncGRPOTrainer
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.trainers.ilql import ILQLRunConfig, ILQLTrainer
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from conch.trainers.rft import RFTRunConfig, RFTTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from conch.training.checkpointing import Trainer
from conch.types import Completion, FinishReason, Prompt, RewardResult, RewardStatus, Rollout
from tests.tiny import char_tokenizer, tiny_gpt2_config

TrainerT = TypeVar("TrainerT", bound=Trainer)

LETTERS = "abcdefgh"
TOKENIZER = char_tokenizer(LETTERS)
PAD, EOS = len(LETTERS), len(LETTERS) + 1
PROMPTS = ["a", "bc", "def", "g", "ha", "b", "cd", "e"]
OPEN: list[Trainer] = []
"""Trainers that the functions below made; `tests/conftest.py` closes those of a test at its end."""
# Linear in the gradient's size instead of its sign alone: parameters after one update then tell gradients
# apart.
LINEAR_ADAM = {"learning_rate": 0.1, "eps": 1.0}
# What tests and recorded runs stand on, whatever the defaults are.
OPTIMIZER = {"learning_rate": 1e-4}
SCHEDULER = {"name": "constant", "warmup_updates": 0}
TRAIN = {"total_steps": 100, "eval_every": 0, "max_grad_norm": 1e6}


def policy(seed: int = 0, *, dtype: torch.dtype = torch.float64, **overrides: Any) -> GPT2LMHeadModel:
    """A random language model whose next-token distributions are far from uniform.

    dtype: float64 unless a test is about another precision, as in `tests.tiny.tiny_decoder`.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(tiny_gpt2_config(TOKENIZER, **overrides))
    redraw(model, 0.15, seed)
    return model.to(dtype)


def redraw(module: torch.nn.Module, size: float, seed: int = 1) -> None:
    """Normal weights of this size, around 1 in norms: the same on every processor.

    `torch.randn` of float32 is not: its vectorised kernels round other than its plain one. In float64 there
    is only the plain one.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0)
    shake(module, size, seed)


def shake(model: torch.nn.Module, size: float, seed: int = 1) -> None:
    """Add seeded noise to every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise).to(parameter.dtype))


def parameters(module: torch.nn.Module) -> torch.Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def vowels(outputs: Sequence[str], **_: Any) -> list[float]:
    """A reward function: how many of `a` and `e` an output has."""
    return [float(sum(letter in "ae" for letter in output)) for output in outputs]


def ppo_trainer(run_dir: Path, *, lm: PreTrainedModel | None = None, **settings: Any) -> PPOTrainer:
    """A trainer of 8 rollouts of up to 5 tokens; one epoch in one minibatch.

    settings: sections of the run config, `reward_fn`, `prompts`, `eval_prompts`, `metric_fn`, `tokenizer`,
        `gold`.
    """
    names = ("prompts", "eval_prompts", "metric_fn", "tokenizer", "gold")
    given = {name: settings.pop(name) for name in names if name in settings}
    reward = settings.pop("reward_fn", vowels)
    values = _merged(
        {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 5, "chunk_size": 64},
            "ppo": {"rollouts_per_step": 8, "epochs": 1, "minibatches": 1, "forward_batch_size": 3},
            "train": {**TRAIN, "total_steps": 4, "run_dir": run_dir},
        },
        settings,
    )
    return _opened(
        PPOTrainer(
            load(PPORunConfig, values),
            **{
                "reward": reward,
                "prompts": PROMPTS,
                "tokenizer": TOKENIZER,
                "model": lm or policy(),
                **given,
            },
        )
    )


def grpo_trainer(run_dir: Path, *, lm: PreTrainedModel | None = None, **settings: Any) -> GRPOTrainer:
    """A trainer of 2 groups of 4 rollouts of up to 5 tokens; one epoch in one minibatch.

    settings: sections of the run config, `reward_fn`, `prompts`, `eval_prompts`, `metric_fn`,
        `gold`.
    """
    given = _grpo_inputs(settings, lm)
    return _opened(GRPOTrainer(load(GRPORunConfig, _grpo_values(run_dir, settings)), **given))


def async_grpo_trainer(
    run_dir: Path, *, lm: PreTrainedModel | None = None, **settings: Any
) -> AsyncGRPOTrainer:
    """The same, asynchronous; `rollout` says where it samples."""
    given = _grpo_inputs(settings, lm)
    return _opened(AsyncGRPOTrainer(load(AsyncGRPORunConfig, _grpo_values(run_dir, settings)), **given))


def _grpo_inputs(settings: dict[str, Any], lm: PreTrainedModel | None) -> dict[str, Any]:
    """What is no setting, taken out of `settings`."""
    names = ("prompts", "eval_prompts", "metric_fn", "gold")
    given = {name: settings.pop(name) for name in names if name in settings}
    reward = settings.pop("reward_fn", vowels)
    return {"reward": reward, "prompts": PROMPTS, "tokenizer": TOKENIZER, "model": lm or policy(), **given}


def _grpo_values(run_dir: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    return _merged(
        {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 5, "chunk_size": 64},
            "grpo": {"prompts_per_step": 2, "group_size": 4, "minibatches": 1, "forward_batch_size": 3},
            "train": {**TRAIN, "total_steps": 4, "run_dir": run_dir},
        },
        settings,
    )


def sft_trainer(
    run_dir: Path, samples: Sequence[Any], *, lm: PreTrainedModel | None = None, **settings: Any
) -> SFTTrainer:
    """A trainer of 8 samples a batch.

    settings: sections of the run config (that of the tokenizer as `tokenizer_config`), `eval_samples`,
        `eval_prompts`, `metric_fn`, `reward_fn`, `tokenizer`, `gold`.
    """
    names = ("eval_samples", "eval_prompts", "metric_fn", "tokenizer", "gold")
    given = {name: settings.pop(name) for name in names if name in settings}
    reward = settings.pop("reward_fn", None)
    settings["tokenizer"] = settings.pop("tokenizer_config", {})
    values = _merged(
        {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 5, "chunk_size": 64},
            "sft": {"batch_size": 8},
            "train": {**TRAIN, "run_dir": run_dir},
        },
        settings,
    )
    return _opened(
        SFTTrainer(
            load(SFTRunConfig, values),
            samples=samples,
            reward=reward,
            **{"model": lm or policy(), "tokenizer": TOKENIZER, **given},
        )
    )


def ilql_trainer(
    run_dir: Path,
    samples: Sequence[Any],
    rewards: Sequence[float],
    *,
    lm: PreTrainedModel | None = None,
    **settings: Any,
) -> ILQLTrainer:
    """A trainer of 4 samples a batch, whose heads are far from the zeros that they start at.

    settings: sections of the run config, `eval_prompts`, `reward_fn`, `metric_fn`, `logit_mask`, `gold`.
    """
    names = ("eval_prompts", "metric_fn", "logit_mask", "gold")
    given = {name: settings.pop(name) for name in names if name in settings}
    reward = settings.pop("reward_fn", None)
    values = _merged(
        {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 5, "top_k": 0, "chunk_size": 64},
            "ilql": {"batch_size": 4},
            "train": {**TRAIN, "run_dir": run_dir},
        },
        settings,
    )
    trainer = ILQLTrainer(
        load(ILQLRunConfig, values),
        samples=samples,
        rewards=rewards,
        reward=reward,
        model=lm or policy(),
        tokenizer=TOKENIZER,
        **given,
    )
    if not trainer.run.continued:
        shake_heads(trainer.policy)
    return _opened(trainer)


def shake_heads(module: ILQLPolicy) -> None:
    """Give Q, target and V heads seeded noise, each its own."""
    for seed, head in enumerate((module.q_heads, module.target_q_heads, module.value_head), start=2):
        head.requires_grad_(True)
        shake(head, 0.3, seed)
    module.target_q_heads.requires_grad_(False)


def reward_trainer(run_dir: Path, samples: Sequence[Any], **settings: Any) -> RewardModelTrainer:
    """A trainer of 8 rows a batch, its model random but the same every time.

    settings: sections of the run config, `eval_samples`, `reference`, `tokenizer`, and the size of the noise
    that is added to the weights, `noise`.
    """
    names = ("eval_samples", "reference", "tokenizer")
    given = {name: settings.pop(name) for name in names if name in settings}
    noise = settings.pop("noise", 0.1)
    shape = tiny_gpt2_config(TOKENIZER).to_diff_dict()
    values = _merged(
        {
            "model": {"architecture": {**shape, "model_type": "gpt2"}, "dtype": "float64"},
            "reward_model": {"batch_size": 8, "eval_fraction": 0.0},
            "train": {**TRAIN, "run_dir": run_dir},
        },
        settings,
    )
    trainer = RewardModelTrainer(
        load(RewardModelRunConfig, values), samples=samples, **{"tokenizer": TOKENIZER, **given}
    )
    shake(trainer.model, noise)
    return _opened(trainer)


def rft_trainer(run_dir: Path, *, lm: PreTrainedModel | None = None, **settings: Any) -> RFTTrainer:
    """A trainer of 4 completions of up to 5 tokens for each of 8 prompts, two steps a round.

    settings: sections of the run config, `reward_fn`, `prompts`, `eval_prompts`, `metric_fn`,
        `gold`.
    """
    names = ("prompts", "eval_prompts", "metric_fn", "gold")
    given = {name: settings.pop(name) for name in names if name in settings}
    reward = settings.pop("reward_fn", vowels)
    rft = {"n_generations_per_prompt": 4, "n_improve_steps": 2, "batch_size": 8, "updates_per_step": 2}
    values = _merged(
        {
            "model": {"architecture": {"model_type": "gpt2"}},
            "generation": {"max_new_tokens": 5, "chunk_size": 64},
            "rft": {**rft, "start_percentile": 0.5, "end_percentile": 0.9},
            "train": {**TRAIN, "total_steps": 6, "run_dir": run_dir},
        },
        settings,
    )
    return _opened(
        RFTTrainer(
            load(RFTRunConfig, values),
            **{
                "reward": reward,
                "prompts": PROMPTS,
                "tokenizer": TOKENIZER,
                "model": lm or policy(),
                **given,
            },
        )
    )


def batch_of(
    trainer: PPOTrainer | GRPOTrainer, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]
) -> Any:
    """What a trainer learns from, of given rollouts."""
    return batch_and_metrics(trainer, rollouts, rewards)[0]


def batch_and_metrics(
    trainer: PPOTrainer | GRPOTrainer, rollouts: Sequence[Rollout], rewards: Sequence[RewardResult]
) -> tuple[Any, dict[str, float]]:
    """The same with the statistics of the step."""
    return trainer.make_batch(rollouts, rewards, trainer.compute_logprobs(rollouts))  # pyright: ignore[reportArgumentType]


def letters_rollout(
    prompt: str, output: str, reason: FinishReason = "eos", logprob: float = -1.0, **metadata: Any
) -> Rollout:
    """A rollout of these letters, with an eos token at its end where that is the reason for it."""
    ids = tuple(LETTERS.index(letter) for letter in output) + ((EOS,) if reason == "eos" else ())
    prompt_ids = tuple(LETTERS.index(letter) for letter in prompt)
    completion = Completion(output, ids, (logprob,) * len(ids), reason)
    return Rollout(Prompt(prompt, prompt_ids, metadata), completion, policy_version=0)


def scored(*scores: float | None) -> list[RewardResult]:
    """One result per score; None stands for a failure."""
    failure = RewardResult(RewardStatus.TIMEOUT, detail="no reply")
    return [
        failure if score is None else RewardResult(RewardStatus.OK, scores={"reward": score})
        for score in scores
    ]


def _opened(trainer: TrainerT) -> TrainerT:
    OPEN.append(trainer)
    return trainer


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    base = {"optimizer": OPTIMIZER, "scheduler": SCHEDULER, **base}
    sections = {name: {**values, **over.get(name, {})} for name, values in base.items()}
    return {**sections, **{name: values for name, values in over.items() if name not in base}}
