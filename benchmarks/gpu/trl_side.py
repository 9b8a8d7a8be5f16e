"""Steps of TRL's trainers, in the same terms as `benchmarks/gpu/sides.py`. TRL 1 has SFT and GRPO; PPO was
taken out of it.

The trainer has the loop, so a callback times the steps and records the last one. All that is not set here is
TRL's default, but for gradient checkpointing, which is on there.
"""

from __future__ import annotations

import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.gpu.cases import BETA, CountDown, Work
from benchmarks.gpu.profiling import Recorder, synchronize
from benchmarks.gpu.sides import LEARNING_RATE, check_tokens, rewards_of

TRAINERS = {"sft": "SFTTrainer", "grpo": "GRPOTrainer"}


class Timer(TrainerCallback):
    """Times steps, the first of which warms up, and records the one after the last that is timed.

    steps: timed at most. seconds: after which no further one is timed; one is.
    """

    def __init__(self, device: str, steps: int, seconds: float) -> None:
        self.column: list[float] = []
        self.recorded: dict[str, Any] = {}
        self._device = device
        self._steps = steps
        self._seconds = seconds
        self._until = 0.0
        self._number = 0
        self._started = 0.0
        self._recorder: Recorder | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to time, or to record."""
        if len(self.column) >= self._steps or (self.column and time.perf_counter() > self._until):
            self._recorder = Recorder(self._device)
            self._recorder.start()
        synchronize(self._device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step's seconds; after the recorded one nothing follows."""
        synchronize(self._device)
        seconds = time.perf_counter() - self._started
        self._number += 1
        if self._recorder is not None:
            self._recorder.stop()
            self.recorded = self._recorder.figures
            control.should_training_stop = True
        elif self._number > 1:
            self.column.append(seconds)
        else:
            self._until = time.perf_counter() + self._seconds


def settings(work: Work, device: str, folder: Path) -> dict[str, Any]:
    """What TRL's configurations are told."""
    common = {
        "output_dir": str(folder / "trl"),
        "max_steps": 1000,
        "per_device_train_batch_size": work.rows // work.micro_batches,
        "gradient_accumulation_steps": work.micro_batches,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
    }
    if work.algorithm == "sft":
        return {**common, "max_length": work.capacity, "dataset_num_proc": None}
    return {
        **common,
        "num_generations": work.group_size,
        "max_completion_length": work.longest,
        "beta": BETA,
        "loss_type": "grpo",
        "disable_dropout": True,
        "model_init_kwargs": {"dtype": "float32"},
    }


def trl_trainer(
    work: Work,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    device: str,
    timer: Timer,
) -> Any:
    """TRL's trainer over the rows of `work`."""
    trl, datasets = import_module("trl"), import_module("datasets")
    key = "text" if work.algorithm == "sft" else "prompt"
    given = {
        "train_dataset": datasets.Dataset.from_list([{key: text} for text in work.texts]),
        "processing_class": tokenizer,
        "callbacks": [timer],
    }
    if work.algorithm == "sft":
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings(work, device, folder)), **given)

    def reward(prompts: list[str], completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        # TRL samples all of a step's completions at once.
        check_tokens(work, sum(map(len, completion_ids)))
        return rewards_of([prompt + text for prompt, text in zip(prompts, completions, strict=True)])

    path = folder / "model"  # the reference is loaded from where the policy is
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainer = trl.GRPOTrainer(
        model=str(path), reward_funcs=reward, args=trl.GRPOConfig(**settings(work, device, folder)), **given
    )
    processors = LogitsProcessorList([CountDown(work.longest)])
    trainer.model.generate = partial(trainer.model.generate, logits_processor=processors)
    return trainer
