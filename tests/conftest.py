"""Settings that must hold before `conch` or torch is imported, and markers by folder."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Tests reach no model hub, and small tensors on few cores are fastest with one thread per process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.pop("TRITON_HOST", None)

# Nor do they read or fill the user's caches, which may not be writable. Workers share one.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.mkdtemp(prefix="conch-tests-")
    atexit.register(shutil.rmtree, _caches, ignore_errors=True)
    os.environ["HF_HOME"] = _caches

import pytest
from jaxtyping import install_import_hook

# Every annotated shape and type of the library is checked while the tests run, unless they only run again.
if os.environ.get("CONCH_TESTS_CHECK_TYPES") != "0":
    install_import_hook("conch", "beartype.beartype")

# What a test writes need not outlive the machine's power; whoever reads it, also after a kill, reads it.
os.fsync = lambda fd: None  # pyright: ignore[reportAttributeAccessIssue]

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
_LOOPS = ("reward-", "judge-", "goals-")  # how the threads of open reward sources are named
FOLDER_MARKERS = {"unit": "unit", "integration": "integration", "invariance": "integration", "vllm": "vllm"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test after the folder it lives in."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(FOLDER_MARKERS[folder])


def pytest_collection_finish() -> None:
    """Keep what the imports made out of every later search for garbage, which takes a second over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _deployments_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests note down the servers that they deploy, and look for an environment of theirs, where the user's
    are not."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo `setup_logging`, whose handler would write to a stream that this test's end closes."""
    logger = logging.getLogger("conch")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="module", autouse=True)
def _trainers_of_a_module_are_closed() -> Iterator[None]:
    """Close the trainers that fixtures of a module made."""
    yield
    _close_trainers(0)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    """Close the test's trainers; a reward source that it left open is its failure.

    The connections of such a source are collected in the middle of some later test, which then fails by their
    ResourceWarning. Sources of fixtures of a module are there before this begins.
    """
    before = set(threading.enumerate())
    known = len(_open_trainers())
    yield
    _close_trainers(known)
    left = _open_since(before)
    if left:  # what closes itself once nobody holds it may be held by a traceback
        gc.collect()
        left = _open_since(before)
    assert not left, f"close what the test opened: {', '.join(left)}"


def _open_trainers() -> list[Any]:
    return getattr(sys.modules.get("tests.runs"), "OPEN", [])


def _close_trainers(known: int) -> None:
    """Close all but the first `known` of them."""
    trainers = _open_trainers()
    for trainer in trainers[known:]:
        trainer.close()
    del trainers[known:]


def _open_since(before: set[threading.Thread]) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(_LOOPS) and t not in before]


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib writes empty files: drawing takes most of the time of what also writes a picture."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate remembers a process's precision; forget it before and after."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
