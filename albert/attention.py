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
_FLASH_FIRST_CAPABILITY = (8, 0)
"""Ampere; the kernel refuses V100 and T4, which take one call for every number of tokens."""


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
class KeptTokens:
    """The tokens that the last layer is asked for, sequence by sequence."""

    indices: Tensor
    """[kept] int64, ascending"""
    cu_counts: Tensor
    """[batch + 1] int32, those of sequence i are cu_counts[i] to cu_counts[i + 1]"""


@dataclass(frozen=True)
class PaddedLayout:
    """Sequences padded to one length; tokens are `batch * seq` rows."""

    mask: Tensor
    """[batch, seq] bool, true for real tokens"""


def packed_layout(batch: PackedBatch, filler: int = 0) -> PackedLayout:
    """Layout of a packed batch, and of so many tokens after it that mean nothing."""
    runs = tuple((len(list(group)), length) for length, group in groupby(batch.lengths))
    max_length = -(-max(batch.max_length, filler) // _MAX_LENGTH_STEP) * _MAX_LENGTH_STEP
    cu_seqlens = batch.cu_seqlens
    if filler:
        runs = (*runs, (1, filler))
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + filler])
    return PackedLayout(cu_seqlens, max_length, runs)


def kept_tokens(indices: Tensor, cu_seqlens: Tensor) -> tuple[KeptTokens, Tensor]:
    """Tokens by their indices [kept] in any order, and where each of these lies among them, [kept]."""
    ordered, order = indices.sort()
    counts = torch.searchsorted(ordered, cu_seqlens.long(), out_int32=True)
    return KeptTokens(ordered, counts), order.argsort()


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
        query, key, value = qkv.unbind(1)
        return _attend_flash(query, key, value, layout.cu_seqlens, layout)
    return _attend_runs(qkv, layout.runs, dropout)


def attend_kept(
    query: Tensor, key_value: Tensor, layout: PackedLayout, kept: KeptTokens, dropout: float = 0.0
) -> Tensor:
    """What `attend` gives for the kept tokens, from their queries alone.

    Args:
        query: [kept, heads, head_dim]
        key_value: [tokens, 2, heads, head_dim]
        layout: which tokens form a sequence.
        kept: the tokens of the queries.
        dropout: probability of dropping an attention weight.

    Returns:
        [kept, heads * head_dim]
    """
    key, value = key_value.unbind(1)
    if _has_flash_kernel(query) and dropout == 0.0:
        return _attend_flash(query, key, value, kept.cu_counts, layout)
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return _attend_all_for_kept(query, key_value, layout, kept, dropout)
    counts = kept.cu_counts.diff().tolist()
    lengths = [length for number, length in layout.runs for _ in range(number)]
    parts = zip(query.split(counts), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_attend_sequence(*part, dropout) for part in parts if len(part[0])])


def _attend_all_for_kept(
    query: Tensor, key_value: Tensor, layout: PackedLayout, kept: KeptTokens, dropout: float
) -> Tensor:
    """With some query for every token, where the host does not know how many each sequence keeps."""
    rows = torch.zeros(len(key_value), dtype=torch.int64, device=query.device)
    rows[kept.indices] = torch.arange(len(query), device=query.device)
    qkv = torch.cat([query.index_select(0, rows)[:, None], key_value], dim=1)
    return attend(qkv, layout, dropout).index_select(0, kept.indices)


def has_flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one kernel takes all sequences of a packed batch, of any lengths."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return is_half and head_dim <= _FLASH_MAX_HEAD_DIM and _is_ampere_or_newer(device)


@torch.compiler.assume_constant_result
def _is_ampere_or_newer(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLASH_FIRST_CAPABILITY


def _has_flash_kernel(x: Tensor) -> bool:
    return has_flash_kernel(x.device, x.dtype, x.shape[-1])


def _attend_flash(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, layout: PackedLayout
) -> Tensor:
    """One variable-length kernel for all sequences; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    head_dim = query.shape[-1]
    missing = -head_dim % _FLASH_HEAD_DIM_STEP
    if missing:  # the kernel scales by the padded size
        query, key, value = (F.pad(x, (0, missing)) for x in (query, key, value))
        query = query * ((head_dim + missing) / head_dim) ** 0.5
    bounds, longest = layout.cu_seqlens, layout.max_length
    output = varlen_attn(query, key, value, query_bounds, bounds, longest, longest)
    return cast(Tensor, output).narrow(-1, 0, head_dim).flatten(1)


def _attend_sequence(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attention of one sequence: [kept, heads, head_dim] to [kept, heads * head_dim]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return output[0].transpose(0, 1).flatten(1)


def _attend_runs(qkv: Tensor, runs: tuple[tuple[int, int], ...], dropout: float) -> Tensor:
    """One batched call per run; `split` (not slicing) so that backward concatenates instead of adding."""
    if len(runs) == 1:  # the backward of a split into one copies
        return _attend_batch(qkv.unflatten(0, runs[0]), None, dropout)
    parts = qkv.split([number * length for number, length in runs])
    outputs = [
        _attend_batch(part.unflatten(0, run), None, dropout) for part, run in zip(parts, runs, strict=True)
    ]
    return torch.cat(outputs)


def _attend_padded(qkv: Tensor, mask: Tensor, dropout: float) -> Tensor:
    return _attend_batch(qkv.unflatten(0, mask.shape), mask[:, None, None, :], dropout)


def _attend_batch(qkv: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of [batch, seq, 3, heads, head_dim]; returns [batch * seq, heads * head_dim]."""
    # Transposed after the split, whose backward then writes [batch, seq, 3, heads, head_dim] at once.
    query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))  # each [batch, heads, seq, head_dim]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output.transpose(1, 2).flatten(2).flatten(0, 1)
