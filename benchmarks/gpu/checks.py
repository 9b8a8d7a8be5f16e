"""Correctness on this device: fast paths against plain ones, with random weights.

A bound is what rounding explains in a precision; a fault makes 0.01 nats and more. In float64, where nothing
but a fault and such norms are left, it is tight. `conch/models/attention.py` has those of half precision.

Legend: B samples, R response tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.gpu.cases import (
    EOS,
    PAD,
    CountDown,
    Work,
    build,
    check_shape,
    counted_prompt,
    text_of,
    word_tokenizer,
    work_of,
)
from benchmarks.gpu.sides import conch_trainer
from conch.config import GenerationConfig, RolloutConfig
from conch.data.packing import collate_packed
from conch.data.rollout_batch import Sequences, collate
from conch.data.samples import TokenizedSample
from conch.data.samples import collate as collate_samples
from conch.errors import ConfigError
from conch.models.attention import rounding_bound
from conch.models.forward import BatchPacker, ForwardBatch, padded_rows
from conch.models.kernels import apply_liger
from conch.models.policy import response_logits
from conch.rollouts.hf.engine import HFEngine
from conch.trainers.grpo import GRPOTrainer
from conch.trainers.sft import SFTTrainer, token_loss_sum
from conch.types import Completion, Prompt, Rollout

PASSED, FAILED = "passed", "failed"
NOT_INSTALLED, NOT_HERE = "not installed", "not on this device"

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_LOGPROB = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Nats between two ways to the same log-prob of a token. Samplers report float32, of float64 models as
well."""
_LOSS = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.01}
_GRADIENT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative: of the loss, and of the gradient's distance by the gradient's size. Llama takes its norms and
angles in float32 whatever its weights are in."""


def _logprob_bound(dtype: torch.dtype) -> float:
    return _LOGPROB.get(dtype) or rounding_bound(dtype)


@dataclass(frozen=True)
class Line:
    """What one check found.

    result: `passed`, `failed`, `not installed` or `not on this device`.
    figures: numbers, each with its bound where it has one as `NAME at most`.
    """

    name: str
    result: str
    figures: dict[str, Any] = field(default_factory=dict)


def judged(name: str, figures: dict[str, float], bounds: dict[str, float], **more: Any) -> Line:
    """A line that passes where each figure is at most its bound; NaN is above any."""
    fits = all(figures[key] <= bound for key, bound in bounds.items())
    told = {**figures, **{f"{key} at most": bound for key, bound in bounds.items()}, **more}
    return Line(name, PASSED if fits else FAILED, told)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------ slots


@dataclass(frozen=True)
class Greedy:
    """A greedy completion by `transformers.generate`.

    scores: log-probs [V] that each token was chosen by.
    """

    ids: list[int]
    scores: Float[Tensor, "R V"]


@torch.no_grad()
def plain_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    longest: int,
    processors: Sequence[LogitsProcessor] = (),
) -> list[Greedy]:
    """Completions by `generate`, one prompt at a time, so that there is neither padding nor a neighbour."""
    found: list[Greedy] = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids], device=model.device)
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=longest,
            pad_token_id=PAD,
            eos_token_id=EOS,
            logits_processor=LogitsProcessorList(processors),
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = torch.cat(output.scores).float().log_softmax(dim=-1)
        found.append(Greedy(output.sequences[0, ids.shape[1] :].tolist(), scores))
    return found


def compare_greedy(ours: Sequence[Rollout], plain: Sequence[Greedy], bound: float) -> dict[str, float]:
    """Tokens compared, up to a row's first difference; rows that part there because two tokens were equally
    likely but for rounding, and rows that differ otherwise; the largest distance of log-probs, in nats."""
    tokens, ties, differing, distances = 0, 0, 0, [0.0]
    for rollout, expected in zip(ours, plain, strict=True):
        ids, logprobs = rollout.completion.token_ids, rollout.completion.logprobs
        pairs = list(zip(ids, expected.ids, strict=False))
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
        distances += [abs(logprobs[at] - float(expected.scores[at, ids[at]])) for at in range(same)]
        tokens += same
        if same < len(pairs):
            scores = expected.scores[same]
            is_tie = float(scores[expected.ids[same]] - scores[ids[same]]) <= bound
            ties, differing = ties + is_tie, differing + (not is_tie)
        elif len(ids) != len(expected.ids):
            differing += 1
    largest = float(torch.tensor(distances).max())  # which keeps NaN
    return {
        "tokens": tokens,
        "ties": ties,
        "rows that differ": differing,
        "largest log-prob distance": largest,
    }


def check_prompts(vocab_size: int, count: int, longest: int) -> list[Prompt]:
    """Prompts of all lengths up to `longest` and more, whose responses have all lengths up to it; the last
    two are equal."""
    draw = random.Random(1)
    ids = [
        counted_prompt(draw, draw.randint(2, 2 * longest), draw.randint(1, longest), longest, vocab_size)
        for _ in range(count)
    ]
    return [Prompt(text_of(each), each) for each in [*ids, ids[-1]]]


def engine_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    longest: int,
    slots: int,
    processors: Sequence[LogitsProcessor],
) -> tuple[list[Rollout], bool]:
    """Greedy completions of Conch's own engine, and whether it sampled them in slots."""
    config = GenerationConfig(max_new_tokens=longest, chunk_size=slots)
    engine = HFEngine(
        lambda: model, tokenizer, config, version=lambda: 0, processors=lambda: nullcontext(processors)
    )
    rollouts = [rollout for chunk in engine.generate(prompts, greedy=True) for rollout in chunk]
    return rollouts, engine.takes_joining(prompts)


def slots(device: str, small: bool, _folder: Path) -> list[Line]:
    """Greedy completions of the engine with slots, which free up for further prompts, against `generate`."""
    lines = []
    longest, count = (10, 11) if small else (32, 47)
    for family in ("gpt2", "llama"):
        config = check_shape(family, small=small)
        tokenizer = word_tokenizer(int(config.vocab_size))
        prompts = check_prompts(int(config.vocab_size), count, longest)
        for dtype in _DTYPES:
            model, bound = build(config, device, dtype), _logprob_bound(dtype)
            processors = [CountDown(longest)]
            ours, in_slots = engine_rollouts(
                model, tokenizer, prompts, longest, len(prompts) // 3, processors
            )
            figures = compare_greedy(ours, plain_greedy(model, prompts, longest, processors), bound)
            bounds = {"rows that differ": 0, "largest log-prob distance": bound}
            if dtype == torch.float64:
                bounds["ties"] = 0
            line = judged(f"slots, {family}, {_name(dtype)}", figures, bounds)
            if not in_slots:
                line = Line(line.name, FAILED, {**line.figures, "sampled": "chunk by chunk, without slots"})
            lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Outputs:
    """Of one forward and backward pass. logprobs: of the labels. gradient: all parameters' as one vector."""

    loss: float
    logprobs: Tensor
    gradient: Tensor


def distances(found: Outputs, expected: Outputs) -> dict[str, float]:
    """Of the loss and the gradient, relative; of log-probs, the largest and the mean in nats."""
    gaps = (found.logprobs - expected.logprobs).abs()
    apart = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    return {
        "loss": abs(found.loss - expected.loss) / abs(expected.loss),
        "largest log-prob distance": float(gaps.max()),
        "mean log-prob distance": float(gaps.mean()),
        "gradient": float(apart),
    }


def judged_pair(name: str, found: Outputs, expected: Outputs, dtype: torch.dtype) -> Line:
    """A line on two ways to the same numbers in one precision."""
    bounds = {
        "loss": _LOSS[dtype],
        "largest log-prob distance": _logprob_bound(dtype),
        "gradient": _GRADIENT[dtype],
    }
    return judged(name, distances(found, expected), bounds)


def outputs_of(model: PreTrainedModel, forward: Callable[[], tuple[Tensor, Tensor]]) -> Outputs:
    """forward: gives a loss, a sum, and the labels' log-probs."""
    model.zero_grad()
    loss, logprobs = forward()
    loss.backward()
    vector = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return Outputs(float(loss.detach()), logprobs.detach().double(), vector)


def computing_in(dtype: torch.dtype, device: str) -> Any:
    """Autocast, as in training, for half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device, dtype) if half else nullcontext()


def weights_for(dtype: torch.dtype) -> torch.dtype:
    """Precision that weights are held in where a model computes in `dtype`."""
    return dtype if dtype == torch.float64 else torch.float32


def rl_outputs(model: PreTrainedModel, batch: ForwardBatch, dtype: torch.dtype, device: str) -> Outputs:
    """Of the response tokens' weighted log-probs."""

    def forward() -> tuple[Tensor, Tensor]:
        with computing_in(dtype, device):
            logprobs = batch.logprobs(response_logits(model, batch.inputs), 1.0)
        weights = torch.arange(logprobs.numel(), device=device).reshape(logprobs.shape) % 5 - 3.0
        return (logprobs * weights * batch.response_mask).sum(), logprobs

    return outputs_of(model, forward)


def sft_outputs(model: PreTrainedModel, batch: Any, dtype: torch.dtype, device: str) -> Outputs:
    """Of the summed negative log-likelihood."""

    def forward() -> tuple[Tensor, Tensor]:
        with computing_in(dtype, device):
            loss = token_loss_sum(model, batch)
        return loss, loss.detach().reshape(1) / batch.loss_mask.sum()

    return outputs_of(model, forward)


def check_sequences(vocab_size: int, device: str, small: bool) -> Sequences:
    """Groups of responses to common prompts, and prompts of one response; all lengths."""
    draw = random.Random(2)
    longest, groups = (8, 3) if small else (48, 8)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocab_size) for _ in range(count))

    rollouts = []
    for number in range(groups):
        prompt = ids(draw.randint(2, 2 * longest))
        for _ in range(4 if number % 2 == 0 else 1):
            response = ids(draw.randint(1, longest))
            completion = Completion("", response, (0.0,) * len(response), "length")
            rollouts.append(Rollout(Prompt("", prompt), completion, 0))
    return collate(rollouts, PAD, device)


def check_samples(vocab_size: int, small: bool) -> list[TokenizedSample]:
    """Samples of all lengths, some of which learn a part of their tokens only."""
    draw = random.Random(3)
    longest, count = (20, 7) if small else (160, 24)
    samples = []
    for number in range(count):
        length = draw.randint(3, longest)
        learned = draw.randint(1, length - 1) if number % 2 else 1
        ids = tuple(draw.randrange(2, vocab_size) for _ in range(length))
        samples.append(TokenizedSample(ids, tuple(place >= learned for place in range(length))))
    return samples


def packing(device: str, small: bool, _folder: Path) -> list[Line]:
    """Packed rows against padded ones: losses, log-probs and gradients of SFT and of RL, where responses
    share their prompt."""
    lines = []
    for family in ("gpt2", "llama"):
        config = check_shape(family, small=small)
        vocab_size = int(config.vocab_size)
        sequences, samples = check_sequences(vocab_size, device, small), check_samples(vocab_size, small)
        capacity = max(len(sample.token_ids) for sample in samples)
        for dtype in _DTYPES:
            model = build(config, device, weights_for(dtype))
            packer = BatchPacker(model)
            rows = (sequences.input_ids, sequences.attention_mask, sequences.num_response)
            packed, padded = (
                rl_outputs(model, batch, dtype, device) for batch in (packer.pack(*rows), padded_rows(*rows))
            )
            line = judged_pair(f"packing, {family}, RL, {_name(dtype)}", packed, padded, dtype)
            if packer.kind != "shared":
                line = Line(line.name, FAILED, {**line.figures, "rows": packer.kind})
            lines.append(line)
            packed, padded = (
                sft_outputs(model, batch, dtype, device)
                for batch in (
                    collate_packed(samples, PAD, capacity, device),
                    collate_samples(samples, PAD, device),
                )
            )
            lines.append(judged_pair(f"packing, {family}, SFT, {_name(dtype)}", packed, padded, dtype))
    return lines


# ---------------------------------------------------------------------------------------------------- kernels

_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def flash(device: str, small: bool, _folder: Path) -> list[Line]:
    """One row of all samples by flash-attention against padded rows by sdpa, in bfloat16."""
    lines = []
    for attention, package in _FLASH.items():
        name = f"flash, {attention}"
        if find_spec(package) is None:
            lines.append(Line(name, NOT_INSTALLED, {"package": package}))
            continue
        if device == "cpu":
            lines.append(Line(name, NOT_HERE))
            continue
        config, dtype = check_shape("llama", small=small), torch.bfloat16
        sequences = check_sequences(int(config.vocab_size), device, small)
        rows = (sequences.input_ids, sequences.attention_mask, sequences.num_response)
        plain, fast = build(config, device), build(config, device, attn_implementation=attention)
        fast.load_state_dict(plain.state_dict())
        packer = BatchPacker(fast)
        found = rl_outputs(fast, packer.pack(*rows), dtype, device)
        line = judged_pair(name, found, rl_outputs(plain, padded_rows(*rows), dtype, device), dtype)
        result = line.result if packer.kind == "one_row" else FAILED
        lines.append(Line(name, result, {**line.figures, "rows": packer.kind}))
    return lines


def liger(device: str, small: bool, _folder: Path) -> list[Line]:
    """A Llama with Liger's kernels against itself without, in float32 and bfloat16."""
    if find_spec("liger_kernel") is None:
        return [Line("liger", NOT_INSTALLED, {"package": "liger_kernel"})]
    if device == "cpu":
        return [Line("liger", NOT_HERE)]
    config = check_shape("llama", small=small)
    sequences = check_sequences(int(config.vocab_size), device, small)
    model = build(config, device)
    batch = BatchPacker(model).pack(sequences.input_ids, sequences.attention_mask, sequences.num_response)
    dtypes = (torch.float32, torch.bfloat16)
    plain = [rl_outputs(model, batch, dtype, device) for dtype in dtypes]
    apply_liger(model)
    fast = [rl_outputs(model, batch, dtype, device) for dtype in dtypes]
    return [
        judged_pair(f"liger, llama, {_name(dtype)}", found, expected, dtype)
        for dtype, found, expected in zip(dtypes, fast, plain, strict=True)
    ]


# -------------------------------------------------------------------------------------------- half precision


def bf16(device: str, small: bool, folder: Path) -> list[Line]:
    """Autocast to bfloat16 against float32, and a GRPO step in it."""
    lines = [_half_outputs("bf16, gradient", torch.bfloat16, device, small)]
    trainer = _half_trainer("grpo", "bf16", device, small, folder)
    assert isinstance(trainer, GRPOTrainer)
    trainer.sampler = HFEngine(  # which chooses among all tokens, so that log-probs can be compared
        lambda: trainer.lm,
        trainer.tokenizer,
        trainer.config.generation,
        version=lambda: trainer.policy_version,
        autocast=trainer.engine.autocast,
    )
    metrics = trainer.step()
    trainer.close()
    figures = {
        "sampler's log-probs from the trainer's": metrics["rollout/logprob_diff"],
        "skipped updates": metrics["train/skipped_updates"],
    }
    bounds = {"sampler's log-probs from the trainer's": 0.05, "skipped updates": 0.0}
    return [*lines, judged("bf16, a GRPO step", figures, bounds)]


def fp16(device: str, small: bool, folder: Path) -> list[Line]:
    """Autocast to float16 against float32; an update with a scale that overflows is skipped, counted, and
    lowers the scale; the next one with a fitting scale is not."""
    if device == "cpu":
        return [Line("fp16", NOT_HERE)]
    lines = [_half_outputs("fp16, gradient", torch.float16, device, small)]
    trainer = _half_trainer("sft", "fp16", device, small, folder)
    assert isinstance(trainer, SFTTrainer)
    scaler = trainer.engine.accelerator.scaler
    assert scaler is not None
    trainer.step()  # makes the scale
    scaler.update(2.0**40)
    before, scale = _weights(trainer.lm), scaler.get_scale()
    overflowed = trainer.step()["train/skipped_updates"]
    skipped = {
        "updates that were not skipped": 1.0 - overflowed,
        "weights that moved": float((_weights(trainer.lm) != before).sum()),
        "scale over the one before": scaler.get_scale() / scale,
    }
    bounds = {
        "updates that were not skipped": 0.0,
        "weights that moved": 0.0,
        "scale over the one before": 0.5,
    }
    lines.append(judged("fp16, an update that overflows", skipped, bounds))
    scaler.update(2.0**8)
    metrics = trainer.step()
    moved = float((_weights(trainer.lm) != before).float().mean())
    fits = metrics["train/skipped_updates"] == 0.0 and moved > 0.5 and metrics["train/loss"] < float("inf")
    figures = {
        "skipped updates": metrics["train/skipped_updates"],
        "share of weights that moved": moved,
        "loss": metrics["train/loss"],
    }
    lines.append(Line("fp16, the next update", PASSED if fits else FAILED, figures))
    trainer.close()
    return lines


def _weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _half_outputs(name: str, dtype: torch.dtype, device: str, small: bool) -> Line:
    config = check_shape("gpt2", small=small)
    model = build(config, device)
    samples = check_samples(int(config.vocab_size), small)
    batch = collate_packed(samples, PAD, max(len(each.token_ids) for each in samples), device)
    found, expected = (sft_outputs(model, batch, each, device) for each in (dtype, torch.float32))
    return judged_pair(name, found, expected, dtype)


def _half_trainer(algorithm: Any, precision: str, device: str, small: bool, folder: Path) -> Any:
    config = check_shape("gpt2", small=small)
    work: Work = work_of(algorithm, "125m", int(config.vocab_size), small=True)
    tokenizer = word_tokenizer(int(config.vocab_size))
    return conch_trainer(work, build(config, device), tokenizer, folder, precision)


# -------------------------------------------------------------------------------------------------- hand-over


def handover(device: str, small: bool, _folder: Path) -> list[Line]:
    """Weights handed to vLLM in this process: it samples as the policy does, before and after a change."""
    if find_spec("vllm") is None:
        return [Line("hand-over to vLLM", NOT_INSTALLED, {"package": "vllm"})]
    from conch.rollouts.vllm.build import check_installed

    try:
        check_installed()
    except ConfigError as error:
        return [Line("hand-over to vLLM", NOT_INSTALLED, {"why": str(error)})]
    from conch.rollouts.vllm.engine import ColocatedVLLM, VLLMEngine

    longest, dtype = 16, torch.float32 if device == "cpu" else torch.bfloat16
    config = check_shape("llama", small=small)
    model, tokenizer = build(config, device, dtype), word_tokenizer(int(config.vocab_size))
    prompts = check_prompts(int(config.vocab_size), 7, longest)
    generation = GenerationConfig(max_new_tokens=longest, chunk_size=len(prompts))
    rollout = RolloutConfig.model_validate(
        {
            "engine": "vllm",
            "kv_cache_memory_bytes": "256MiB",
            "gpu_memory_utilization": 0.2,
            "enforce_eager": True,
            "max_model_len": 256,
        }
    )
    vllm = ColocatedVLLM(lambda: model, rollout, dtype, several_ranks=False)
    lines, seen, bound = [], [], max(1e-3, rounding_bound(dtype))
    try:
        for version, name in ((1, "the first weights"), (2, "changed weights")):
            engine = VLLMEngine(vllm, tokenizer, generation, version=lambda version=version: version)
            ours = [each for chunk in engine.generate(prompts, greedy=True) for each in chunk]
            seen.append([each.completion.token_ids for each in ours])
            figures = compare_greedy(ours, plain_greedy(model, prompts, longest), bound)
            bounds = {"rows that differ": 0, "largest log-prob distance": bound}
            lines.append(judged(f"hand-over to vLLM, {name}, {_name(dtype)}", figures, bounds))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    finally:
        vllm.close()
    if seen[0] == seen[1]:
        lines.append(Line("hand-over to vLLM, the change is seen", FAILED))
    return lines


CHECKS: dict[str, Callable[[str, bool, Path], list[Line]]] = {
    "slots": slots,
    "packing": packing,
    "flash": flash,
    "liger": liger,
    "bf16": bf16,
    "fp16": fp16,
    "handover": handover,
}
"""Name -> check(device, small, folder)."""

_PACKAGES = {"flash": tuple(_FLASH.values()), "liger": ("liger_kernel",), "handover": ("vllm",)}


def lacks_packages(name: str) -> bool:
    """True for a check that can say nothing but `not installed`."""
    return name in _PACKAGES and all(find_spec(package) is None for package in _PACKAGES[name])
