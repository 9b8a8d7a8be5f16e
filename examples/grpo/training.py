"""One training process: prompts, trainer, checkpoints. `grpo.py` runs it in its own process, or has this file
run in one, or by a launcher in several, with the settings in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.atomic_files import replace_text
from conch.cli import run_main
from conch.config import load
from conch.config.algorithms.async_grpo import AsyncGRPORunConfig
from conch.config.algorithms.grpo import GRPORunConfig
from conch.errors import ConchError
from examples.grpo.async_settings import AsyncExampleConfig
from examples.grpo.prompts import TAGS, form_asked_for, read_prompts
from examples.grpo.settings import ExampleConfig
from examples.grpo.translation import run_section, with_names_of_here

if TYPE_CHECKING:
    from conch.trainers.grpo import GRPOTrainer


@dataclass(frozen=True)
class Task:
    """What a training process is to do.

    config: the settings of `grpo.py`, or of `grpo-async.py`.
    run: what these became.
    argv: the command line.
    config_name: the file that was run.
    """

    config: ExampleConfig
    run: GRPORunConfig
    argv: Sequence[str]
    config_name: str

    def write(self, file: Path) -> None:
        """Write it for `read`."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in ("config", "run")}
        overlaps = isinstance(self.config, AsyncExampleConfig)
        words = {"overlaps": overlaps, "argv": list(self.argv), "config_name": self.config_name}
        replace_text(file, json.dumps({**words, **sections}))

    @classmethod
    def read(cls, file: Path) -> Task:
        """Read what `write` wrote."""
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config = load(AsyncExampleConfig if values["overlaps"] else ExampleConfig, values["config"])
        run = load(run_section(config), values["run"])
        return cls(config, run, values["argv"], values["config_name"])


def train(task: Task) -> Path:
    """Train; returns the run's folder. All training processes call it.

    Raises:
        ConchError: as the trainer does, with settings under the names that they have here.
    """
    try:
        return _train(task)
    except ConchError as error:
        error.args = (with_names_of_here(str(error), type(task.config)),)
        raise


def _train(task: Task) -> Path:
    # They load torch, which help and mistyped keys of the programs do without.
    from conch.models.loading import load_tokenizer
    from examples.grpo.outputs import complete_torch_checkpoints, write_hydra_files, write_torch_checkpoint

    config, run = task.config, task.run
    tokenizer = load_tokenizer(run.tokenizer, run.model.path)
    if set(TAGS) & set(tokenizer.all_special_tokens):  # else the reward would not see them
        run = load(type(run), {**run.model_dump(), "generation": _with_tags(run)})
    prompts, held_out = read_prompts(
        config.env,
        form_asked_for(config.env.dataset, run.reward),
        has_template=bool(tokenizer.chat_template),
        evaluates=run.train.eval_every > 0,
    )
    with closing(_trainer(run, prompts=prompts, eval_prompts=held_out)) as trainer:

        def prepare_files() -> None:
            if trainer.collectives.is_main:
                write_hydra_files(trainer.run_dir, config, task.argv, task.config_name)
                complete_torch_checkpoints(trainer.run_dir)

        trainer.collectives.run_on_all_ranks(prepare_files)
        trainer.run.on_saved = write_torch_checkpoint
        return trainer.fit()


def _trainer(run: GRPORunConfig, **data: Any) -> GRPOTrainer:
    if isinstance(run, AsyncGRPORunConfig):
        from conch.trainers.async_grpo import AsyncGRPOTrainer

        trainer = AsyncGRPOTrainer(run, **data)
        trainer.overlap.device_settings = ("train_model.num_devices", "inference_model.num_devices")
        return trainer
    from conch.trainers.grpo import GRPOTrainer

    return GRPOTrainer(run, **data)


def _with_tags(run: GRPORunConfig) -> dict[str, Any]:
    return {**run.generation.model_dump(), "skip_special_tokens": False}


def main(argv: Sequence[str]) -> None:
    """Command line: the file of a `Task`."""
    train(Task.read(Path(argv[0])))


if __name__ == "__main__":
    run_main(main)
