"""What a pretraining will take: memory, largest micro-batch, step time, days, communication, and advice.

Everything is arithmetic on the configuration; predictions are labelled so. FLOPs are those of `albert/flops.py`.
The shared layer's gradient is final only when the backward pass ends, so its reduction hides behind nothing: the
whole communication of a step is counted as waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from albert.config import RunConfig, gradient_accumulation_steps
from albert.deepspeed_config import read_placement, zero_stage
from albert.flops import step_flops
from launcher.devices import Device
from launcher.plan_memory import Memory, largest_micro_batch, num_parameters, peak_memory

_PREDICTED_SHARE = 0.15
_MUCH_COMMUNICATION = 0.2
"""Share of a step."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned."""

    config: RunConfig
    num_nodes: int
    devices_per_node: int
    device: Device
    seq_length: int
    """Tokens of an average sequence, without padding."""
    network_gbit_per_node: float

    @property
    def num_ranks(self) -> int:
        """One per device."""
        return self.num_nodes * self.devices_per_node


@dataclass(frozen=True)
class Plan:
    """The answer; times in seconds, sizes in bytes."""

    stage: int
    parameters: int
    accumulation_steps: int
    memory: Memory
    largest_micro_batch: int
    flops_per_step: float
    compute_s: float
    communication_s: float
    num_steps: int
    advice: tuple[str, ...]

    @property
    def step_s(self) -> float:
        """Computation, then communication."""
        return self.compute_s + self.communication_s

    @property
    def days(self) -> float:
        """Of the whole run, without evaluation, checkpoints and restarts."""
        return self.num_steps * self.step_s / 86400


def make_plan(request: PlanRequest) -> Plan:
    """Plan a run.

    Raises:
        ConfigError: the global batch does not divide over the ranks, or the placement is wrong.
    """
    config, device = request.config, request.device
    stage = zero_stage(read_placement(config.deepspeed.config))
    accumulation = gradient_accumulation_steps(config, request.num_ranks)
    preds = round(_PREDICTED_SHARE * request.seq_length)
    sizes = {"seq_length": request.seq_length, "preds": preds}
    batch = config.train.global_batch_size
    flops = step_flops(
        config.model,
        tokens=batch * request.seq_length,
        sum_squared_lengths=batch * request.seq_length**2,
        sequences=batch,
        preds=batch * preds,
    )
    recomputed = 4 / 3 if config.train.activation_checkpointing else 1.0
    rate = device.flops_per_s(config.train.precision) * device.efficiency(config.model.hidden_size)
    plan = Plan(
        stage=stage,
        parameters=num_parameters(config.model),
        accumulation_steps=accumulation,
        memory=replace(peak_memory(config, stage, request.num_ranks, **sizes), runtime=device.runtime_bytes),
        largest_micro_batch=largest_micro_batch(
            config, stage, request.num_ranks, budget=device.usable_bytes, **sizes
        ),
        flops_per_step=flops,
        compute_s=flops * recomputed / request.num_ranks / rate,
        communication_s=communication_bytes(request, stage, accumulation) / _bandwidth(request),
        num_steps=config.train.num_steps,
        advice=(),
    )
    return _with_advice(plan, request)


def communication_bytes(request: PlanRequest, stage: int, accumulation_steps: int) -> float:
    """Bytes that every rank sends in a step.

    Stages 0 and 1 reduce once per step; 2 and 3 at every micro-batch. 1 and 2 gather the weights after the update,
    3 gathers them for the forward and the backward pass of every micro-batch.
    """
    ring = (request.num_ranks - 1) / request.num_ranks
    parameters = num_parameters(request.config.model)
    weights = _BYTES[request.config.train.precision] * parameters
    gradients = _BYTES[_reduced_type(request)] * parameters
    reduce_scatter, all_gather = ring * gradients, ring * weights
    volumes = {
        0: 2 * reduce_scatter,
        1: 2 * reduce_scatter + all_gather,
        2: accumulation_steps * reduce_scatter + all_gather,
        3: accumulation_steps * (reduce_scatter + 2 * all_gather),
    }
    return volumes[stage]


def _reduced_type(request: PlanRequest) -> str:
    """In which gradients are summed over the ranks: fp32 unless the placement says otherwise."""
    return str(read_placement(request.config.deepspeed.config).get("communication_data_type", "fp32"))


def _bandwidth(request: PlanRequest) -> float:
    """Bytes per second of the slowest link of a ring over all ranks."""
    if request.num_nodes == 1:
        return request.device.link_bytes_per_s
    return min(request.network_gbit_per_node * 1e9 / 8, request.device.link_bytes_per_s)


def _with_advice(plan: Plan, request: PlanRequest) -> Plan:
    findings = [
        _precision_advice(request),
        _memory_advice(plan, request),
        _stage_advice(plan, request),
        _checkpointing_advice(plan, request),
    ]
    findings += [_micro_batch_advice(plan, request), _scaling_advice(plan, request)]
    return replace(plan, advice=tuple(text for text in findings if text))


def _precision_advice(request: PlanRequest) -> str | None:
    train, device = request.config.train, request.device
    capability = device.compute_capability
    if train.precision == "bf16" and capability is not None and capability < (8, 0):
        return f"{device.name} has no bf16 products (compute capability 8.0 or later has): use train.precision=fp16"
    if train.fp8 != "on":
        return None
    if capability is None or capability < (8, 9):
        return (
            f"{device.name} has no float8 products (compute capability 8.9 or later has): use train.fp8=off"
        )
    return "the times are those of bf16 products; float8's are shorter, which is not predicted here"


def _memory_advice(plan: Plan, request: PlanRequest) -> str | None:
    micro_batch, largest = request.config.train.micro_batch_size, plan.largest_micro_batch
    if micro_batch <= largest:
        return None
    if largest == 0:
        return f"not even one sequence fits: the state alone takes {gib(plan.memory.state)}; take a larger device"
    fitting = _divisor_near(request, largest)
    return (
        f"train.micro_batch_size {micro_batch} does not fit: at most {largest} sequences do; "
        f"use train.micro_batch_size={fitting}, the global batch stays the same"
    )


def _stage_advice(plan: Plan, request: PlanRequest) -> str | None:
    if plan.stage < 2:
        return None
    plain = peak_memory(
        request.config, 1, request.num_ranks,
        seq_length=request.seq_length, preds=round(_PREDICTED_SHARE * request.seq_length),
    )  # fmt: skip
    saved = plain.state - plan.memory.state
    if plain.total > request.device.usable_bytes:
        return None
    more = communication_bytes(request, plan.stage, plan.accumulation_steps) / max(
        1.0, communication_bytes(request, 1, plan.accumulation_steps)
    )
    return (
        f"ZeRO-{plan.stage} is wasteful here: layers are shared, so {plan.parameters / 1e6:.0f} M parameters are all "
        f"there is to divide; it saves {gib(saved)} of {gib(request.device.usable_bytes)} and sends {more:.1f} times "
        "as much per step as ZeRO-1; use deepspeed.config=zero1"
    )


def _checkpointing_advice(plan: Plan, request: PlanRequest) -> str | None:
    train = request.config.train
    if not train.activation_checkpointing:
        return None
    without = request.config.model_copy(
        update={"train": train.model_copy(update={"activation_checkpointing": False})}
    )
    preds = round(_PREDICTED_SHARE * request.seq_length)
    memory = peak_memory(without, plan.stage, request.num_ranks, seq_length=request.seq_length, preds=preds)
    if memory.total > request.device.usable_bytes:
        return None
    return (
        f"activation checkpointing costs a third more computation and is not needed: without it a rank takes "
        f"{gib(memory.total)} of {gib(request.device.usable_bytes)}; set train.activation_checkpointing=false"
    )


def _micro_batch_advice(plan: Plan, request: PlanRequest) -> str | None:
    """Every layer use adds to the shared gradient: a fixed cost per micro-batch, small from 32 sequences on."""
    train = request.config.train
    better = _divisor_near(request, min(32, plan.largest_micro_batch))
    if plan.accumulation_steps == 1 or train.micro_batch_size >= better:
        return None
    return f"larger micro-batches fit and accumulate fewer times: train.micro_batch_size={better}"


def _scaling_advice(plan: Plan, request: PlanRequest) -> str | None:
    share = plan.communication_s / plan.step_s
    if share < _MUCH_COMMUNICATION:
        return None
    text = (
        f"{100 * share:.0f} % of a step is communication; fewer nodes, a larger train.global_batch_size or a faster "
        "network would use the devices better"
    )
    if plan.stage == 1 and request.config.train.precision == "bf16" and _reduced_type(request) == "fp32":
        text += "; deepspeed.config=zero1_bf16_reduction sends half of the gradients' bytes, rounded to bf16"
    return text


def _divisor_near(request: PlanRequest, limit: int) -> int:
    """Largest micro-batch up to `limit` that divides the global batch over the ranks."""
    per_rank = request.config.train.global_batch_size // request.num_ranks
    return max(
        (size for size in range(1, max(1, min(limit, per_rank)) + 1) if per_rank % size == 0), default=1
    )


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"
