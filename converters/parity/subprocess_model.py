"""Run the `model.py` of a written version folder in a fresh process, the way a server would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.converters.parity.forked_python import ENVIRONMENT, ForkedPython
from conch.errors import ConversionError

PYTHON = sys.executable
"""The interpreter that a `model.py` is run with."""
_DEADLINE_S = 3600.0
_LAST_LINES = 8

Request = dict[str, Any]
"""{"texts": [...]} or {"input_ids": [[...]], "attention_mask": [[...]]}; with "only_ids": true beside texts
the reply is {"ids": [[...]]}, what the model reads."""


class SubprocessModel:
    """A process that runs the `model.py` of a version folder.

    The process reads the folder's other files when `score` is called, so it can be made as soon as
    `model.py` is there. Leaving the context manager ends the process.

    fork: the process, for this model alone; None starts one, which imports its libraries at once.
    """

    def __init__(self, folder: Path, fork: ForkedPython | None = None) -> None:
        program = folder / "model.py"
        if fork is not None:
            fork.program = program
        self._process = fork or subprocess.Popen(
            [PYTHON, "-I", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **ENVIRONMENT},
        )

    def __enter__(self) -> SubprocessModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def score(self, requests: list[Request], device: str) -> list[dict[str, Any]]:
        """Return per request {"scores": [[...], ...]}, {"ids": ...} or {"error": "..."}. Can be called once.

        Raises:
            ConversionError: the process failed; the message has its last lines.
        """
        try:
            out, err = self._process.communicate(
                json.dumps({"device": device, "requests": requests}), timeout=_DEADLINE_S
            )
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"the converted model did not score within {_DEADLINE_S:.0f} s") from error
        if self._process.returncode != 0:
            last = "\n".join(err.splitlines()[-_LAST_LINES:])
            raise ConversionError(f"the converted model does not run outside this process:\n{last}")
        return json.loads(out)


def score_in_sequence(
    models: Sequence[SubprocessModel], requests: Sequence[Request], device: str
) -> list[dict[str, Any]]:
    """Send requests through models one after another, as a Triton ensemble does.

    The replies of one model are the requests of the next; an error stays the reply, and so do token ids that
    were asked for.

    Raises:
        ConversionError: a process failed.
    """
    replies = list(requests)
    for model in models:
        scored = iter(model.score([reply for reply in replies if not _is_final(reply)], device))
        replies = [reply if _is_final(reply) else next(scored) for reply in replies]
    return replies


def _is_final(reply: dict[str, Any]) -> bool:
    return "error" in reply or "ids" in reply
