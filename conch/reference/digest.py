"""Identity of a model's weights."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conch.models.adapter import distinct_tensors


@torch.no_grad()
def weights_digest(lm: PreTrainedModel) -> str:
    """SHA-256 of all saved weights, their names, dtypes and shapes, those of an adapter left out.

    Models that were loaded from the same files in the same dtype have the same. Reads every weight once, in
    several threads; ZeRO-3 must have gathered them.
    """
    named = sorted((plain, tensor) for plain, _, tensor in distinct_tensors(lm))
    with ThreadPoolExecutor() as threads:
        parts = threads.map(lambda pair: _digest(*pair), named)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
