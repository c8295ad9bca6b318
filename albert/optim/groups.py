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
    others. With `layer_decay`, these are split by level. Tied parameters appear once. Every group carries `name`,
    `num_elements` (of its one adapted tensor, before any padding), `weight_decay`, `adapt` and `rate_factor`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors = rate_factors(model, config.layer_decay)
    adapted: list[tuple[str, nn.Parameter]] = []
    merged: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if config.name == "lamb" and not (config.lamb_variant == "google" and is_excluded(name)):
            adapted.append((name, parameter))
        else:
            merged.setdefault((factors[name], is_excluded(name)), []).append(parameter)
    groups = [
        {
            "params": [parameter],
            "name": name,
            "num_elements": parameter.numel(),
            "weight_decay": 0.0 if is_excluded(name) else config.weight_decay,
            "adapt": True,
            "rate_factor": factors[name],
        }
        for name, parameter in adapted
    ]
    for (factor, excluded), members in sorted(merged.items()):
        name = "undecayed" if excluded else "decayed"
        groups.append(
            {
                "params": members,
                "name": name if factor == 1.0 else f"{name} x {factor:.6g}",
                "num_elements": sum(parameter.numel() for parameter in members),
                "weight_decay": 0.0 if excluded else config.weight_decay,
                "adapt": False,
                "rate_factor": factor,
            }
        )
    return groups


def rate_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Parameter name -> share of the learning rate, `layer_decay` to the power of the levels above its own.

    The head and the pooler are the highest level, the embeddings with their projection the lowest. Between them, a
    block stands as high as its *last* use, for that is where it meets the head, and blocks whose last uses are
    neighbours among all last uses are one level apart. So twelve layers of their own are twelve levels, as in BERT
    (ELECTRA, Clark et al. 2020, section 3.1), one that is shared by all is a single level right below the head,
    and with shared attention the feed-forward blocks are levels of which the attention has the highest.
    """
    names = [name for name, _ in model.named_parameters()]
    if layer_decay == 1.0:
        return dict.fromkeys(names, 1.0)
    encoder: Any = model.get_submodule("albert.encoder")
    uses = {"attention": encoder.attention_of_use, "feed_forward": encoder.feed_forward_of_use}
    last_use = {
        f"albert.encoder.{kind}.{block}": use
        for kind, blocks in uses.items()
        for use, block in enumerate(blocks)
    }
    levels = {use: level for level, use in enumerate(sorted(set(last_use.values())), start=1)}
    level_of = {prefix: levels[use] for prefix, use in last_use.items()}
    level_of |= {"albert.embeddings": 0, "albert.encoder.embedding_hidden_mapping_in": 0}
    level_of["albert.encoder.LayerNorm"] = len(levels)
    head = len(levels) + 1

    def factor(name: str) -> float:
        level = next((level for prefix, level in level_of.items() if name.startswith(f"{prefix}.")), head)
        return float(layer_decay ** (head - level))

    return {name: factor(name) for name in names}
