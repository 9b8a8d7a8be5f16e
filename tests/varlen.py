"""Attention with the interface of flash-attention's package, sample by sample in plain torch.

All that transformers does around these kernels (masks, unpadding, lengths, precision) is its own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

NAME = "flash_reference"
"""As `attn_implementation`; transformers knows attention of this kind by the word in it."""


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """[tokens, heads, width] of all samples -> the same; sample i stands between bounds i and i + 1.

    As the package's, it takes half precision only; float64 stands for exact numbers.
    """
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float64), f"flash-attention takes no {q.dtype}"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(max_seqlen_q) == int(cu_seqlens_q.diff().max()) and cu_seqlens_q[-1] == len(q)
    assert int(max_seqlen_k) == int(cu_seqlens_k.diff().max()) and cu_seqlens_k[-1] == len(k)
    assert dropout_p == softcap == 0.0
    made = []
    for number in range(len(cu_seqlens_q) - 1):
        mine, theirs = (
            slice(*bounds[number : number + 2].tolist()) for bounds in (cu_seqlens_q, cu_seqlens_k)
        )
        made.append(_attention(q[mine], k[theirs], v[theirs], softmax_scale, causal, window_size[0]))
    return torch.cat(made)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
    """[batch, tokens, heads, width], of samples of one length."""
    bounds = [torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    flat = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), *bounds, q.shape[1], k.shape[1], **settings
    )
    return flat.view_as(q)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: int) -> Tensor:
    """Of one sample; queries are the last of its tokens. window: tokens to look back besides the own; -1 is
    all."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    distance = torch.arange(len(q)).unsqueeze(1) + len(k) - len(q) - torch.arange(len(k))
    hidden = (distance < 0) & causal | (distance > window) & (window >= 0)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Inside, models take `attn_implementation=NAME`."""
    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    library = modeling_flash_attention_utils
    found = (flash_attn_func, flash_attn_varlen_func, None, library._pad_input, library._unpad_input)
    with (
        patch.object(library, "_lazy_imports", lambda *_, **__: found),
        patch.object(library, "_loaded_implementation", None),
    ):
        yield
