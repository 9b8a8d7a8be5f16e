"""Which samples an update gets, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor

from conch.distributed.train_engine import UpdateReport
from conch.training.statistics import updates_over


def test_passes_deal_all_samples_to_updates_that_keep_their_order() -> None:
    updates: list[list[int]] = []

    def update(rows: Tensor) -> tuple[dict[str, float], UpdateReport]:
        updates.append(rows.tolist())
        first = {"train/ratio": 1.0, "train/approx_kl": 0.0, "train/clip_fraction": 0.0}
        return first, UpdateReport(loss=0.0, grad_norm=1.0, learning_rate=0.1, skipped=False)

    torch.manual_seed(0)
    updates_over(num_rows=16, epochs=3, minibatches=2, update=update)
    assert all(rows == sorted(rows) and len(rows) == 8 for rows in updates)
    passes = list(zip(updates[::2], updates[1::2], strict=True))
    assert all(sorted(one + other) == list(range(16)) for one, other in passes)
    assert len({tuple(one) for one, _ in passes}) == 3, "each pass deals them anew"
