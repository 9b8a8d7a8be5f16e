"""A client in a container of its own: asks the service for answers, rewards them, and takes the model home.

Settings are variables: `SERVICE_URL`, `CONCH_SERVICE_KEY`, `MODEL` (a folder on the service's machine),
`STEPS`, and `RESULT`, the file that the model goes to. Nothing of training is installed here. Put your own
task in place of the lists and the reward. Started again, it joins the run that is under way.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from conch.errors import ServiceError
from conch.service.client import TrainingClient
from examples.remote.alphabetical import lists, reward, settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Train to the end of the run, and download what it has learned; exit code 1 after an error."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="task.py", description=__doc__, formatter_class=raw)
    parser.parse_args(argv)
    if "SERVICE_URL" not in os.environ:
        parser.error("set the variable SERVICE_URL to the service's address, http://HOST:PORT")
    logging.basicConfig(format="%(message)s")  # why nothing happens, while the service is away
    steps = int(os.environ.get("STEPS", "150"))
    url, result = os.environ["SERVICE_URL"], Path(os.environ.get("RESULT", "model.zip"))
    try:
        with TrainingClient(url, client_id="task") as client:
            status = client.train(
                reward=reward,
                prompts=lists(held_out=False, seed=0, count=20_000),
                settings=settings_of(os.environ.get("MODEL", "/models/start"), steps=steps, seed=0),
            )
            version = client.get_model(result)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"run {status.run_id} is {status.state}; the model of version {version} is in {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
