"""A client of a training service that takes completions and rewards none of them, to be killed.

python -m tests.integration.remote_client URL KEY
"""

from __future__ import annotations

import sys
import time

from conch.service.client import TrainingClient


def main(url: str, key: str) -> None:
    """Ask once, say so, and sleep."""
    with TrainingClient(url, key, client_id="doomed") as client:
        client.get_completions("abc")
        print("asked", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
