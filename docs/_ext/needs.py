"""A line above a block of commands that says what they need, where that is more than this checkout.

    <!-- needs: gpu, hub -->
    ```bash

shows as "Needs: GPUs; models or datasets of the Hugging Face hub." In a browser of the repository it is not
seen.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

NEEDS = {
    "gpu": "GPUs",
    "hub": "models or datasets of the Hugging Face hub",
    "docker": "Docker, and a registry of images",
    "singularity": "Singularity or Apptainer",
    "slurm": "Slurm",
    "cluster": "several machines",
    "server": "a server in another shell",
    "long": "minutes to hours",
    "peer": "another library than Conch",
}
"""Word of a marker -> what a reader sees."""

_MARKER = re.compile(r"^<!-- needs: ([\w, ]+) -->$", re.MULTILINE)


def shown(text: str) -> str:
    """A page's text with its markers as lines that are seen.

    Raises:
        KeyError: a marker's word is not known.
    """
    return _MARKER.sub(
        lambda match: f"*Needs: {'; '.join(NEEDS[word] for word in match[1].split(', '))}.*", text
    )


def _show(app: Sphinx, name: str, source: list[str]) -> None:
    del app, name
    source[0] = shown(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _show)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
