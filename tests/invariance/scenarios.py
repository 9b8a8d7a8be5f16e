"""Small pieces of training whose results must not depend on how many processes share the work.

Run as a script under torchrun it writes what every rank found to `<folder>/rank_<number>.pt`.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed
from transformers import LlamaConfig, LlamaForCausalLM

from conch.config import TrainConfig
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConchError, ConfigError
from conch.training.overlap.metrics import LengthAudit, staleness_metrics
from conch.training.reward_shaping import RunningMoments
from conch.types import RewardResult, RewardStatus
from tests.runs import (
    LINEAR_ADAM,
    TOKENIZER,
    batch_and_metrics,
    grpo_trainer,
    ilql_trainer,
    letters_rollout,
    parameters,
    policy,
    ppo_trainer,
    reward_trainer,
    scored,
    sft_trainer,
)

SMALL = {"n_layer": 1, "n_embd": 16}
# Whichever way they are dealt out, one rank gets the long ones.
PAIR = {"prompt": "abcd", "completion": "e"}
SAMPLES = ["ab", "abcdefgh", "c", "hgfedcba", "de", "bcdefghab", PAIR, "ccccccc"]
SCORED = [{"text": "ab" * n, "score": float(n % 3)} for n in range(1, 8)]
PAIRS = [{"chosen": "ab" * n, "rejected": "c" * n, "margin": n / 4} for n in range(1, 8)]
ROLLOUTS = [
    letters_rollout("a", "bcdef"),
    letters_rollout("bcd", "e"),
    letters_rollout("ef", "ghabc", "length"),
    letters_rollout("g", "", "stop"),
    letters_rollout("ha", "aaaa", "stop"),
    letters_rollout("b", "h"),
    letters_rollout("cdefg", "abcd"),
    letters_rollout("d", "f", "length"),
]
REWARDS = [
    *scored(1.0, -9.0, 0.5, 3.0, None, 1.5, -1.0),
    RewardResult(RewardStatus.OK, token_scores=(4.0,)),
]

GROUPS = [
    *(letters_rollout("ab", text) for text in ("bcdef", "e", "ghabc", "aaaa")),
    *(letters_rollout("h", text, "stop") for text in ("h", "", "abcd", "f")),
]
GROUP_REWARDS = scored(1.0, -9.0, 0.5, None, 3.0, 1.5, -1.0, 2.0)


def processes(folder: Path) -> dict[str, Any]:
    """How many there truly are, and that an engine refuses another number."""
    running = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {
        "world_size": running,
        "engine": TrainEngine(TrainConfig(num_processes=running)).collectives.num_ranks,
        "refused": message_of(lambda: TrainEngine(TrainConfig(num_processes=running + 1))),
    }


def sft(folder: Path) -> dict[str, Any]:
    """One update in float64, and an evaluation whose samples do not divide among ranks."""
    trainer = sft_trainer(
        folder / "sft",
        SAMPLES,
        lm=policy(**SMALL),
        eval_samples=SAMPLES[:5],
        optimizer=LINEAR_ADAM,
        sft={"batch_size": 8},
    )
    before = trainer.evaluate()["eval/loss"]
    metrics = trainer.step()
    del metrics["train/padding_fraction"]  # is as it is laid out
    return {**numbers(metrics), "before": before, "parameters": parameters(trainer.lm)}


def regression(folder: Path) -> dict[str, Any]:
    """One update of a reward model, its evaluation and its moments."""
    return _reward_model(folder / "regression", SCORED)


def pairs(folder: Path) -> dict[str, Any]:
    """The same on preferences, with all that there is to their loss."""
    return _reward_model(folder / "pairs", PAIRS, center_coef=0.1, normalise=True)


def _reward_model(run_dir: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    trainer = reward_trainer(
        run_dir,
        rows,
        eval_samples=rows,
        optimizer=LINEAR_ADAM,
        reward_model={"batch_size": 8, **settings},
    )
    metrics = {**trainer.evaluate(), **trainer.step()}
    (mean,), (std,) = trainer.moments()
    return {**numbers(metrics), "mean": mean, "std": std, "parameters": parameters(trainer.model)}


def ilql(folder: Path) -> dict[str, Any]:
    """Two updates, with a move of the targets between them."""
    texts = [sample if isinstance(sample, str) else "".join(sample.values()) for sample in SAMPLES]
    trainer = ilql_trainer(
        folder / "ilql",
        texts,
        [float(len(text)) for text in texts],
        lm=policy(**SMALL),
        optimizer=LINEAR_ADAM,
        ilql={"batch_size": 8, "steps_for_target_q_sync": 1},
    )
    metrics = {
        f"{name} {step}": value for step in range(2) for name, value in numbers(trainer.step()).items()
    }
    return {**metrics, "parameters": parameters(trainer.policy)}


def ppo(folder: Path) -> dict[str, Any]:
    """Two steps on given rollouts: rewards scaled by running moments, a failure, an adaptive KL weight."""
    trainer = ppo_trainer(
        folder / "ppo",
        lm=policy(**SMALL),
        optimizer=LINEAR_ADAM,
        ppo={
            "kl": {"coef": 0.2, "target": 0.01, "horizon": 100},
        },
        shaping={"clip": 5.0, "scaling": "running", "missing_eos_penalty": 1.0},
    )
    rank, ranks = trainer.collectives.rank, trainer.collectives.num_ranks
    found: dict[str, Any] = {}
    for step in range(2):
        batch, metrics = batch_and_metrics(trainer, ROLLOUTS[rank::ranks], REWARDS[rank::ranks])
        metrics |= trainer.update(batch)
        found |= {f"{name} {step}": value for name, value in numbers(metrics).items()}
    moments = trainer.shaper.moments
    own_tokens = int(batch.loss_mask.sum())
    assert ranks == 1 or trainer.collectives.all_reduce_int(own_tokens) != ranks * own_tokens, (
        "token counts are equal"
    )
    return {
        **found,
        "kl_coef": trainer.kl_controller.coef,
        "moments": torch.tensor([moments.count, moments.mean, moments.std], dtype=torch.float64),
        "kl_to_start": trainer.kl_to_start(ROLLOUTS[rank::ranks]),
        "parameters": parameters(trainer.policy),
    }


def grpo(folder: Path) -> dict[str, Any]:
    """Two steps on given groups, a failed reward among them: the update finds the policy's log-probs, and the
    KL that the adaptive weight goes by."""
    trainer = grpo_trainer(
        folder / "grpo",
        lm=policy(**SMALL),
        optimizer=LINEAR_ADAM,
        grpo={"kl": {"coef": 0.2, "target": 0.01, "horizon": 100}},
        train={"gradient_accumulation_steps": 2},
    )
    rank, size = trainer.collectives.rank, len(GROUPS) // trainer.collectives.num_ranks
    mine = slice(rank * size, (rank + 1) * size)
    found: dict[str, Any] = {}
    for step in range(2):
        batch, metrics = batch_and_metrics(trainer, GROUPS[mine], GROUP_REWARDS[mine])
        assert batch.old_logprobs is None
        metrics |= trainer.update(batch)
        found |= {f"{name} {step}": value for name, value in numbers(metrics).items()}
    assert found["policy/kl 1"] != 0.0
    return {
        **found,
        "kl_coef": trainer.kl_controller.coef,
        "kl_to_start": trainer.kl_to_start(GROUPS[mine]),
        "parameters": parameters(trainer.policy),
    }


def stale(folder: Path) -> dict[str, Any]:
    """A step on samples of several ages, weighed for it; and what is watched of them."""
    trainer = grpo_trainer(
        folder / "stale",
        lm=policy(**SMALL),
        optimizer=LINEAR_ADAM,
        rollout={"logprob_diff_alarm": 1e-9},
        grpo={"kl": {"coef": 0.0}, "correction": {"kind": "mask", "level": "sequence", "low": 0.1}},
    )
    ranks = trainer.collectives
    size = len(GROUPS) // ranks.num_ranks
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    trainer.policy_version = 5
    sampled = [replace(each, policy_version=row // 2) for row, each in enumerate(GROUPS)][mine]
    batch, metrics = batch_and_metrics(trainer, sampled, GROUP_REWARDS[mine])
    metrics |= trainer.update(batch)
    audit = LengthAudit(longest=6)
    for row, each in enumerate(sampled):
        audit.note_sampled(len(each.completion.token_ids))
        if row % 2:
            audit.note_trained(len(each.completion.token_ids))
    watched = staleness_metrics(sampled, 5, ranks.all_reduce, ranks.all_reduce_max)
    assert watched["staleness/max"] == 5.0 and metrics["rollout/length_max"] == 6.0
    return {
        **numbers(metrics),
        **watched,
        **audit.metrics(ranks.all_reduce),
        "age": batch.age,
        "newest": ranks.all_reduce_int(int(batch.newest.sum())),
        "parameters": parameters(trainer.policy),
    }


def moments(folder: Path) -> dict[str, Any]:
    """Running moments of batches of unequal size, one of them empty on a rank."""
    engine, running = TrainEngine(TrainConfig()), RunningMoments()
    for batch in ([1.0, 5.0, 2.0], [7.0], [-3.0, math.nan, 4.0, 8.0]):
        mine = torch.tensor(batch[engine.collectives.rank :: engine.collectives.num_ranks])
        running.update(mine, ~mine.isnan(), engine.collectives.all_reduce)
    return {"count": running.count, "mean": running.mean, "std": running.std}


def rank_dependent(folder: Path) -> dict[str, Any]:
    """What ranks draw and sample, and that they agree after a real step."""
    trainer = ppo_trainer(folder / "step", ppo={"rollouts_per_step": 8, "minibatches": 2, "epochs": 2})
    same_prompt = [trainer.prompts[0]] * 8
    rollouts = trainer.rollout(same_prompt)
    trainer.score(rollouts)
    outputs = [rollout.completion.text for rollout in rollouts]
    rows = copy.deepcopy(trainer.stream).draw(8 // trainer.collectives.num_ranks)
    metrics = trainer.step()
    first = {name: metrics[f"train/{name}_first"] for name in ("ratio", "approx_kl", "clip_fraction")}
    return {"outputs": outputs, "rows": rows, "first": first, "parameters": parameters(trainer.policy)}


def uneven_evaluation(folder: Path) -> dict[str, Any]:
    """Evaluations in which ranks do unequal numbers of forward passes, or none."""
    prompts = ["a", "b", "cd", "e", "fgh"]
    settings: dict[str, Any] = {"ppo": {"forward_batch_size": 1}, "generation": {"max_new_tokens": 3}}
    many = ppo_trainer(folder / "many", lm=llama(), eval_prompts=prompts, **settings).evaluate()
    one = ppo_trainer(folder / "one", lm=llama(), eval_prompts=prompts[:1], **settings).evaluate()
    return {"many": numbers(many), "one": numbers(one)}


def llama() -> LlamaForCausalLM:
    """Has buffers, which DDP would send around in each forward pass, and wait for who has none to make."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=16, **size))


def broken_gradient(folder: Path) -> dict[str, Any]:
    """An update in which the last rank alone has a gradient that is not finite."""
    trainer = sft_trainer(folder / "broken", SAMPLES, lm=policy(**SMALL))
    before, engine = parameters(trainer.lm), trainer.engine
    scale = math.inf if engine.collectives.rank == engine.collectives.num_ranks - 1 else 1.0
    (batch,) = trainer.experience(trainer.samples)
    report = engine.update([scale], lambda factor: factor * engine.module(batch))
    return {"skipped": report.skipped, "moved": not torch.equal(before, parameters(trainer.lm))}


def failures(folder: Path) -> dict[str, Any]:
    """What each rank raises when the last one alone fails."""
    engine = TrainEngine(TrainConfig())

    def work() -> None:
        if engine.collectives.rank == engine.collectives.num_ranks - 1:
            raise ConfigError("here")

    def reward(outputs: list[str], **_: Any) -> list[float]:
        bad = engine.collectives.rank == engine.collectives.num_ranks - 1
        return [math.nan if bad else 1.0 for _ in outputs]

    trainer = ppo_trainer(folder / "failures", reward_fn=reward)
    indivisible = {"ppo": {"rollouts_per_step": 4 * engine.collectives.num_ranks + 1, "minibatches": 2}}
    return {
        "together": message_of(lambda: engine.collectives.run_on_all_ranks(work)),
        "step": message_of(trainer.step),
        "indivisible": message_of(lambda: ppo_trainer(folder / "indivisible", **indivisible)),
    }


def message_of(work: Callable[[], object]) -> str:
    """`<type>: <message>` of the error that `work` must raise."""
    try:
        work()
    except ConchError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """Without what is measured by the clock."""
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "reward/lat"))}


SCENARIOS = (
    processes,
    sft,
    regression,
    pairs,
    ilql,
    ppo,
    grpo,
    stale,
    moments,
    rank_dependent,
    uneven_evaluation,
    broken_gradient,
    failures,
)


def main(folder: Path) -> None:
    """Run all scenarios on this rank and write what it found."""
    torch.set_num_threads(1)
    engine = TrainEngine(TrainConfig())
    found = {scenario.__name__: scenario(folder / "runs") for scenario in SCENARIOS}
    torch.save(found, folder / f"rank_{engine.collectives.rank}.pt")
    engine.collectives.barrier()
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
