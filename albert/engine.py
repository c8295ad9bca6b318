"""The DeepSpeed engine behind a few methods: the only importer of deepspeed.

Private names of DeepSpeed 0.19.8 that reading and writing partitioned state needs live here and nowhere else;
DeepSpeed is pinned and tests/multiprocess/test_engine.py guards them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Chosen here, or DeepSpeed warns on every rank that it finds no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.bf16_optimizer
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from albert.config import OptimizerConfig
from albert.deepspeed_config import zero_stage
from albert.distributed import World, group_rank_and_size
from albert.errors import ConfigError
from albert.optim.lamb import STATE_KEYS, build_optimizer
from albert.precision import computes_bf16

deepspeed_logger.setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that newer torch versions deprecate, once per rank and run.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
# Compiled at the first use otherwise, for a minute, and a rank killed meanwhile leaves a lock that hangs later runs.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Collects garbage before each of its memory tables, two per parameter group: most of the time of a bf16 start.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None

WEIGHTS = "weights"
STATE_PARTS = (WEIGHTS, *STATE_KEYS)
"""Parts of the state of every parameter: the fp32 weight and both moments."""


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did."""

    applied: bool
    """False where a gradient was not finite; nothing has changed then."""
    grad_norm: float
    """Global gradient norm before clipping."""


class Engine:
    """A model with its optimizer under DeepSpeed."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        deepspeed_config: dict[str, Any],
        world: World,
    ) -> None:
        """Partition the model's state over the ranks as `deepspeed_config` says.

        Args:
            model: with equal fp32 weights on all ranks.
            optimizer: LAMB or AdamW.
            deepspeed_config: complete dictionary of `albert.deepspeed_config`.
            world: of `albert.distributed.init_world`.

        Raises:
            ConfigError: the device does not compute in the precision that was asked for.
        """
        self.stage = zero_stage(deepspeed_config)
        self.device = world.device
        self.world = world
        self.optimizer = build_optimizer(model, optimizer)
        _check_precision(deepspeed_config, world.device)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory tables
            self._engine, *_ = deepspeed.initialize(
                model=model.to(world.device), optimizer=self.optimizer, config=deepspeed_config
            )
        self._zero: Any = None
        if self.stage:
            self._zero = self._engine.optimizer
        self._bind_optimizer()
        if self.loss_scaler_state():
            # The trainer stops with a reason; DeepSpeed would raise a bare Exception.
            self._zero.loss_scaler.raise_error_at_min_scale = False

    @property
    def model(self) -> nn.Module:
        """The model, to be called through `forward`."""
        return self._engine.module

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return int(self._engine.gradient_accumulation_steps())

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the model on one micro-batch."""
        return self._engine(*inputs, **options)

    def evaluate(self, *inputs: Any, **options: Any) -> Any:
        """Run the model without dropout and without a graph. Collective under ZeRO-3."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return self._engine(*inputs, **options)
        finally:
            self._engine.train()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch.

        Args:
            loss: this rank's share of the loss of the *global* batch: a sum over its predictions divided by the
                number of predictions of all ranks and micro-batches. DeepSpeed averages over the ranks, which
                the factor undoes, so gradients do not depend on how a batch is divided.
        """
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights after the last micro-batch of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        self.optimizer.num_steps += 1
        result = self._step_partitioned() if self._zero else self._step_replicated()
        if not result.applied:
            self.optimizer.num_steps -= 1
        return result

    def _step_partitioned(self) -> StepResult:
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if not applied and getattr(self._zero, "cpu_offload", False):
            # 0.19.8 keeps the non-finite sums under offload, and would drop every later step because of them.
            for index in self._zero.averaged_gradients:
                self._zero.averaged_gradients[index] = None
        norm = self._engine.get_global_grad_norm()
        return StepResult(applied, float("inf") if norm is None else float(norm))

    def _step_replicated(self) -> StepResult:
        """ZeRO stage 0 checks nothing itself: decide here whether the gradients, equal on all ranks, are finite."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        applied = norm < float("inf")
        groups = self.optimizer.param_groups
        if not applied:
            # A step over no groups: DeepSpeed's counters move, weights and moments do not.
            self.model.zero_grad(set_to_none=False)
            self.optimizer.param_groups = []
        self._engine.step()
        self.optimizer.param_groups = groups
        return StepResult(applied, norm)

    def _bind_optimizer(self) -> None:
        if not self._zero:
            return
        flat = getattr(self._zero, "fp32_partitioned_groups_flat", None)
        partitions = list(flat) if flat is not None else [g["params"][0] for g in self.optimizer.param_groups]
        self.optimizer.bind_partitions(partitions, self._zero.dp_process_group)
        self._link_optimizer_state()

    def _link_optimizer_state(self) -> None:
        """ZeRO-1/2 find optimizer state of a parameter only after this; they do it after the first step."""
        if self.stage in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def named_shapes(self) -> dict[str, torch.Size]:
        """Full shape of every parameter, tied ones once, in the model's order."""
        return {
            name: getattr(parameter, "ds_shape", parameter.shape)
            for name, parameter in self.model.named_parameters()
        }

    @contextlib.contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """The model with whole weights in the precision it computes with, for reading. Collective under ZeRO-3."""
        parameters = list(self.model.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters):
            yield self.model

    def gather_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Copies of the full fp32 state: (part of STATE_PARTS, name, tensor on the CPU). Collective."""
        for name, parameter in self.model.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for part in STATE_PARTS:
                full = self._full_tensor(parameter, part).detach().reshape(shape).float().cpu()
                # Without partitions this is the live tensor itself; DeepSpeed's getters fill fresh ones.
                yield part, name, full if self._zero else full.clone()

    def _full_tensor(self, parameter: nn.Parameter, part: str) -> Tensor:
        if self._zero is None:
            return parameter if part == WEIGHTS else self.optimizer.moments(parameter)[STATE_KEYS.index(part)]
        if part == WEIGHTS:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, part)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], num_steps: int) -> None:
        """Replace weights and moments by full tensors, whatever stage and world size they come from.

        Args:
            state: part of STATE_PARTS -> parameter name -> full fp32 tensor; every parameter must be there.
            num_steps: optimizer steps that the moments have seen.
        """
        self._link_optimizer_state()
        for name, parameter in self.model.named_parameters():
            for part in STATE_PARTS:
                self._set_tensor(parameter, part, state[part][name])
        self._refresh_low_precision_weights()
        self.optimizer.num_steps = num_steps

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights only; moments and step count are kept (zero before training)."""
        self._link_optimizer_state()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self._set_tensor(parameter, WEIGHTS, weights[name])
            self._refresh_low_precision_weights()

    def _set_tensor(self, parameter: nn.Parameter, part: str, value: Tensor) -> None:
        if self._zero is None:
            self._full_tensor(parameter, part).copy_(value)
        elif self.stage == 3:
            self._set_zero3_partition(parameter, part, value)
        elif part == WEIGHTS:
            safe_set_full_fp32_param(parameter, value.to(self.device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(self.device), part)

    def _set_zero3_partition(self, parameter: Any, part: str, value: Tensor) -> None:
        """`safe_set_full_*` fails under ZeRO-3 where the ranks do not divide the tensor; set padded slices."""
        rank, size = group_rank_and_size(self._zero.dp_process_group)
        shard_size = parameter.ds_tensor.ds_numel
        padded = F.pad(value.flatten(), (0, shard_size * size - value.numel()))
        shard = padded[rank * shard_size : (rank + 1) * shard_size].to(parameter.ds_tensor.device)
        if part == WEIGHTS:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, part)

    def _refresh_low_precision_weights(self) -> None:
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            self._zero.checkpoint_event_prologue()
            pairs = zip(
                self._zero.fp32_partitioned_groups_flat, self._zero.fp16_partitioned_groups_flat, strict=True
            )
            for full, low in pairs:
                low.data.copy_(full.data)
            self._zero.checkpoint_event_epilogue()

    @property
    def loss_scale(self) -> float:
        """Current fp16 loss scale; 1 for other precisions."""
        return self.loss_scaler_state().get("cur_scale", 1.0)

    def loss_scaler_state(self) -> dict[str, float]:
        """State of fp16 dynamic loss scaling; empty for other precisions."""
        scaler = getattr(self._zero, "loss_scaler", None)
        if not self._engine.fp16_enabled() or not getattr(scaler, "dynamic", False):
            return {}
        return {key: float(getattr(scaler, key)) for key in _LOSS_SCALER_KEYS}

    def load_loss_scaler_state(self, state: Mapping[str, float]) -> None:
        """Restore what `loss_scaler_state` returned."""
        if state and self.loss_scaler_state():
            for key in _LOSS_SCALER_KEYS:
                kind = type(getattr(self._zero.loss_scaler, key))
                setattr(self._zero.loss_scaler, key, kind(state[key]))


_LOSS_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _check_precision(deepspeed_config: dict[str, Any], device: torch.device) -> None:
    supported = {"bf16": computes_bf16(device), "fp16": bool(get_accelerator().is_fp16_supported())}
    for precision, is_supported in supported.items():
        if deepspeed_config[precision]["enabled"] and not is_supported:
            others = [name for name, is_there in supported.items() if is_there]
            raise ConfigError(
                f"train.precision ({precision}): this {device.type} does not compute in it; "
                f"use {' or '.join([*others, 'fp32'])}"
            )
