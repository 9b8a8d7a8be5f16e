"""Logging that knows its rank, and progress bars that know whether a person is watching."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[Any]
else:
    _StreamHandler = logging.StreamHandler  # which Python 3.10 does not know to be generic

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def rank() -> int:
    """This process's rank as the launcher set it (torchrun, accelerate); 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """True on rank 0, the one process that prints and writes."""
    return rank() == 0


def get_logger(name: str) -> logging.Logger:
    """A logger below `conch`; messages of other ranks than 0 show from WARNING on, with their rank."""
    return logging.getLogger(name)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the `conch` loggers to stderr; call it once, in a program's `main`."""
    prefix = "" if is_main_process() else f"[rank {rank()}] "
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    root = logging.getLogger("conch")
    root.handlers[:] = [handler]
    root.setLevel(level if is_main_process() else max(level, logging.WARNING))
    root.propagate = False
    quieten_libraries()
    # Libraries below us repeat these at every step; none is about anything a user of Conch can change.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*is deprecated", category=FutureWarning)


class _StderrHandler(_StreamHandler):
    """Writes to what `sys.stderr` is at the time: the display of a run stands there while it is open."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Quiet(logging.Filter):
    """Drops records by the words in them, and lets the others through, where `to_stderr` is set to stderr."""

    def __init__(self, *words: str, to_stderr: bool = False) -> None:
        super().__init__()
        self._words = words
        self._to_stderr = to_stderr

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if any(word in message for word in self._words):
            return False
        if self._to_stderr:
            print(f"{record.levelname} {record.name}: {message}", file=sys.stderr)
        return not self._to_stderr


_QUIET = {
    # Texts are measured before they are encoded, and what is cut is counted.
    "transformers.tokenization_utils_base": _Quiet("Token indices sequence length is longer than"),
    # What a checkpoint lacks is refused or made anew, by name, in `conch.models.loading`.
    "transformers.modeling_utils": _Quiet("LOAD REPORT"),
    # DeepSpeed logs to stdout, where programs print their results.
    "DeepSpeed": _Quiet("Setting accelerator to CPU", to_stderr=True),
}


def quieten_libraries() -> None:
    """Keep what libraries say of what Conch itself checks or reports out of a program's output."""
    for name, words in _QUIET.items():
        logging.getLogger(name).addFilter(words)


def progress(iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str = "") -> tqdm[Any]:
    """A progress bar with rate and time left on a terminal; silent elsewhere and on other ranks than 0."""
    hidden = not (is_main_process() and sys.stderr.isatty())
    return tqdm(iterable, total=total, desc=desc, disable=hidden, dynamic_ncols=True, leave=False)
