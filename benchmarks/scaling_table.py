"""Predicted efficiency from one GPU to thousands; prints the table of docs/SCALING.md.

    python -m benchmarks.scaling_table [--device h200] [--share base=0.55 ...] [--gradients fp32 bf16]

A prediction, not a measurement. A step of N devices takes

    compute x (1 + sigma sqrt(2 ln N)) + accumulation + reduction + update + launches

compute is useful FLOPs over the share of the device's matrix rate that a step reaches (predicted in
`launcher/devices.py`; --share puts a measured one in its place). Ranks wait for the slowest: sigma is the spread of
their times. A shared layer adds to one gradient L times per micro-batch, and the gradient is final only when the
backward pass ends, so nothing of the reduction is hidden: an all-reduce of the gradients and an all-gather of the new
bf16 weights, inside the nodes and in a ring over them, and latency that grows with log N. LAMB updates 1/N of the
parameters (ZeRO-1). Kernels below their launch time cannot be
made shorter by more devices. Efficiency is against one device with the same micro-batch; goodput also counts
failures, saves and restarts.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from albert.flops import step_flops
from albert.model_config import MODEL_PRESETS, ModelConfig
from launcher.devices import Device, find_device
from launcher.plan_memory import num_parameters

SIZES = ("base", "large", "xlarge", "xxlarge")
_LENGTH, _PREDICTIONS = 512, 77
_DEVICES_PER_NODE = 8
_GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
_WEIGHT_BYTES = 2
_NETWORKS = {"one NIC": 50e9, "NIC per GPU": 360e9}
"""Bytes per second and node: one or eight adapters of 400 Gbit/s at nine tenths of their rate."""
_LATENCY_S = 15e-6
_SIGMA = 0.01
_MEMORY_BYTES_PER_S = 4.3e12
_ACCUMULATION_BYTES = 6
_UPDATE_BYTES = 40
_LAUNCH_S = 4e-6
_KERNELS_PER_LAYER = 30
_MTBF_HOURS = 50_600
"""Of one GPU: 466 interruptions in 54 days on 16,384 (Llama 3)."""
_RESTART_S, _SAVE_STALL_S = 120.0, 1.0


@dataclass(frozen=True)
class Cluster:
    """Where a step runs."""

    device: Device
    num_devices: int
    node_bytes_per_s: float
    gradients: str = "fp32"


def reduction_s(parameters: int, cluster: Cluster) -> float:
    """All-reduce of the gradients and all-gather of the new weights: inside the nodes, then between them."""
    size = parameters * (2 * _GRADIENT_BYTES[cluster.gradients] + _WEIGHT_BYTES)
    local = min(cluster.num_devices, _DEVICES_PER_NODE)
    nodes = cluster.num_devices // local
    inside = (local - 1) / local * size / cluster.device.link_bytes_per_s
    between = (nodes - 1) / nodes * size / cluster.node_bytes_per_s
    return inside + between + _LATENCY_S * 3 * math.log2(max(cluster.num_devices, 1))


def compute_s(config: ModelConfig, device: Device, sequences: float, share: float) -> float:
    """Forward and backward of so many full sequences on one device."""
    flops = step_flops(
        config, tokens=_LENGTH, sum_squared_lengths=_LENGTH**2, sequences=1, preds=_PREDICTIONS
    )
    busy = sequences * flops / (device.flops_per_s("bf16") * share)
    return max(busy, 3 * config.num_hidden_layers * _KERNELS_PER_LAYER * _LAUNCH_S)


def step_s(config: ModelConfig, cluster: Cluster, global_batch: int, share: float) -> float:
    """Seconds of one optimizer step."""
    parameters = num_parameters(config)
    sequences = global_batch / cluster.num_devices
    micro_batches = max(1, round(sequences / 32))
    waiting = 1 + _SIGMA * math.sqrt(2 * math.log(cluster.num_devices)) if cluster.num_devices > 1 else 1.0
    accumulation = (
        micro_batches * config.num_hidden_layers * parameters * _ACCUMULATION_BYTES / _MEMORY_BYTES_PER_S
    )
    update = parameters * _UPDATE_BYTES / _MEMORY_BYTES_PER_S / cluster.num_devices
    reduction = reduction_s(parameters, cluster) if cluster.num_devices > 1 else 0.0
    return compute_s(config, cluster.device, sequences, share) * waiting + accumulation + update + reduction


def efficiency(config: ModelConfig, cluster: Cluster, global_batch: int, share: float) -> float:
    """Throughput over that of as many single devices."""
    alone = step_s(config, Cluster(cluster.device, 1, 1.0), global_batch, share) / cluster.num_devices
    return alone / step_s(config, cluster, global_batch, share)


def goodput(num_devices: int) -> float:
    """Share of the time that failures, restarts and saves leave, with the best interval between saves."""
    mtbf_s = _MTBF_HOURS * 3600 / num_devices
    interval_s = math.sqrt(2 * _SAVE_STALL_S * mtbf_s)
    return interval_s / (math.expm1((interval_s + _SAVE_STALL_S) / mtbf_s) * (mtbf_s + _RESTART_S))


def table(device: Device, shares: dict[str, float], gradients: str) -> str:
    """The table as Markdown, for gradients that are summed over the devices in fp32 or bf16."""
    cases = [(64, 4096), (512, 4096), (512, 32768), (4096, 4096), (4096, 32768)]
    lines = [
        "| model | " + " | ".join(f"{num} GPUs, batch {batch}" for num, batch in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    for name in SIZES:
        config = MODEL_PRESETS[name]
        share = shares.get(name, device.efficiency(config.hidden_size))
        cells = []
        for num, batch in cases:
            parts = [
                f"{100 * efficiency(config, Cluster(device, num, speed, gradients), batch, share):.0f}"
                for speed in _NETWORKS.values()
            ]
            seconds = step_s(config, Cluster(device, num, _NETWORKS["NIC per GPU"], gradients), batch, share)
            cells.append(f"{' / '.join(parts)} % ({1000 * seconds:.0f} ms)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goodput_line() -> str:
    """What failures leave."""
    rates = (f"{num}: {100 * goodput(num):.1f} %" for num in (64, 512, 4096))
    return f"Goodput under failures, {', '.join(rates)}."


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h200")
    parser.add_argument(
        "--share", nargs="*", default=[], metavar="MODEL=SHARE", help="measured share of the matrix rate"
    )
    parser.add_argument("--gradients", nargs="+", choices=_GRADIENT_BYTES, default=list(_GRADIENT_BYTES))
    options = parser.parse_args()
    shares = {name: float(value) for name, _, value in (text.partition("=") for text in options.share)}
    for gradients in options.gradients:
        print(f"Gradients in {gradients}:\n\n{table(find_device(options.device), shares, gradients)}\n")
    print(goodput_line())


if __name__ == "__main__":
    main()
