"""From preference rows to a converted model: what is served is what was trained, objective by objective."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conch.converters.parity import subprocess_model
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.converters.to_triton import to_triton
from tests.runs import EOS, reward_trainer

REFERENCE = ["abc", "h", "gg", "fedc", "abcdefgh"]
ROWS = [
    {"chosen": "abcdefghabcdefghab", "rejected": "cb", "objective": "kind", "margin": 1.0},
    {"chosen": "h", "rejected": "gfedcb", "objective": "brief"},
    {"chosen": "cb", "rejected": "ad", "objective": "brief"},
]


def test_served_scores_are_the_trained_ones_normalised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess_model, "PYTHON", sys.executable)  # a version needs nothing but itself
    trainer = reward_trainer(
        tmp_path / "run", ROWS, reference=REFERENCE, reward_model={"batch_size": 3, "normalise": True}
    )
    for _ in range(3):
        trainer.step()
    checkpoint = trainer.save_pretrained(tmp_path / "saved")
    conversion = to_triton(checkpoint, name="two", model_store=tmp_path / "store")
    assert conversion.spec.reward_names == ("kind", "brief")

    with SubprocessModel(conversion.path) as served:
        long = ROWS[0]["chosen"]
        (reply,) = served.score([{"texts": [*REFERENCE, long]}], "cpu")
    scores = np.array(reply["scores"])
    assert scores[:-1].mean(axis=0) == pytest.approx([0.0, 0.0], abs=1e-4)
    assert scores[:-1].std(axis=0) == pytest.approx([1.0, 1.0], rel=1e-4)

    # A text that is too long is cut in training as it is in the server: the eos stays.
    ids = torch.tensor([trainer.samples[0].chosen])  # pyright: ignore[reportAttributeAccessIssue]
    assert ids.shape == (1, 16) and int(ids[0, -1]) == EOS
    with torch.no_grad():
        raw = trainer.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
    told = json.loads((checkpoint / "reward_model.json").read_text())
    assert scores[-1] == pytest.approx((raw - told["mean"]) / told["std"], rel=1e-4, abs=1e-4)
