"""Parameter groups: one group per adapted matrix, so that ZeRO's partitions can be told apart.

DeepSpeed flattens and partitions every parameter group on its own. A group that holds exactly one matrix is
therefore a shard of that matrix on every rank, and LAMB's norms can be summed over the ranks (DeepSpeed#490
is what happens otherwise). ALBERT has about a dozen matrices, because its layers are shared.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from albert.config import OptimizerConfig

_EXCLUDED = re.compile(r"LayerNorm|layer_norm|bias")


def is_excluded(name: str) -> bool:
    """True for biases and LayerNorms, which Google's LAMB neither decays nor adapts (lamb_optimizer.py)."""
    return _EXCLUDED.search(name) is not None


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for `albert.optim.lamb.Lamb`.

    AdamW: one decayed and one undecayed group. LAMB: one group per adapted tensor, and one group with all
    others. Tied parameters appear once. Every group carries `name`, `num_elements` (of its one adapted tensor,
    before any padding), `weight_decay` and `adapt`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named:
        is_adapted = config.name == "lamb" and not (config.lamb_variant == "google" and is_excluded(name))
        (adapted if is_adapted else rest).append((name, parameter))
    groups = [
        {
            "params": [parameter],
            "name": name,
            "num_elements": parameter.numel(),
            "weight_decay": 0.0 if is_excluded(name) else config.weight_decay,
            "adapt": True,
        }
        for name, parameter in adapted
    ]
    for name, decay in (("decayed", config.weight_decay), ("undecayed", 0.0)):
        members = [parameter for key, parameter in rest if is_excluded(key) == (name == "undecayed")]
        if members:
            elements = sum(parameter.numel() for parameter in members)
            groups.append(
                {
                    "params": members,
                    "name": name,
                    "num_elements": elements,
                    "weight_decay": decay,
                    "adapt": False,
                }
            )
    return groups
