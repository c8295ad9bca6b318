"""LAMB (You et al. 2020) as Google's ALBERT uses it, exact under DeepSpeed ZeRO 0 to 3; and AdamW.

The norms of an adapted tensor are summed over its ZeRO partitions, with padding masked out, so the update equals
that of one process that holds the whole tensor. With no adapted group the same rule is AdamW (Loshchilov and
Hutter 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from albert.config import OptimizerConfig
from albert.distributed import group_rank_and_size, sum_over_ranks
from albert.optim.groups import parameter_groups

STATE_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Update:
    """One parameter's pending update, before the trust ratio."""

    group: dict[str, Any]
    parameter: Tensor
    direction: Tensor


class Lamb(torch.optim.Optimizer):
    """m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; u = m / (sqrt v + eps) + decay w; w = w - lr r u.

    r is |w| / |u| for adapted groups (1 where either norm is 0) and 1 for the others. With `bias_correction`, m
    and v are divided by 1 - b^t first. `ratio_bounds` clamps r.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        bias_correction: bool = False,
        ratio_bounds: tuple[float, float] | None = None,
    ) -> None:
        """Take groups of `albert.optim.groups.parameter_groups`; the learning rate is set at every step."""
        super().__init__(groups, {"lr": 0.0})
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction
        self.ratio_bounds = ratio_bounds
        self.num_steps = 0
        """Optimizer steps taken; kept here because ZeRO calls `step` once per group."""
        self._partitioned = False
        self._process_group: Any = None
        self._group_rank = 0

    def bind_partitions(self, partitions: list[Tensor], process_group: Any) -> None:
        """Tell the optimizer that its parameters are ZeRO partitions, and create all state now.

        ZeRO-1/2 link parameters to optimizer state once; state that appears later is never linked.

        Args:
            partitions: this rank's flat fp32 partition of every group.
            process_group: over which the partitions are spread; None for all ranks.
        """
        self._partitioned = True
        self._process_group = process_group
        self._group_rank, _ = group_rank_and_size(process_group)
        for partition in partitions:
            self.moments(partition)

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment of a parameter, created as zeros on first use."""
        state = self.state[parameter]
        if not state:
            for key in STATE_KEYS:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["exp_avg"], state["exp_avg_sq"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `num_steps` must have been advanced before."""
        if closure is not None:
            raise ValueError("Lamb takes no closure")
        updates = [
            self._direction(group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        ratios = self._trust_ratios([update for update in updates if update.group["adapt"]])
        for update in updates:
            scale = -update.group["lr"]
            if update.group["adapt"]:
                ratio = next(ratios).to(update.direction.dtype)
                update.parameter.addcmul_(update.direction, ratio, value=scale)
            else:
                update.parameter.add_(update.direction, alpha=scale)

    def _direction(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> _Update:
        first, second = self.moments(parameter)
        if group["adapt"] and self._partitioned:
            self._zero_padding(group["num_elements"], (parameter, gradient, first, second))
        beta1, beta2 = self.betas
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # One scratch tensor for everything: fresh memory costs more than arithmetic.
        direction = second.sqrt()
        if self.bias_correction:
            direction.div_(math.sqrt(1 - beta2**self.num_steps)).add_(self.eps).mul_(
                1 - beta1**self.num_steps
            )
        else:
            direction.add_(self.eps)
        torch.div(first, direction, out=direction)
        if group["weight_decay"]:
            direction.add_(parameter, alpha=group["weight_decay"])
        return _Update(group, parameter, direction)

    def _zero_padding(self, num_elements: int, shards: tuple[Tensor, ...]) -> None:
        """Zero what lies behind the tensor's last element in this rank's shard; ZeRO-3 leaves garbage there."""
        for shard in shards:
            valid = max(0, min(shard.numel(), num_elements - self._group_rank * shard.numel()))
            shard.view(-1)[valid:].zero_()

    def _trust_ratios(self, updates: list[_Update]) -> Iterator[Tensor]:
        """Iterator over r of every adapted update, each a 0-d tensor."""
        if not updates:
            return iter(())
        weights = torch._foreach_norm([update.parameter for update in updates])
        directions = torch._foreach_norm([update.direction for update in updates])
        squares = torch.stack([torch.stack(weights), torch.stack(directions)]).double().square()
        if self._partitioned:
            sum_over_ranks(squares, self._process_group)
        weight_norm, direction_norm = squares.sqrt()
        is_defined = (weight_norm > 0) & (direction_norm > 0)
        ratios = torch.where(is_defined, weight_norm / direction_norm, torch.ones_like(weight_norm))
        return iter(ratios.clamp(*self.ratio_bounds) if self.ratio_bounds else ratios)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Lamb:
    """The optimizer that a run configuration describes."""
    is_deepspeed_lamb = config.name == "lamb" and config.lamb_variant == "deepspeed"
    return Lamb(
        parameter_groups(model, config),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        bias_correction=config.name == "adamw" or is_deepspeed_lamb,
        ratio_bounds=(0.01, 10.0) if is_deepspeed_lamb else None,
    )
