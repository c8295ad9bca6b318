"""Matrix products of the training, in fp32 on a CPU by oneDNN.

torch computes fp32 products on a CPU with MKL. oneDNN's are about a tenth faster on processors of AMD (here, EPYC)
and agree to rounding. All else, also export, goes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function like `linear`."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_LEAST_STEP = 16


class Linear(nn.Linear):
    """`torch.nn.Linear` by `product`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.product: Product = linear

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        return self.product(rows, self.weight, self.bias)


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`rows @ weight.T + bias`.

    Args:
        rows: [rows, in_features]
        weight: [out_features, in_features]
        bias: [out_features]

    Returns:
        [rows, out_features]
    """
    if torch.is_grad_enabled() and _suits_onednn(rows, weight):
        packed = _packed_weights.get()
        return cast(Tensor, _OneDnnLinear.apply(rows, weight, bias, packed and packed.of(weight)))
    return F.linear(rows, weight, bias)


def rows_to_add(number: int, like: Tensor) -> int:
    """How many rows `number` rows lack to a number that is met often, at most a thirty-second of them or 15.

    A number of rows that oneDNN has not met costs it time, and the process megabytes for good. With sequences of any
    lengths, nearly every micro-batch would pay for that.

    Args:
        number: of rows of a factor.
        like: [rows, features], of its kind; 0 is the answer where oneDNN does not compute with it.
    """
    if not _suits_onednn(like, like):
        return 0
    return -number % max(_LEAST_STEP, 1 << (number // 64).bit_length())


def product_without_graph(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `linear` gives, of the same shapes, for use inside an autograd function."""
    if _suits_onednn(rows, weight):
        return _onednn_product(rows, weight, bias)
    return F.linear(rows, weight, bias)


def split_features(weight: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Rows of a weight [out_features, in_features], for a product each.

    Their gradients, joined, lie in memory as the gradient of the whole weight does, to which they may be added.
    """
    if torch.is_grad_enabled() and _suits_onednn(weight, weight) and len(weight) > weight.shape[1]:
        return [part.t() for part in weight.t().split(sizes, dim=1)]
    return list(weight.split(sizes))


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`: [rows, a], [rows, b] to [a, b]. Of a transposed first factor oneDNN makes a copy."""
    if left.shape[1] <= right.shape[1]:
        return product_without_graph(left.t(), right.t())
    return product_without_graph(right.t(), left.t()).t()


def _suits_onednn(rows: Tensor, weight: Tensor) -> bool:
    if not _HAS_ONEDNN or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    is_fp32 = rows.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_fp32 and rows.dim() == 2 and rows.numel() > 0


class _PackedWeight(NamedTuple):
    plain: Tensor
    """Held, so that no other tensor can be taken for it."""
    forward: Tensor
    """The weight as oneDNN lays it out."""
    backward: Tensor
    """Its transpose, likewise."""


class PackedWeights:
    """Weights that several layers share, laid out for oneDNN once and not at every use.

    Of use where the number of tokens is no round one, as with packed sequences. For one forward pass and its backward
    pass, in which the weights may not change.
    """

    def __init__(self) -> None:
        self._made: dict[int, _PackedWeight] = {}

    @contextmanager
    def in_use(self, is_reused: bool) -> Iterator[None]:
        """Inside, `linear` takes its weights from here and makes those that are missing, if they are used again."""
        token = _packed_weights.set(self if is_reused else None)
        try:
            yield
        finally:
            _packed_weights.reset(token)

    def of(self, weight: Tensor) -> _PackedWeight:
        """The layouts of a weight [out_features, in_features]."""
        # ZeRO-3 gives a parameter new memory at every use, and any other tensor a new name.
        key = id(weight) if isinstance(weight, nn.Parameter) else weight.data_ptr()
        if key not in self._made:
            plain, pack = weight.detach(), torch.ops.mkldnn._reorder_linear_weight
            self._made[key] = _PackedWeight(weight, pack(plain), pack(plain.t()))
        return self._made[key]


_packed_weights: ContextVar[PackedWeights | None] = ContextVar("packed_weights", default=None)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, packed: _PackedWeight | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.packed = packed
        return _onednn_product(rows, packed.forward if packed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias, _ = ctx.needs_input_grad
        transposed, ctx.packed = ctx.packed.backward if ctx.packed else weight.t(), None
        return (
            _onednn_product(gradient, transposed) if of_rows else None,
            _transposed_product(gradient, rows) if of_weight else None,
            gradient.sum(0) if of_bias else None,
            None,
        )


def _onednn_product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], ""))
