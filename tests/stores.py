"""Model stores in milliseconds: every part of a version is there, and the model needs no torch."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conch.converters import triton_models
from conch.store.manifest import (
    GOLDEN,
    MANIFEST,
    EnsembleManifest,
    EnsembleMember,
    Golden,
    GoldenSample,
    Manifest,
    sha256_of,
)
from conch.store.store import publish, read_model, staged_version
from conch.triton.contract import RewardModelSpec, TokenizerSpec, ensemble_parts

# Runs in the real server, where it starts in a second: the score of a text is its length.
LENGTH_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "text")) for request in requests]

    def answer(self, texts):
        lengths = np.array([[len(text)] for text in texts.as_numpy()[:, 0]], dtype=np.float32)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("rewards", lengths)])
"""

# The score of a text is its CRC-32 in [-1, 1): exact, and the same in any batch. A network's is not: on a
# CPU the last bits of a GPT-2's scores differ with what it is batched with, in two rows of three.
HASH_MODEL = """
import zlib

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "text")) for request in requests]

    def answer(self, texts):
        scores = [[zlib.crc32(text) / 2**31 - 1] for text in texts.as_numpy()[:, 0]]
        rewards = pb_utils.Tensor("rewards", np.array(scores, dtype=np.float32))
        return pb_utils.InferenceResponse(output_tensors=[rewards])
"""


def hash_score(text: str) -> float:
    """What `HASH_MODEL` gives, to the last bit."""
    return float(np.float32(zlib.crc32(text.encode()) / 2**31 - 1))


def store_model(
    store: Path,
    name: str = "lengths",
    *,
    weights: bytes = b"weights",
    model_py: str = LENGTH_MODEL,
    golden_score: float = 2.0,
    reward_names: tuple[str, ...] = ("reward",),
    **placement: Any,
) -> Path:
    """Publish a version and return its folder. The only golden sample is the text `ab`.

    placement: see `publish`.
    """
    with staged_version(store, name) as folder:
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "model.py").write_text(model_py)
        spec = RewardModelSpec(name, max_length=8, reward_names=reward_names)
        golden = GoldenSample(text="ab", scores=(golden_score,) * len(reward_names))
        spec = _write_beside(folder, spec, golden)
        return publish(folder, spec, store, **placement)


def store_ensemble(store: Path, name: str, members: Sequence[str]) -> Path:
    """Publish the mean of members that `store_model` made, and return its folder."""
    stored = [read_model(store, member) for member in members]
    score = sum(model.golden.samples[0].scores[0] for model in stored) / len(stored)
    with staged_version(store, name) as folder:
        shutil.copyfile(Path(triton_models.__file__).parent / "ensemble_model.py", folder / "model.py")
        golden = Golden(tolerance=1e-4, samples=(GoldenSample(text="ab", scores=(score,)),))
        (folder / GOLDEN).write_text(golden.model_dump_json())
        manifest = EnsembleManifest(
            name=name,
            form="text",
            created_at="2026-01-01T00:00:00+00:00",
            members=tuple(
                EnsembleMember(
                    name=model.name,
                    reward="reward",
                    column=0,
                    columns=1,
                    version=model.version,
                    content_sha256=model.spec.content_sha256,
                )
                for model in stored
            ),
            objective="mean",
            uwo_weight=0.0,
            on_member_failure="fail",
            reward_names=("reward",),
            max_length=8,
            tools={},
            files={file: sha256_of(folder / file) for file in ("model.py", GOLDEN)},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        digest = sha256_of(folder / MANIFEST)
        spec = RewardModelSpec(name, max_length=8, content_sha256=digest, members=tuple(members))
        return publish(folder, spec, store)


# Parts of a text-form ensemble: the bytes of a text, `repeats` times over, and their number times `factor`.
_TOKENIZER = """
    def answer(self, texts):
        ids = np.frombuffer(texts.as_numpy()[0, 0] * {repeats}, dtype=np.uint8).astype(np.int64)[None]
        tensors = {{"input_ids": ids, "attention_mask": np.ones_like(ids)}}
        return pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in tensors.items()])
"""
_COUNTER = """
    def answer(self, ids):
        scores = np.full((len(ids.as_numpy()), 1), ids.as_numpy().shape[1] * {factor}, dtype=np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("rewards", scores)])
"""


def store_text_graph(store: Path, name: str, *, repeats: int, factor: int) -> None:
    """Publish what `--backend onnx` makes of a text-form model: tokenizer, token form, ensemble of both."""
    head = LENGTH_MODEL[: LENGTH_MODEL.index("    def answer")]
    tokenizer, counter = ensemble_parts(name)
    with staged_version(store, counter) as folder:
        body = head.replace('"text"', '"input_ids"') + _COUNTER.format(factor=factor)
        (folder / "model.py").write_text(body)
        golden = GoldenSample(input_ids=(97, 98), scores=(2.0 * factor,))
        spec = RewardModelSpec(counter, form="token", max_length=8, engine="onnxruntime")
        publish(folder, _write_beside(folder, spec, golden), store)
    with staged_version(store, tokenizer) as folder:
        (folder / "model.py").write_text(head + _TOKENIZER.format(repeats=repeats))
        publish(folder, TokenizerSpec(tokenizer, max_batch_size=64, max_length=8), store)
    with staged_version(store, name) as folder:
        golden = GoldenSample(text="ab", scores=(2.0 * repeats * factor,))
        spec = RewardModelSpec(name, max_length=8, engine="ensemble", max_queue_delay_us=0)
        publish(folder, _write_beside(folder, spec, golden), store)


def _write_beside(folder: Path, spec: RewardModelSpec, sample: GoldenSample) -> RewardModelSpec:
    """Write manifest and golden sample of a version; the specification with the manifest's hash."""
    (folder / GOLDEN).write_text(Golden(tolerance=1e-4, samples=(sample,)).model_dump_json())
    manifest = Manifest(
        name=spec.name,
        form=spec.form,
        source="here",
        created_at="2026-01-01T00:00:00+00:00",
        template="{text}",
        max_length=spec.max_length,
        reward_names=spec.reward_names,
        normalise=False,
        dtype="float32",
        pad_token_id=0,
        vocab_size=256,
        tools={},
        files={file.name: sha256_of(file) for file in folder.iterdir()},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return replace(spec, content_sha256=sha256_of(folder / MANIFEST))
