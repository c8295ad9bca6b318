"""Devices that a plan can be made for: memory, speed and links, with where the figures come from."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from albert.errors import ConfigError

_RESERVE_BYTES = 4 * 2**30
"""CUDA context, NCCL, fragmentation."""
_ATTAINABLE = 0.8
"""Share of the datasheet's dense rate that large matrix products reach: 790 of 989 TFLOP/s measured on an H200."""
_EFFICIENCY = ((768, 0.47), (1024, 0.52), (2048, 0.60), (4096, 0.65))
"""Share of the attainable rate that a training step is expected to reach, by hidden size."""


@dataclass(frozen=True)
class Device:
    """One GPU, or one rank of a CPU."""

    name: str
    memory_bytes: int
    tflops_16_bit: float
    """Dense, datasheet."""
    tflops_fp32: float
    link_bytes_per_s: float
    """To the other devices of the node, one direction."""
    runtime_bytes: int = 0
    """What libraries take beside tensors, where memory is the process's own; on GPUs the reserve holds it."""
    compute_capability: tuple[int, int] | None = None
    """Of a GPU: bf16 products need 8.0, float8 products 8.9."""

    @property
    def usable_bytes(self) -> int:
        """What a training step may take."""
        return max(self.memory_bytes - _RESERVE_BYTES, self.memory_bytes // 2)

    def flops_per_s(self, precision: str) -> float:
        """Attainable rate of matrix products."""
        return _ATTAINABLE * 1e12 * (self.tflops_fp32 if precision == "fp32" else self.tflops_16_bit)

    def efficiency(self, hidden_size: int) -> float:
        """Expected share of the attainable rate; small layers wait for memory and launches."""
        position = math.log2(hidden_size)
        points = [(math.log2(size), share) for size, share in _EFFICIENCY]
        if position <= points[0][0]:
            return points[0][1] * 2 ** (position - points[0][0])
        for (left, low), (right, high) in itertools.pairwise(points):
            if position <= right:
                return low + (high - low) * (position - left) / (right - left)
        return points[-1][1]


def _gpu(
    name: str,
    capability: tuple[int, int],
    memory_gib: float,
    tflops_16_bit: float,
    tflops_fp32: float,
    link_gb_per_s: float,
) -> Device:
    return Device(
        name,
        int(memory_gib * 2**30),
        tflops_16_bit,
        tflops_fp32,
        link_gb_per_s * 1e9,
        compute_capability=capability,
    )


DEVICES = {
    device.name: device
    for device in (
        _gpu("h200", (9, 0), 139, 989, 67, 360),
        _gpu("h100", (9, 0), 79, 989, 67, 360),
        _gpu("a100-80", (8, 0), 79, 312, 19.5, 240),
        _gpu("a100-40", (8, 0), 39, 312, 19.5, 240),
        _gpu("l40s", (8, 9), 44, 362, 91, 25),
        _gpu("v100", (7, 0), 31, 125, 15.7, 120),
        _gpu("rtx4090", (8, 9), 23, 165, 82, 25),
        Device("cpu", 16 * 2**30, 0.1, 0.05, 5e9, 96 * 2**20),
    )
}
"""Vendors' datasheets (dense rates); links at four fifths of what NVLink or PCIe promise. cpu: two cores."""


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        ConfigError: no such device.
    """
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name!r}: not known; known are {', '.join(DEVICES)}")
    return DEVICES[name]
