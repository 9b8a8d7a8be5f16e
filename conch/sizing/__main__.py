"""How much memory of each GPU a run takes, and what to change when it does not fit.

    conch size --model EleutherAI/gpt-j-6b --zero-stage 2 --gpus 7 --gpu-memory 80

Weights are counted on the meta device, so the model's config.json is all that is read, and activations by
running one forward pass there and noting what autograd would keep. Not counted: the CUDA context and the
allocator's gaps, for which a tenth of `--gpu-memory` is left free.
"""

from __future__ import annotations

from collections.abc import Sequence

from conch.cli import run_main
from conch.sizing.options import read_options


def main(argv: Sequence[str]) -> None:
    """Command line: see the head of this file."""
    model, setup, as_json = read_options(argv)
    # Counts on torch's meta device, which takes seconds to load: not for `--help` or a mistake.
    from conch.sizing.estimate import report

    report(model, setup, as_json=as_json)


if __name__ == "__main__":
    run_main(main)
