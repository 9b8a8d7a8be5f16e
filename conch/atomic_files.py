"""What a file system must be told before a rename can be trusted."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk take what was written to a file; of a folder, its entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """The same for all that is in a folder, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
