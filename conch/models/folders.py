"""The folder that a path to a model means, itself or a checkpoint of the run in it; the base of an adapter.

No torch here: commands that only look at files answer at once.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from conch.errors import ModelError, missing_path
from conch.log import get_logger

_log = get_logger(__name__)

ADAPTER_FILE = "adapter_config.json"
"""peft's file name; a folder with this file holds an adapter, not a model."""

BASE_MODEL_KEY = "base_model_name_or_path"
"""Key of `ADAPTER_FILE` that names the base model."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CHECKPOINTS = "checkpoints"


def model_folder(path: str, setting: str) -> str:
    """Return the folder or hub id to load from: of a run's folder its best checkpoint, else its last.

    setting: that names the path, for messages.

    Raises:
        ModelError: no such folder, though the path can be nothing else; names the nearest one. The hub is
            not asked.
    """
    folder = Path(path).expanduser()
    if folder.exists():
        return str(_checkpoint_of(folder) or folder)
    if _HUB_NAME.fullmatch(path) and not _is_local(path):
        return path
    if folder.name == "best" and folder.parent.name == _CHECKPOINTS and folder.parent.is_dir():
        raise ModelError(
            f"`{setting}` = {path}: the run has no best checkpoint, since no evaluation was better than that "
            f"of its start; {folder.parent.parent} takes its last one"
        )
    raise ModelError(f"`{setting}` = {path}: there is no such folder{missing_path(folder)}")


def _checkpoint_of(folder: Path) -> Path | None:
    """The checkpoint to take of a run's folder; None where the folder is none, or has none."""
    if (folder / "config.json").is_file() or not (folder / _CHECKPOINTS).is_dir():
        return None
    steps = [path for path in (folder / _CHECKPOINTS).glob("step_*") if path.name[5:].isdecimal()]
    best = folder / _CHECKPOINTS / "best"
    if not best.is_dir() and not steps:
        return None
    taken = best if best.is_dir() else max(steps, key=lambda path: int(path.name[5:]))
    _tell(folder, taken.resolve())
    return taken


@functools.cache
def _tell(run: Path, taken: Path) -> None:
    """Once, for model and tokenizer are both looked for."""
    _log.info("%s is a run: taking its checkpoint %s", run, taken.name)


def _is_local(path: str) -> bool:
    """Whether the first part of `a/b` is here: then something in it is meant, not `owner/name`."""
    first, slash, _ = path.partition("/")
    return bool(slash) and Path(first).exists()


def adapter_base(path: str) -> str | None:
    """Path or name of the base model of the adapter in `path`; None where `path` holds no adapter.

    Raises:
        ModelError: the adapter's file names none, or is damaged.
    """
    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text())[BASE_MODEL_KEY]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged: it names no base model ({error})") from error
    if not base:
        raise ModelError(f"{file} names no base model: set {BASE_MODEL_KEY!r} there to a folder")
    return str(base)
