"""Does nothing but find the other ranks; rank 0 writes what each of them knows to the file it is given."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

KNOWN = ("RANK", "GROUP_RANK", "MASTER_ADDR", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")


def main(file: Path) -> None:
    """See above."""
    dist.init_process_group("gloo")
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {name: os.environ.get(name) for name in KNOWN})
    if dist.get_rank() == 0:
        file.write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
