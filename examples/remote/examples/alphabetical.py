"""The second terminal of the first service's example, from `examples/remote`:

python -m grpo_server.uvicorn_main --api_key=default_key --output_dir /tmp/output1
python examples/alphabetical.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout, as `python -m` from there has it

from conch.cli import run_main
from examples.remote.alphabetical import main

if __name__ == "__main__":
    run_main(lambda words: main(["--api_key", "default_key", *words]))
