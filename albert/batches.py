"""Batches of packed sequences: real tokens one after the other, no padding anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


class Movable:
    """Moves every tensor field (and nested batch) to a device, or as plain bytes to another process."""

    def to(self, device: torch.device | str) -> Self:
        """A copy on `device`; to a GPU through pinned memory, or the host would wait for all kernels before it."""
        if torch.device(device).type != "cuda":
            return self._changed(lambda tensor: tensor.to(device))
        return self._changed(lambda tensor: _pinned(tensor).to(device, non_blocking=True))

    def __getstate__(self) -> dict[str, Any]:
        """Arrays: every tensor would cross with a file descriptor and a handshake, 0.8 ms each. CPU only."""
        return {name: v.numpy() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The tensors again."""
        for name, value in state.items():
            vars(self)[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Movable):
                value = value._changed(change)
            changed[field.name] = change(value) if isinstance(value, Tensor) else value
        return type(self)(**changed)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.pin_memory()


@dataclass(frozen=True)
class PackedBatch(Movable):
    """Sequences laid end to end."""

    input_ids: Tensor
    """[tokens] int64"""
    token_type_ids: Tensor
    """[tokens] int64, 0 for `[CLS] A [SEP]`, 1 for `B [SEP]`"""
    position_ids: Tensor
    """[tokens] int64, counted from 0 in every sequence"""
    cu_seqlens: Tensor
    """[batch + 1] int32, sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]"""
    lengths: tuple[int, ...]
    """Lengths of the sequences on the host, so that nothing has to wait for the device."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


@dataclass(frozen=True)
class PretrainBatch(Movable):
    """Packed sequences with their MLM and SOP targets."""

    sequences: PackedBatch
    masked_lm_indices: Tensor
    """[preds] int64, indices into the packed tokens"""
    masked_lm_labels: Tensor
    """[preds] int64, original ids"""
    sentence_order_labels: Tensor
    """[batch] int64, 0 in order, 1 swapped, -100 none"""
    examples: Sequence[tuple[int, int, int, int]] = ()
    """(position, block, index, epoch) of every sequence where a ledger is kept, else nothing"""


def pack(input_ids: Tensor, token_type_ids: Tensor, lengths: tuple[int, ...]) -> PackedBatch:
    """Packed batch from concatenated ids and types, both [tokens]."""
    length = torch.tensor(lengths)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(length, 0, out=cu_seqlens[1:], dtype=torch.int32)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), length)
    positions = torch.arange(len(input_ids)) - starts
    return PackedBatch(input_ids, token_type_ids, positions, cu_seqlens, lengths)
