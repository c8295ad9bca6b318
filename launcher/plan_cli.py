"""`python -m launcher plan`: its command line and its report."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from albert.config import load_run_config
from albert.errors import ConfigError
from launcher.devices import DEVICES, find_device
from launcher.plan import Plan, PlanRequest, gib, make_plan

_EXAMPLES = """\
examples:
  python -m launcher plan --config xlarge --nodes 8 --gpus 8
  python -m launcher plan --config base --gpus 4 --gpu a100-40 train.micro_batch_size=64
  python -m launcher plan --config xxlarge --nodes 2 --gpus 8 --network-gbit 100 deepspeed.config=zero3
  python -m launcher plan --config xlarge --gpus 8 --seq-length 410 --json

Times are predictions from FLOPs and the efficiency expected of the model's size; they leave out evaluation,
checkpoints and restarts.
"""
_WHOLE_RUN = ("data.directory=unknown", "train.output_dir=unknown")


def add_plan_command(places: Any) -> None:
    """Register `plan` with the launcher's command line."""
    parser = places.add_parser(
        "plan",
        help="memory, micro-batch, step time and days of a pretraining, before it costs anything",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="recipe or path of a YAML file")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per node, one rank on each (8)")
    parser.add_argument("--gpu", default="h100", help=f"kind of GPU: {', '.join(DEVICES)} (h100)")
    parser.add_argument("--memory-gib", type=float, help="memory of a GPU, if it differs")
    parser.add_argument("--tflops", type=float, help="dense 16-bit TFLOP/s of its datasheet, if they differ")
    parser.add_argument("--network-gbit", type=float, default=400, help="network of a node, Gbit/s (400)")
    parser.add_argument("--seq-length", type=int, help="tokens of an average sequence (default: the longest)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.set_defaults(run=_run_plan)


def _run_plan(options: argparse.Namespace) -> int:
    request = _request(options)
    plan = make_plan(request)
    print(json.dumps(_figures(plan, request)) if options.json else "\n".join(report(plan, request)))
    return 0


def _request(options: argparse.Namespace) -> PlanRequest:
    for name in ("nodes", "gpus"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: give 1 or more")
    given = {text.partition("=")[0] for text in options.overrides}
    missing = [text for text in _WHOLE_RUN if text.partition("=")[0] not in given]
    config = load_run_config(options.config, [*missing, *options.overrides])
    longest = config.model.max_position_embeddings
    seq_length = longest if options.seq_length is None else options.seq_length
    if not 1 <= seq_length <= longest:
        raise ConfigError(f"--seq-length {seq_length}: 1 to model.max_position_embeddings ({longest})")
    device = find_device(options.gpu)
    if options.memory_gib is not None:
        device = replace(device, memory_bytes=int(options.memory_gib * 2**30))
    if options.tflops is not None:
        device = replace(device, tflops_16_bit=options.tflops)
    return PlanRequest(config, options.nodes, options.gpus, device, seq_length, options.network_gbit)


def report(plan: Plan, request: PlanRequest) -> list[str]:
    """The plan for a reader."""
    train, memory = request.config.train, plan.memory
    tokens_per_s = train.global_batch_size * request.seq_length / plan.step_s
    utilisation = (
        plan.flops_per_step / plan.step_s / request.num_ranks / request.device.flops_per_s(train.precision)
    )
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "vocabulary": memory.vocabulary,
        **({"runtime": memory.runtime} if memory.runtime else {}),
    }
    lines = [
        f"{plan.parameters / 1e6:.1f} M parameters, {request.config.model.num_layer_uses} layer uses of "
        f"{request.config.model.hidden_size}; {request.num_ranks} ranks ({request.num_nodes} x "
        f"{request.devices_per_node} {request.device.name}), ZeRO-{plan.stage}, {train.precision}",
        f"batch        {train.global_batch_size} = {train.micro_batch_size} x {plan.accumulation_steps} "
        f"accumulated x {request.num_ranks} ranks, sequences of {request.seq_length}",
        f"memory       {gib(memory.total)} of {gib(request.device.usable_bytes)} usable on each GPU",
        *(f"  {name:<11}{gib(size):>11}" for name, size in parts.items()),
        f"micro-batch  at most {plan.largest_micro_batch} sequences fit",
        f"step         {plan.flops_per_step / 1e12:,.1f} useful TFLOP; predicted {plan.step_s:.3f} s: "
        f"{plan.compute_s:.3f} s computing, {plan.communication_s:.3f} s communicating "
        f"({100 * plan.communication_s / plan.step_s:.1f} %)",
        f"speed        predicted {tokens_per_s:,.0f} tokens/s, {100 * utilisation:.0f} % of attainable FLOP/s",
        f"run          predicted {plan.days:.2f} days for {plan.num_steps:,} steps "
        f"({plan.days * 24 * request.num_ranks:,.0f} GPU-hours)",
    ]
    return [*lines, *(f"advice: {text}" for text in plan.advice)]


def _figures(plan: Plan, request: PlanRequest) -> dict[str, Any]:
    return {
        **asdict(plan),
        "memory_total": plan.memory.total,
        "usable_bytes": request.device.usable_bytes,
        "step_s": plan.step_s,
        "days": plan.days,
        "num_ranks": request.num_ranks,
        "device": request.device.name,
        "seq_length": request.seq_length,
    }
