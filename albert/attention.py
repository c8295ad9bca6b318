"""Self-attention over packed sequences (no padding is computed) and over padded ones.

Queries, keys and values come as one tensor `[tokens, 3, heads, head_dim]`, the output of one matrix
product, and are not copied before the kernel. Packed 16-bit tokens on CUDA take one flash-attention
call for the whole batch; everything else takes one `scaled_dot_product_attention` call per run of
sequences of equal length, so a batch of equal lengths is one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from albert.batches import PackedBatch

_MAX_LENGTH_STEP = 128
"""The longest length is rounded up to this, so that a compiled layer sees few different values."""
_FLASH_HEAD_DIM_STEP = 8
"""Flash attention wants head sizes in multiples of 8; albert_tiny has 312 / 12 = 26."""
_FLASH_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed batch lie; made once per forward pass, outside the loop over layers."""

    cu_seqlens: Tensor
    """[batch + 1] int32"""
    max_length: int
    """At least the length of the longest sequence."""
    runs: tuple[tuple[int, int], ...]
    """(number, length) of consecutive sequences of equal length."""


@dataclass(frozen=True)
class PaddedLayout:
    """Sequences padded to one length; tokens are `batch * seq` rows."""

    mask: Tensor
    """[batch, seq] bool, true for real tokens"""


def packed_layout(batch: PackedBatch) -> PackedLayout:
    """Layout of a packed batch."""
    runs = tuple((len(list(group)), length) for length, group in groupby(batch.lengths))
    max_length = -(-batch.max_length // _MAX_LENGTH_STEP) * _MAX_LENGTH_STEP
    return PackedLayout(batch.cu_seqlens, max_length, runs)


def attend(qkv: Tensor, layout: PackedLayout | PaddedLayout, dropout: float = 0.0) -> Tensor:
    """Bidirectional attention inside each sequence.

    Args:
        qkv: [tokens, 3, heads, head_dim]
        layout: which tokens form a sequence.
        dropout: probability of dropping an attention weight.

    Returns:
        [tokens, heads * head_dim]
    """
    if isinstance(layout, PaddedLayout):
        return _attend_padded(qkv, layout.mask, dropout)
    if _has_flash_kernel(qkv) and dropout == 0.0:
        return _attend_flash(qkv, layout)
    return _attend_runs(qkv, layout.runs, dropout)


def _has_flash_kernel(qkv: Tensor) -> bool:
    is_half = qkv.dtype in (torch.float16, torch.bfloat16)
    return qkv.is_cuda and is_half and qkv.shape[-1] <= _FLASH_MAX_HEAD_DIM


def _attend_flash(qkv: Tensor, layout: PackedLayout) -> Tensor:
    """One variable-length kernel for all sequences; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    head_dim = qkv.shape[-1]
    missing = -head_dim % _FLASH_HEAD_DIM_STEP
    padded = F.pad(qkv, (0, missing)) if missing else qkv
    query, key, value = padded.unbind(1)
    if missing:  # the kernel scales by the padded size
        query = query * ((head_dim + missing) / head_dim) ** 0.5
    bounds, longest = layout.cu_seqlens, layout.max_length
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest)
    return cast(Tensor, output).narrow(-1, 0, head_dim).flatten(1)


def _attend_runs(qkv: Tensor, runs: tuple[tuple[int, int], ...], dropout: float) -> Tensor:
    """One batched call per run; `split` (not slicing) so that backward concatenates instead of adding."""
    parts = qkv.split([number * length for number, length in runs])
    outputs = [
        _attend_batch(part.unflatten(0, run), None, dropout) for part, run in zip(parts, runs, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_padded(qkv: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return _attend_batch(qkv.unflatten(0, mask.shape), mask[:, None, None, :], dropout)


def _attend_batch(qkv: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of [batch, seq, 3, heads, head_dim]; returns [batch * seq, heads * head_dim]."""
    query, key, value = qkv.transpose(1, 3).unbind(2)  # each [batch, heads, seq, head_dim]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output.transpose(1, 2).flatten(2).flatten(0, 1)
