"""A run's folder, and its metrics: in JSONL, on the console, and where configured in W&B and TensorBoard."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from conch.atomic_files import replace_text
from conch.config import Section, TrackingConfig, TrainConfig
from conch.errors import ConfigError, first_line, install_extra
from conch.log import is_main_process
from conch.runs.board import has_evaluation, has_training
from conch.runs.console import RunConsole, open_console, write_notice
from conch.runs.state import METRICS_FILE
from conch.types import Metrics


def make_run_dir(config: TrainConfig) -> Path:
    """Create the run's folder: `config.run_dir`, or a new `<output_dir>/<date>/<time>/`.

    Call it on one rank and share the result.

    Raises:
        ConfigError: the folder holds another run, or cannot be created.
    """
    if config.run_dir is None:
        return _make_new_folder(config.output_dir / datetime.now().strftime("%Y-%m-%d/%H-%M-%S"))
    folder = config.run_dir
    check_unused(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(_cannot_create(folder, "train.run_dir", error)) from error
    return folder.resolve()


def check_unused(folder: Path) -> None:
    """Refuse a folder for a new run that holds another one.

    Raises:
        ConfigError: it does.
    """
    if (folder / METRICS_FILE).exists():
        raise ConfigError(
            f"{folder} holds another run: go on with it by `train.resume=auto`, choose another "
            "`train.run_dir`, or delete that one"
        )


def _make_new_folder(first_choice: Path) -> Path:
    """Create `first_choice`, or the same with a number behind where another run began in this very second."""
    folder, attempt = first_choice, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            attempt += 1
            folder = first_choice.with_name(f"{first_choice.name}-{attempt}")
        except OSError as error:
            raise ConfigError(_cannot_create(folder, "train.output_dir", error)) from error
        else:
            return folder.resolve()


def _cannot_create(folder: Path, setting: str, error: OSError) -> str:
    return f"the run folder {folder} cannot be created ({error.strerror}): choose another `{setting}`"


class Tracker:
    """Writes metrics and sample tables on rank 0 and nothing elsewhere. A context manager.

    done_steps: steps done before a resume; later rows of `metrics.jsonl` are cut off, for they come again.
        None for a new run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        total_steps: int,
        desc: str,
        run_config: Section | None = None,
        done_steps: int | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._config = config
        self._active = is_main_process()
        self._sinks: list[_Sink] = []
        self._console: RunConsole | None = None
        self._open_console = partial(open_console, desc, total_steps, max(0, done_steps or 0), run_dir)
        if self._active:
            resolved = run_config.model_dump(mode="json") if run_config else {}
            self._sinks = _open_sinks(run_dir, config, resolved, done_steps)

    def log(self, step: int, metrics: Metrics, *, is_best: bool = False) -> None:
        """Record one step's metrics (`stage/quantity` -> value); not-a-number values are written as null.

        is_best: the evaluation among them is the best so far.
        """
        if not self._active:
            return
        for sink in self._sinks:
            sink.log(step, metrics)
        if self._console is None:
            return
        if has_training(metrics):
            self._console.training(step, metrics)
        if has_evaluation(metrics):
            self._console.evaluation(step, metrics, is_best=is_best)

    def notice(self, text: str) -> None:
        """Show a sentence at once, from a signal's handler too."""
        if self._console is not None:
            self._console.notice(text)
        elif self._active:
            write_notice(text)

    def say(self, text: str) -> None:
        """Print some lines where the run is watched, also after `close`."""
        if self._console is not None:
            self._console.say(text)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write `samples/<name>_<step>.csv` with the first `sample_rows` rows."""
        if not self._active or not rows or self._config.sample_rows == 0:
            return
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        with (folder / f"{name}_{step:06d}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows[: self._config.sample_rows])

    def close(self) -> None:
        """Flush and close all sinks."""
        try:
            if self._console is not None:
                self._console.close()
        finally:
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> Tracker:
        """Show the run, from here on."""
        if self._active:
            self._console = self._open_console()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


@runtime_checkable
class _Sink(Protocol):
    """Destination of metrics."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class _JsonlSink:
    """Writes one JSON object a line, flushed at once so that a killed run loses nothing."""

    def __init__(self, run_dir: Path, done_steps: int | None) -> None:
        path = run_dir / METRICS_FILE
        if path.exists():
            _cut_rows(path, -1 if done_steps is None else done_steps)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cut_rows(path: Path, last_step: int) -> None:
    """Drop rows of later steps, and a last row that a kill left unfinished."""
    rows: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", last_step + 1) <= last_step:
            rows.append(line)
    replace_text(path, "".join(f"{line}\n" for line in rows))


class _TensorBoardSink:
    def __init__(self, run_dir: Path, done_steps: int | None) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"`tracking.tensorboard` needs the package: {install_extra('tensorboard')}"
            ) from error
        purge = None if done_steps is None else done_steps + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    def __init__(self, run_dir: Path, project: str, resolved: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"`tracking.wandb` needs the package: {install_extra('wandb')}") from error
        has_login = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_login else "offline")
        id_file = run_dir / "wandb_id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project=project, dir=str(run_dir), config=dict(resolved), mode=mode, id=run_id, resume="allow"
            )
        except wandb.Error as error:
            raise ConfigError(
                f"`tracking.wandb` cannot start: {first_line(error)}; "
                "WANDB_MODE=offline logs to the run folder alone"
            ) from error

        id_file.write_text(f"{self._run.id}\n")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _open_sinks(
    run_dir: Path, config: TrackingConfig, resolved: Mapping[str, Any], done_steps: int | None
) -> list[_Sink]:
    others: list[_Sink] = []
    if config.tensorboard:
        others.append(_TensorBoardSink(run_dir, done_steps))
    if config.wandb:
        others.append(_WandbSink(run_dir, config.project, resolved))
    # Opened last, so that a run that cannot start leaves no file that says there was one; written to first.
    return [_JsonlSink(run_dir, done_steps), *others]
