"""Logging that knows its rank, and progress bars that know whether a person is watching."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    root = logging.getLogger("conch")
    root.handlers[:] = [handler]
    root.setLevel(level if is_main_process() else max(level, logging.WARNING))
    root.propagate = False
    # Libraries below us repeat these at every step; none is about anything a user of Conch can change.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*is deprecated", category=FutureWarning)


def progress(iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str = "") -> tqdm[Any]:
    """A progress bar with rate and time left on a terminal; silent elsewhere and on other ranks than 0."""
    hidden = not (is_main_process() and sys.stderr.isatty())
    return tqdm(iterable, total=total, desc=desc, disable=hidden, dynamic_ncols=True, leave=False)
