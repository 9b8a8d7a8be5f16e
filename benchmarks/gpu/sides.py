"""Steps of Conch and of plain transformers, whole and phase by phase. TRL's are in
`benchmarks/gpu/trl_side.py`.

All sides compute in bfloat16 by autocast from float32 weights on a GPU, in float32 on a CPU, with the same
weights, rows, lengths, losses and fused AdamW. The plain side is what a user would write: rows padded,
`generate` for all of them at once, one response a row, log-probs of the response's columns alone; the
advantages' few sums are Conch's own functions.

Legend: B rows, T columns (prompt padded left, R response padded right).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.gpu.cases import BETA, EOS, PAD, CountDown, Work
from benchmarks.policies import forced_engine
from conch.advantages import gae, group_advantages
from conch.config import load
from conch.errors import ConchError
from conch.losses import clipped_loss_terms, policy_loss_terms, value_loss_terms
from conch.ops import kl_estimate, kl_loss_terms, position_ids, whiten
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer

LEARNING_RATE = 1e-5
CLIP = 0.2


@dataclass(frozen=True)
class Side:
    """step: one whole step, as it is timed.

    phases: the same step cut at its joints, in their order, as it is profiled.
    close: ends what the step needs.
    """

    step: Callable[[], None]
    phases: Mapping[str, Callable[[], None]]
    close: Callable[[], None] = lambda: None


def rewards_of(samples: list[str]) -> list[float]:
    """A reward of no sense."""
    return [float(len(sample) % 7) for sample in samples]


def precision_on(device: str) -> str:
    """`train.mixed_precision` of the timed steps."""
    return "no" if device == "cpu" else "bf16"


# ------------------------------------------------------------------------------------------------------ Conch


def conch_trainer(
    work: Work, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, precision: str
) -> SFTTrainer | GRPOTrainer | PPOTrainer:
    """Conch's trainer over the rows of `work`; responses are as long as they are to be.

    precision: `train.mixed_precision`.
    """
    settings: dict[str, Any] = {
        "model": {"architecture": {"model_type": model.config.model_type}, "trial": False},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "scheduler": {"name": "constant"},
        "train": {
            "run_dir": str(folder / "run"),
            "total_steps": 1000,
            "eval_every": 0,
            "gradient_accumulation_steps": work.micro_batches,
            "mixed_precision": precision,
        },
    }
    given = {"model": model, "tokenizer": tokenizer}
    if work.algorithm == "sft":
        settings["sft"] = {"batch_size": work.rows, "packing": True, "max_length": work.capacity}
        return SFTTrainer(load(SFTRunConfig, settings), samples=work.texts, **given)
    settings["generation"] = {"max_new_tokens": work.longest, "chunk_size": work.rows}
    # Samples come from a part of the vocabulary alone: their log-probs are not the trainer's.
    settings["rollout"] = {"logprob_diff_alarm": None}
    once = {"epochs": 1, "minibatches": 1, "forward_batch_size": work.rows // work.micro_batches}
    online = {"reward": lambda samples, **_: rewards_of(samples), "prompts": work.texts, **given}
    trainer: GRPOTrainer | PPOTrainer
    if work.algorithm == "grpo":
        groups = {"prompts_per_step": len(work.prompts), "group_size": work.group_size}
        settings["grpo"] = {**groups, **once, "kl": {"coef": BETA}}
        trainer = GRPOTrainer(load(GRPORunConfig, settings), **online)
    else:
        settings["ppo"] = {"rollouts_per_step": work.rows, **once, "kl": {"coef": BETA}}
        trainer = PPOTrainer(load(PPORunConfig, settings), **online)
    trainer.sampler = forced_engine(trainer, CountDown(work.longest))
    return trainer


def conch_side(
    work: Work,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    device: str,
) -> Side:
    """Conch."""
    trainer = conch_trainer(work, model, tokenizer, folder, precision_on(device))
    if isinstance(trainer, SFTTrainer):
        sft, batches = trainer, []

        def lay_out() -> None:
            batches[:] = sft.experience(sft.samples)

        def train() -> None:
            sft.update(batches)

        return Side(lambda: _ignore(sft.step()), {"batch": lay_out, "update": train}, sft.close)
    online, now = trainer, _Step()

    def step() -> None:
        metrics = online.step()
        check_tokens(work, round(metrics["rollout/length_mean"] * work.rows))

    def rollout() -> None:
        now.rollouts = online.rollout(online.next_prompts(len(work.prompts)))

    def passes() -> None:
        now.outputs = online.compute_logprobs(now.rollouts)

    def batch() -> None:
        now.batch, _ = online.make_batch(now.rollouts, online.score(now.rollouts), now.outputs)

    def update() -> None:
        online.update(now.batch)

    phases = {"rollout": rollout, "passes": passes, "rewards and batch": batch, "update": update}
    return Side(step, phases, online.close)


@dataclass
class _Step:
    """What one phase of Conch's leaves to the next."""

    rollouts: Any = None
    outputs: Any = None
    batch: Any = None


def _ignore(_: object) -> None:
    return None


def check_tokens(work: Work, sampled: int) -> None:
    """Raises:
    ConchError: a side sampled other lengths than it was to.
    """
    if sampled != work.tokens:
        raise ConchError(
            f"{sampled} tokens were sampled instead of {work.tokens}: there is nothing to compare"
        )


# -------------------------------------------------------------------------------------------------- the plain


def plain_side(work: Work, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, device: str) -> Side:
    """transformers and a loop of one's own."""
    model.train()
    if work.algorithm == "sft":
        sft = _PlainSFT(work, model, device)
        return Side(sft.step, {"batch": sft.lay_out, "update": sft.update})
    online = _PlainRL(work, model, tokenizer, device)
    phases = {
        "rollout": online.rollout,
        "passes": online.passes,
        "rewards and batch": online.rewards,
        "update": online.update,
    }

    def step() -> None:
        for run in phases.values():
            run()

    return Side(step, phases)


def _autocast(device: str) -> AbstractContextManager[Any]:
    return nullcontext() if device == "cpu" else torch.autocast(device, torch.bfloat16)


class _PlainSFT:
    """Samples padded on the right, the model's own loss."""

    def __init__(self, work: Work, model: PreTrainedModel, device: str) -> None:
        self._work = work
        self._model = model
        self._device = device
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self) -> None:
        """One update."""
        self.lay_out()
        self.update()

    def lay_out(self) -> None:
        """Pad the samples of each micro-batch."""
        rows = [[*prompt, EOS] for prompt in self._work.prompts]
        size = len(rows) // self._work.micro_batches
        self._batches = [self._padded(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, -100)
        return ids.to(self._device), mask.to(self._device), labels.to(self._device)

    def update(self) -> None:
        """Forward and backward passes, clipping, AdamW."""
        for ids, mask, labels in self._batches:
            with _autocast(self._device):
                loss = self._model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            (loss / len(self._batches)).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


@dataclass
class _Rows:
    """One step's padded rows. ids, mask [B, T]; response_mask and all else [B, R]."""

    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    response_mask: Bool[Tensor, "B R"]
    columns: dict[str, Tensor] = field(default_factory=dict)


class _PlainRL:
    """GRPO, or PPO with a linear value head."""

    def __init__(
        self, work: Work, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, device: str
    ) -> None:
        self._work = work
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._has_values = work.algorithm == "ppo"
        self._reference = copy.deepcopy(model).eval().requires_grad_(False)
        self._value_head = nn.Linear(int(model.config.hidden_size), 1, device=device)
        trained = [*model.parameters(), *(self._value_head.parameters() if self._has_values else ())]
        self._trained: list[nn.Parameter] = trained
        self._optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._rows: _Rows | None = None

    @property
    def _now(self) -> _Rows:
        assert self._rows is not None
        return self._rows

    @torch.no_grad()
    def rollout(self) -> None:
        """Sample all rows at once."""
        work, tokenizer = self._work, self._tokenizer
        rows = [list(prompt) for prompt in work.prompts for _ in range(work.group_size)]
        prompts = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(
            self._device
        )
        self._model.eval()
        with _autocast(self._device):
            ids = self._model.generate(  # pyright: ignore[reportCallIssue]
                **prompts,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=work.longest,
                pad_token_id=PAD,
                eos_token_id=EOS,
                logits_processor=LogitsProcessorList([CountDown(work.longest)]),
            )
        self._model.train()
        responses = ids[:, prompts["input_ids"].shape[1] :]
        has_ended = (responses == EOS).cumsum(dim=1) - (responses == EOS).long() > 0
        response_mask = ~has_ended
        check_tokens(work, int(response_mask.sum()))
        mask = torch.cat([prompts["attention_mask"].bool(), response_mask], dim=1)
        self._rows = _Rows(ids, mask, response_mask)

    @torch.no_grad()
    def passes(self) -> None:
        """Log-probs of the reference; PPO's of the policy as well, with values."""
        now = self._now
        self._model.eval()
        for rows in self._micro_batches():
            self._keep(now, "reference", self._logprobs(self._reference, now, rows)[0])
            if self._has_values:
                logprobs, values = self._logprobs(self._model, now, rows)
                self._keep(now, "old", logprobs)
                self._keep(now, "values", values)
        self._model.train()

    def _micro_batches(self) -> tuple[Tensor, ...]:
        return torch.arange(self._work.rows, device=self._device).chunk(self._work.micro_batches)

    @staticmethod
    def _keep(now: _Rows, name: str, part: Tensor) -> None:
        before = now.columns.get(name)
        now.columns[name] = part if before is None else torch.cat([before, part])

    def _logprobs(
        self, model: PreTrainedModel, now: _Rows, rows: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b R"], Float[Tensor, "b R"]]:
        """Log-probs and values of the response tokens of some rows."""
        num_response, head = now.response_mask.shape[1], model.get_output_embeddings()
        assert head is not None
        ids, mask = now.ids[rows], now.mask[rows]
        with _autocast(self._device):
            states = model.base_model(
                input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
            ).last_hidden_state[:, -num_response - 1 : -1]
            logits = head(states)
            values = self._value_head(states).squeeze(-1).float()
        logprobs = logits.float().log_softmax(dim=-1)
        return logprobs.gather(2, ids[:, -num_response:].unsqueeze(2)).squeeze(2), values

    @torch.no_grad()
    def rewards(self) -> None:
        """Texts, rewards, advantages."""
        now, work = self._now, self._work
        texts = self._tokenizer.batch_decode(now.ids, skip_special_tokens=True)
        scores = torch.tensor(rewards_of(texts), device=self._device)
        mask = now.response_mask
        if not self._has_values:
            valid, sizes = torch.ones_like(scores, dtype=torch.bool), scores.abs()
            now.columns["advantages"] = group_advantages(scores, valid, work.group_size, "group_std", sizes)
            return
        columns = now.columns
        per_token = -BETA * kl_estimate(columns["old"], columns["reference"], "k1")
        last = mask.sum(dim=1, keepdim=True) - 1
        per_token = per_token.scatter_add(1, last, scores.unsqueeze(1)) * mask
        advantages, columns["returns"] = gae(per_token, columns["values"] * mask, mask, 1.0, 0.95)
        columns["advantages"] = whiten(advantages, mask)

    def update(self) -> None:
        """Forward and backward passes, clipping, AdamW."""
        now = self._now
        num_tokens = now.response_mask.sum()
        for rows in self._micro_batches():
            logprobs, values = self._logprobs(self._model, now, rows)
            mask = now.response_mask[rows]
            of_rows = {name: column[rows] for name, column in now.columns.items()}
            if self._has_values:
                terms, _, _ = policy_loss_terms(logprobs, of_rows["old"], of_rows["advantages"], CLIP)
                terms = terms + value_loss_terms(values, of_rows["values"], of_rows["returns"], CLIP)
            else:
                ratio = (logprobs - logprobs.detach()).exp()
                terms, _ = clipped_loss_terms(ratio, of_rows["advantages"], CLIP, CLIP)
                terms = terms + BETA * kl_loss_terms(logprobs, of_rows["reference"], "k3")
            ((terms * mask).sum() / num_tokens).backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
