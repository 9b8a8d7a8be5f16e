"""Run the `model.py` of a written version folder in a fresh process, the way a server would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conch.errors import ConversionError

_DEADLINE_S = 3600.0
_LAST_LINES = 8

Request = dict[str, Any]
"""{"texts": [...]} or {"input_ids": [[...]], "attention_mask": [[...]]}."""


class ServedForm:
    """The process. It imports its libraries at once and reads the folder's other files when asked to score,
    so it can be started as soon as `model.py` is there.

    Use as a context manager: leaving it ends the process.
    """

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(folder / "model.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def __enter__(self) -> ServedForm:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def score(self, requests: list[Request], device: str) -> list[dict[str, Any]]:
        """Per request {"scores": [[...], ...]} or {"error": "..."}. Can be called once.

        Raises:
            ConversionError: the process failed, with its last lines.
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
