"""Start the training service by the command line of the first service of its kind, from `examples/remote`:

    python -m grpo_server.uvicorn_main --api_key=default_key --output_dir /tmp/output1

It is `python -m conch.service` with the same options, and listens on this machine alone unless `--host` says
otherwise.
"""

from __future__ import annotations

from conch.cli import run_main
from conch.service.__main__ import main

if __name__ == "__main__":
    run_main(main)
