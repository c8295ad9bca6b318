"""A placement file (ds_configs/*.json) and the run configuration become one checked DeepSpeed dictionary.

Imports no torch. DeepSpeed 0.19.8 ignores unknown top-level keys, drops "auto", and clips at 1.0 unless told
otherwise; so unknown keys, keys that the run configuration owns and left-over "auto" are errors here.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
from pathlib import Path
from typing import Any

from albert.config import RunConfig, gradient_accumulation_steps
from albert.config_files import read_text
from albert.errors import ConfigError, MissingInputError

_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
}
_OWNED_ENABLED = {"bf16": "train.precision", "fp16": "train.precision"}
_COMMUNICATION_TYPES = ("fp32", "bf16", "fp16")
_REFUSED = {
    "optimizer": "the optimizer is built from the section optimizer of the run configuration",
    "scheduler": "the schedule is built from the section schedule of the run configuration",
    "activation_checkpointing": "use train.activation_checkpointing; DeepSpeed's own fails for shared layers",
    "torch_autocast": "use train.precision; it reduces gradients in bf16 whatever communication_data_type says",
}
_PLACEMENT = (
    "zero_optimization", "communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor",
    "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger",
    "flops_profiler", "seed",
)  # fmt: skip


def placement_names() -> list[str]:
    """Names of the placement files that ship with the package."""
    files = importlib.resources.files("ds_configs").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".json"))


def read_placement(name: str) -> dict[str, Any]:
    """Read a placement file by name or path and check its keys.

    Raises:
        MissingInputError: no such file.
        ConfigError: lists every key that is unknown, owned by the run configuration, or refused.
    """
    if name in placement_names():
        text = read_text(importlib.resources.files("ds_configs") / f"{name}.json")
    elif Path(name).is_file():
        text = read_text(Path(name))
    else:
        raise MissingInputError(
            f"deepspeed.config: '{name}' is neither a file nor one of {', '.join(placement_names())}"
        )
    try:
        placement = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(placement, dict):
        raise ConfigError(f"{name}: holds no JSON object; see ds_configs for the form of a placement")
    problems = [problem for key, value in placement.items() if (problem := _key_problem(key, value))]
    if problems:
        raise ConfigError(f"{name}: " + f"\n{name}: ".join(problems))
    return dict(placement)


def _key_problem(key: str, value: Any) -> str | None:
    if key in _REFUSED:
        return f"{key}: not allowed here; {_REFUSED[key]}"
    if key in _OWNED:
        return (
            None
            if value == "auto"
            else f'{key} ({value!r}): owned by {_OWNED[key]}; remove it or write "auto"'
        )
    if key in _OWNED_ENABLED:
        enabled = value.get("enabled", "auto") if isinstance(value, dict) else value
        owner = _OWNED_ENABLED[key]
        return None if enabled == "auto" else f"{key}.enabled ({enabled!r}): owned by {owner}; remove it"
    if key not in _PLACEMENT:
        near = difflib.get_close_matches(key, [*_PLACEMENT, *_OWNED, *_OWNED_ENABLED], n=1)
        return f"{key}: unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    if key == "communication_data_type" and value not in _COMMUNICATION_TYPES:
        return f"{key} ({value!r}): must be one of {', '.join(_COMMUNICATION_TYPES)}"
    return f'{key}: "auto" is not understood here; write a value' if _has_auto(value) else None


def _has_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_auto(inner) for inner in value.values())
    return bool(value == "auto")


def zero_stage(placement: dict[str, Any]) -> int:
    """The ZeRO stage that a placement asks for."""
    return int(placement.get("zero_optimization", {}).get("stage", 0))


def build_deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        MissingInputError: no such placement file.
        ConfigError: the file or the combination with the run configuration is impossible.
    """
    return complete_placement(
        read_placement(config.deepspeed.config),
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        accumulation_steps=gradient_accumulation_steps(config, world_size),
        world_size=world_size,
        max_grad_norm=config.optimizer.max_grad_norm,
    )


def complete_placement(
    placement: dict[str, Any],
    *,
    precision: str,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """Add everything that the run owns to a placement.

    Raises:
        ConfigError: ZeRO stage 0 with a 16-bit precision.
    """
    if zero_stage(placement) == 0 and precision != "fp32":
        raise ConfigError(
            f"train.precision ({precision}) with ZeRO stage 0 accumulates gradients in 16 bits and runs a hidden "
            "optimizer step in DeepSpeed; use deepspeed.config=zero1 or train.precision=fp32"
        )
    result: dict[str, Any] = {key: value for key, value in placement.items() if key not in _OWNED}
    result |= {
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "bf16": {**placement.get("bf16", {}), "enabled": precision == "bf16"},
        "fp16": {**placement.get("fp16", {}), "enabled": precision == "fp16"},
    }
    if precision != "fp32":
        # Measured: fp32 accumulation and reduction leave no error beyond that of the 16-bit forward and backward.
        result.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        result.setdefault("communication_data_type", "fp32")
    return result
