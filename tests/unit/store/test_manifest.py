"""The files beside the weights: what an earlier conversion wrote must load as it was."""

from __future__ import annotations

import json

import numpy as np

from conch.converters.triton_models.ensemble_model import combined
from conch.store.manifest import EnsembleManifest, Manifest, ScoringRules

MANIFEST = """
{
  "format": 1,
  "name": "prm",
  "form": "text",
  "backend": "python",
  "source": "checkpoint",
  "source_sha256": "a1b2",
  "base_model": "base",
  "revision": "676bfd4d",
  "created_at": "2026-11-01T00:00:00+00:00",
  "template": "{text}",
  "truncation_side": "right",
  "pooling": "steps",
  "layout": "trunk",
  "columns": [1],
  "separator_id": 11,
  "aggregate": "min",
  "granularity": "step",
  "batch_invariant": true,
  "max_length": 32,
  "reward_names": ["reward"],
  "normalise": true,
  "folded": false,
  "mean": [0.5],
  "std": [2.0],
  "dtype": "bfloat16",
  "pad_token_id": 21,
  "eos_token_id": 22,
  "vocab_size": 23,
  "trust_remote_code": false,
  "tools": {"python": "3.12.3"},
  "parity": {
    "max_error": 0.01, "max_difference": 0.02, "mean_difference": 0.005, "tolerance": 0.1, "samples": 40
  },
  "files": {"model.py": "c3d4"}
}
"""


def test_manifest_of_an_earlier_conversion_reads_back_as_one_of_texts() -> None:
    manifest = Manifest.model_validate_json(MANIFEST)
    written = json.loads(MANIFEST)
    read = manifest.model_dump(mode="json")
    assert {key: read[key] for key in written} == written
    assert all(not read[key] or read[key] in ("texts", "none") for key in read if key not in written)
    assert read["reads"] == "texts"


def test_manifest_holds_the_scoring_rules_of_its_checkpoint() -> None:
    manifest = Manifest.model_validate_json(MANIFEST)
    rules = ScoringRules(**{name: getattr(manifest, name) for name in ScoringRules.model_fields})
    assert (rules.pooling, rules.separator_id, rules.max_length) == ("steps", 11, 32)
    assert Manifest(**{**dict(manifest), **dict(rules)}) == manifest


ENSEMBLE = """
{
  "format": 1,
  "name": "ens",
  "form": "text",
  "reads": "texts",
  "created_at": "2026-11-01T00:00:00+00:00",
  "members": [
    {"name": "a", "reward": "reward", "column": 0, "columns": 1, "version": 1, "content_sha256": "a1"},
    {"name": "b", "reward": "kind", "column": 1, "columns": 2, "version": 3, "content_sha256": "b2"}
  ],
  "objective": "uwo",
  "uwo_weight": 0.1,
  "on_member_failure": "fail",
  "reward_names": ["reward"],
  "max_length": 12,
  "tools": {"python": "3.12.3", "numpy": "1.26.4"},
  "files": {"model.py": "c3"}
}
"""


def test_an_older_ensemble_asks_its_members_and_divides_by_their_number() -> None:
    manifest = EnsembleManifest.model_validate_json(ENSEMBLE)
    assert (manifest.variance, manifest.holds_members, manifest.in_one_pass) == ("population", False, False)
    scores = np.array([[1.0, 4.0]])
    found = combined(scores, json.loads(ENSEMBLE))  # what its model.py reads
    assert [values.tolist() for values in found] == [[2.5 - 0.1 * 2.25], [2.25], [2]]
