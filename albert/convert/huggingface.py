"""Hugging Face's names and configuration for the same model, in both directions.

Hugging Face's AlbertModel is Google's layout, post-LN. brightmart's layout, pre-LN and partial sharing
have no counterpart there and are refused; layers that share nothing are written as one group each.
"""

from __future__ import annotations

import re

_ATTENTION = {"LayerNorm": "attention.LayerNorm", "dense": "attention.dense"} | {
    part: f"attention.{part}" for part in ("query", "key", "value")
}
_FEED_FORWARD = {"intermediate": "ffn", "output": "ffn_output", "LayerNorm": "full_layer_layer_norm"}
_BLOCK_PARTS = {"attention": _ATTENTION, "feed_forward": _FEED_FORWARD}

_BLOCK = re.compile(r"albert\.encoder\.(attention|feed_forward)\.(\d+)\.(\w+)\.(weight|bias)")

_HEAD_NAMES = {
    "sop_classifier": "sop_classifier.classifier",
    "classifier": "classifier",
    "token_classifier": "classifier",
    "choice_classifier": "classifier",
    "span_classifier": "qa_outputs",
}


def hugging_face_name(name: str, inner_group_num: int) -> str:
    """Hugging Face's name of one of our parameters."""
    if match := _BLOCK.fullmatch(name):
        block, index, part, kind = match.groups()
        group, inner = divmod(int(index), inner_group_num)
        theirs = _BLOCK_PARTS[block][part]
        return f"albert.encoder.albert_layer_groups.{group}.albert_layers.{inner}.{theirs}.{kind}"
    head, _, rest = name.partition(".")
    return f"{_HEAD_NAMES[head]}.{rest}" if head in _HEAD_NAMES else name
