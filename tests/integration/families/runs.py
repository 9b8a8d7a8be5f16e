"""Two steps of SFT, PPO and GRPO with a family's checkpoint, and what the same is without Conch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conch.config import load
from conch.data.samples import TokenizedSample
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from conch.types import Metrics, Prompt, Rollout
from tests.integration.families.models import (
    FOLLOW_UP,
    LONGEST,
    QUESTION,
    TEXTS,
    forced_ids,
    prompt_ids,
    save_family,
)
from tests.integration.families.table import Family

ANSWER = "the map shows a bridge"


@dataclass(frozen=True)
class OnlineRun:
    """What two steps of PPO or GRPO were made of.

    prompts: as the trainer has them.
    greedy: the likeliest completions, before training.
    sampled: others from then.
    rollouts: of each step.
    metrics: of each step.
    seen: prompt and output of each call of the reward function's, in order.
    """

    prompts: list[Prompt]
    greedy: list[Rollout]
    sampled: list[Rollout]
    rollouts: list[list[Rollout]]
    metrics: list[Metrics]
    seen: list[tuple[str, str]]


@dataclass(frozen=True)
class SFTRun:
    """What two steps of SFT were made of: the samples as the trainer has them, and each step's metrics."""

    samples: list[TokenizedSample]
    metrics: list[Metrics]


class FamilyRuns:
    """The checkpoint of a family in a folder, and runs with it, each made when first asked for.

    lively: see `save_family`.
    """

    def __init__(self, family: Family, folder: Path, *, lively: bool = True) -> None:
        self.family = family
        self.folder = folder
        self.checkpoint = save_family(family, folder / "checkpoint", lively=lively)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As transformers loads it."""
        return AutoTokenizer.from_pretrained(self.checkpoint)

    @functools.cached_property
    def lm(self) -> PreTrainedModel:
        """As transformers loads it, in evaluation mode."""
        auto_class = AutoModelForSeq2SeqLM if self.is_encoder_decoder else AutoModelForCausalLM
        return auto_class.from_pretrained(self.checkpoint).eval()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt is read by an encoder."""
        return self.family.kind == "encoder-decoder"

    @property
    def prompts(self) -> list[str | dict[str, Any]]:
        """Texts, and dialogues where the tokenizer has a chat template."""
        if self.tokenizer.chat_template is None:
            return list(TEXTS)
        return [*TEXTS[:2], {"prompt": list(QUESTION)}, {"prompt": list(FOLLOW_UP)}]

    @property
    def samples(self) -> list[Any]:
        """Pairs, and dialogues where there is a chat template, else texts; pairs alone for an encoder."""
        pairs = [{"prompt": text, "completion": f" {ANSWER}"} for text in TEXTS]
        if self.is_encoder_decoder:
            return pairs
        if self.tokenizer.chat_template is None:
            return [*pairs[:2], *TEXTS[1:3]]
        questions = (QUESTION, QUESTION if self.family.last_turn_differs else FOLLOW_UP)
        answer = {"role": "assistant", "content": ANSWER}
        return [*pairs[:2], *([*question, answer] for question in questions)]

    @functools.cached_property
    def ppo(self) -> OnlineRun:
        """Two steps of PPO, four rollouts each."""
        section = {"rollouts_per_step": 4, "epochs": 1, "minibatches": 1, "forward_batch_size": 3}
        config = load(PPORunConfig, self._settings("ppo", section))
        return self._online(functools.partial(PPOTrainer, config))

    @functools.cached_property
    def grpo(self) -> OnlineRun:
        """Two steps of GRPO, two groups of two each, with a reference. The log-probs that it compares with
        the sampler's are those of its update, in training mode."""
        section = {"prompts_per_step": 2, "group_size": 2, "minibatches": 1, "kl": {"coef": 0.05}}
        config = load(GRPORunConfig, self._settings("grpo", section))
        return self._online(functools.partial(GRPOTrainer, config))

    @functools.cached_property
    def sft(self) -> SFTRun:
        """Two steps of SFT on all samples."""
        config = load(SFTRunConfig, self._settings("sft", {"batch_size": 4}))
        with closing(SFTTrainer(config, samples=self.samples)) as trainer:
            samples, metrics = list(trainer.samples), _recorded(trainer, "step")
            trainer.fit()
        return SFTRun(samples, metrics)

    def _settings(self, algorithm: str, section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model": {"path": str(self.checkpoint)},
            "tokenizer": {"pad_token": self.family.pad_token},
            "generation": {"max_new_tokens": LONGEST},
            "optimizer": {"learning_rate": 1e-5},
            "train": {"total_steps": 2, "eval_every": 0, "run_dir": self.folder / algorithm},
            algorithm: section,
        }

    def _online(self, make: Callable[..., PPOTrainer | GRPOTrainer]) -> OnlineRun:
        seen: list[tuple[str, str]] = []

        def length(prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
            seen.extend(zip(prompts, outputs, strict=True))
            return [float(len(output)) for output in outputs]

        with closing(make(reward=length, prompts=self.prompts)) as trainer:
            greedy = _all(trainer.sampler.generate(trainer.prompts, greedy=True))
            sampled = _all(trainer.sampler.generate(4 * trainer.prompts))
            rollouts, metrics = _recorded(trainer, "rollout"), _recorded(trainer, "step")
            trainer.fit()
            return OnlineRun(list(trainer.prompts), greedy, sampled, rollouts, metrics, seen)

    # ------------------------------------------------------------------------------------- without Conch

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """See `models.prompt_ids`."""
        return prompt_ids(self.tokenizer, prompt, "encoder" if self.is_encoder_decoder else "decoder")

    @torch.no_grad()
    def logprobs_alone(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """Log-probs of a response to a prompt under the checkpoint, alone in its batch, without padding."""
        if self.is_encoder_decoder:
            start = [int(self.lm.config.decoder_start_token_id), *forced_ids(self.lm)]
            decoder_ids = torch.tensor([[*start, *response[:-1]]])
            whole = self.lm(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=decoder_ids).logits[0]
            logits = whole[len(start) - 1 :]
        else:
            ids = torch.tensor([[*prompt, *response]])
            logits = self.lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(dim=-1).gather(1, torch.tensor(list(response)).unsqueeze(1))[:, 0]

    def sft_loss_alone(self, samples: Sequence[TokenizedSample]) -> float:
        """Mean negative log-likelihood of the learned tokens, sample by sample."""
        total, learned = 0.0, 0
        for sample in samples:
            cut = sample.num_prompt
            logprobs = self.logprobs_alone(sample.token_ids[:cut], sample.token_ids[cut:])
            mask = torch.tensor(sample.loss_mask[cut:])
            total, learned = total - float(logprobs[mask].sum()), learned + int(mask.sum())
        return total / learned

    def response_text(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """Text of a response: of all ids less that of the prompt's, and of its own ids where the decoder
        reads no prompt."""
        prefix = [] if self.is_encoder_decoder else list(prompt)
        return self._decode([*prefix, *response])[len(self._decode(prefix)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))


def _all(chunks: Iterable[list[Rollout]]) -> list[Rollout]:
    return [rollout for chunk in chunks for rollout in chunk]


def _recorded(trainer: Any, verb: str) -> list[Any]:
    """Results of a trainer's verb from now on, as they come."""
    results: list[Any] = []
    run = getattr(trainer, verb)

    def noting(*arguments: Any, **settings: Any) -> Any:
        results.append(run(*arguments, **settings))
        return results[-1]

    setattr(trainer, verb, noting)
    return results
