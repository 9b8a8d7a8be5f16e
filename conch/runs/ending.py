"""What to say at the end of a run: its best evaluation, its checkpoint, and the commands that come next."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.cli.run_config import shell_word

_LOADERS = {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run came to its end.

    algorithm: as `conch train` names it.
    step, total_steps: done, and to be done.
    best: metric, value and step of the best evaluation; None without any.
    checkpoint: to use; None where none was saved.
    from_files: whether its settings name its data, so that a command line can repeat it.
    has_evaluations: whether completions of its evaluations are kept.
    stopped_early: whether a rule of its own ended it, which would do so again.
    num_processes: that it was launched with.
    """

    folder: Path
    algorithm: str
    step: int
    total_steps: int
    best: tuple[str, float, int] | None
    checkpoint: Path | None
    from_files: bool
    has_evaluations: bool
    stopped_early: bool = False
    num_processes: int = 1


def ending_text(ending: Ending) -> str:
    """Lines for a person, with commands that can be copied as they are, but for what is in capitals."""
    folder = _shown(ending.folder)
    lines = {"best": _best(ending), "checkpoint": _checkpoint(ending)}
    lines["report"] = f"conch report {shlex.quote(folder)}"
    if ending.checkpoint is not None:
        if not ending.stopped_early:
            lines["resume" if ending.step < ending.total_steps else "train on"] = _resume(ending, folder)
        if ending.algorithm == "reward_model":
            lines["serve"] = f"conch convert --checkpoint {shlex.quote(folder)} --name NAME"
        elif ending.has_evaluations:
            lines["evaluate"] = f"conch gold-eval {shlex.quote(folder)} GOLD"
        lines["load"] = f"{_loader(ending.checkpoint)}.from_pretrained({_shown(ending.checkpoint)!r})"
    head = f"{ending.algorithm}: {ending.step} of {ending.total_steps} steps are done"
    return "\n".join([head, *(f"  {name:<12}{text}" for name, text in lines.items() if text)])


def _best(ending: Ending) -> str:
    if ending.best is None:
        return ""
    metric, value, step = ending.best
    at_start = ", before training" if step == 0 else ""
    return f"{metric} {value:.4g} at step {step}{at_start}"


def _checkpoint(ending: Ending) -> str:
    if ending.checkpoint is None:
        return "none was saved"
    return _shown(ending.checkpoint)


def _resume(ending: Ending, folder: str) -> str:
    settings = [f"train.resume={folder}"]
    if ending.step >= ending.total_steps:
        settings.append(f"train.total_steps={2 * ending.total_steps}")
    if not ending.from_files:
        return f"the same call with {' and '.join(settings)} in its config"
    words = " ".join(map(_word, settings))
    if ending.num_processes > 1:  # by whichever launcher it was
        return f"the same command with {words}"
    verb = ending.algorithm.replace("_", "-")
    return f"conch {verb} --config-dir {shlex.quote(folder)} --config-name config {words}"


def _word(setting: str) -> str:
    value = setting.partition("=")[2]
    is_plain = all(letter.isalnum() or letter in "/._-" for letter in value)
    return setting if is_plain else shell_word(setting)


def _loader(checkpoint: Path) -> str:
    """The class of transformers that loads a checkpoint, which may be an adapter's."""
    config = _json(checkpoint / "config.json")
    architectures = config.get("architectures") or [""]
    kind = str(_json(checkpoint / "adapter_config.json").get("task_type") or "")
    if config.get("is_encoder_decoder"):
        kind = "SEQ_2_SEQ_LM"
    elif str(architectures[0]).endswith("ForSequenceClassification"):
        kind = "SEQ_CLS"
    return _LOADERS.get(kind, "AutoModelForCausalLM")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _shown(path: Path) -> str:
    """A path from where the user is, as far as it lies below."""
    try:
        here = Path.cwd()
    except OSError:  # deleted meanwhile
        return str(path)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
