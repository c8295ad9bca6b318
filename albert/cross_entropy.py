"""Cross entropy over the whole vocabulary without the logits of the whole batch.

Logits are made for a few predictions at a time, and their gradients at once, because the loss is all that they are
for. What is kept for the backward pass has the size of the inputs, whatever the number of predictions. torch's own
path keeps the logits and the logarithms of all probabilities in fp32, and needs as much again on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from albert.linear import product_without_graph, rows_to_add

LOGITS_AT_A_TIME = 2**24
"""67 MB in fp32, whatever the number of predictions."""
_CACHED_LOGITS = 2**19
"""2 MB in fp32, which a core's cache holds."""
_FP16_SCALE = 64.0
"""Gradients of fp16 logits are stored times this: most are probabilities near 1 / vocab, and fp16 ends at 6e-8."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, with_accuracy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross entropies of `hidden @ weight.T + bias`, in fp32 (fp64 where the logits are).

    Args:
        hidden: [preds, width]
        weight: [vocab, width]
        bias: [vocab]
        labels: [preds] int64, each below vocab.
        with_accuracy: count right predictions too.

    Returns:
        The sum, 0-d, and how many predictions have their largest logit at the label, 0-d int64, or None.
    """
    with_gradient = torch.is_grad_enabled()
    loss_sum, correct = _LinearCrossEntropy.apply(hidden, weight, bias, labels, with_gradient, with_accuracy)
    return cast(Tensor, loss_sum), cast("Tensor | None", correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        with_gradient: bool,
        with_accuracy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=dtype, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device) if with_accuracy else None
        gradients = _Gradients(hidden, weight, dtype) if with_gradient else None
        size = max(1, LOGITS_AT_A_TIME // len(weight))
        for rows, targets in zip(hidden.split(size), labels.split(size), strict=True):
            missing = rows_to_add(len(rows), rows)
            filled = F.pad(rows, (0, 0, 0, missing)) if missing else rows
            logits = product_without_graph(filled, weight, bias)[: len(rows)]
            for block, wanted in _blocks(logits, targets):
                log_probs = block.log_softmax(1, dtype)
                loss_sum -= log_probs.gather(1, wanted[:, None]).sum()
                if correct is not None:
                    correct += (log_probs.argmax(1) == wanted).sum()
                if gradients:
                    gradients.add_block(block, wanted, log_probs)
            if gradients:
                gradients.add_piece(rows, logits)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients.of_hidden), gradients.of_weight, gradients.of_bias)
            ctx.scale = gradients.scale
        ctx.dtype = hidden.dtype
        return loss_sum, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # In place: nobody else has them, and autograd refuses a second pass over them.
        scaled = [saved.mul_(gradient / ctx.scale).to(ctx.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _blocks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of [rows, vocab] and [rows], so few that a CPU has them in its cache; all at once elsewhere."""
    size = max(1, _CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return zip(logits.split(size), targets.split(size), strict=True)


class _Gradients:
    """Of the loss sum times `scale`, summed over the pieces in the precision of the loss."""

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.scale = _FP16_SCALE if weight.dtype == torch.float16 else 1.0
        self.of_hidden: list[Tensor] = []
        self.of_weight: Tensor | None = None
        self.of_bias = hidden.new_zeros(len(weight), dtype=dtype)

    def add_block(self, logits: Tensor, targets: Tensor, log_probs: Tensor) -> None:
        """Replace logits [rows, vocab] by their scaled gradient; `log_probs` of the same shape is used up."""
        of_logits = log_probs.exp_()
        of_logits.scatter_add_(1, targets[:, None], of_logits.new_full((len(targets), 1), -1.0))
        if self.scale != 1.0:
            of_logits.mul_(self.scale)
        self.of_bias += of_logits.sum(0)
        logits.copy_(of_logits)

    def add_piece(self, rows: Tensor, of_logits: Tensor) -> None:
        """Add what [rows, width] and the scaled gradient of their logits, [rows, vocab], contribute."""
        self.of_hidden.append(product_without_graph(of_logits, self.weight.t()).to(self.dtype))
        of_weight = (of_logits.t() @ rows).to(self.dtype)
        self.of_weight = of_weight if self.of_weight is None else self.of_weight.add_(of_weight)
