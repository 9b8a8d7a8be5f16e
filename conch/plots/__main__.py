"""`python -m conch.plots`, which is `conch plot`: curves of a finished run, drawn by `conch.runs.plots`."""

from __future__ import annotations

from conch.cli import run_main
from conch.runs.plots import main

if __name__ == "__main__":
    run_main(main)
