"""A gold server that kills itself when it is asked for the N-th time: python -m ... gold_server_run FILE N

The score of a sample is its length. FILE gets the server's address.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from conch.atomic_files import replace_text
from tests.fakes.json_rewards import Reply, endpoint, lengths


def main(argv: Sequence[str]) -> None:
    """Serve until killed."""
    file, left = Path(argv[0]), [int(argv[1])]

    def answer(samples: list[str]) -> Reply:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return lengths(samples)

    with endpoint(answer) as server:
        replace_text(file, server.url)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
