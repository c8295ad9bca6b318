"""Number formats of a run, and which of them a device computes in."""

from __future__ import annotations

from typing import Literal

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the name that `train.precision` has for them."""


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16. GPUs before Ampere emulate it, for torch and DeepSpeed that counts."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def default_precision(device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """bf16 on a GPU, fp16 on one that has no bf16, fp32 on a CPU."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if computes_bf16(device) else "fp16"
