"""Write a Hugging Face directory: config.json, model.safetensors and what `AutoTokenizer` needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from albert.convert.huggingface import hugging_face_name
from albert.convert.tokenizer_files import write_tokenizer_files
from albert.durable_files import write_file_durably
from albert.errors import ConfigError, DataError
from albert.model_config import ModelConfig
from albert.pretrained import CONFIG_NAME, WEIGHTS_NAME, replaced_directory
from albert.tokenization import load_tokenizer
from albert.weights import write_safetensors

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "AlbertForPreTraining": ("albert", "predictions", "sop_classifier"),
    "AlbertForMaskedLM": ("albert", "predictions"),
    "AlbertForSequenceClassification": ("albert", "classifier"),
    "AlbertForTokenClassification": ("albert", "token_classifier"),
    "AlbertForQuestionAnswering": ("albert", "span_classifier"),
    "AlbertForMultipleChoice": ("albert", "choice_classifier"),
    "AlbertModel": ("albert",),
}
"""Hugging Face class -> parts of a model that it loads."""

_WITHOUT_POOLER = ("AlbertForMaskedLM", "AlbertForTokenClassification", "AlbertForQuestionAnswering")
_OURS_ONLY = {"layout", "ln_type", "share_type", "final_ln"}


def write_hugging_face(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Path | None,
    architecture: str | None = None,
    labels: Sequence[str] = (),
) -> str:
    """Write a directory that Hugging Face's classes load without a warning; returns the architecture.

    Args:
        directory: replaced if it is a model directory or empty.
        config: the model.
        state: our parameter names.
        tokenizer: tokenizer file, or None for a directory without one.
        architecture: class that will load it; None takes the one that has the heads of `state`.
        labels: what the outputs of a classifier mean; none for LABEL_0 and so on.

    Raises:
        ConfigError: Hugging Face has no such model, or `state` lacks a head of `architecture`.
        DataError: there are more or fewer labels than outputs.
    """
    refuse_inexpressible(config)
    architecture = architecture or _architecture_of(state)
    chosen = _select(state, architecture)
    tensors = {hugging_face_name(n, config.inner_group_num): t for n, t in chosen.items()}
    fields = hugging_face_config(config, architecture)
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        fields |= {
            "pad_token_id": loaded.pad_id,
            "bos_token_id": loaded.cls_id,
            "eos_token_id": loaded.sep_id,
        }
    if bias := [t for n, t in chosen.items() if n in ("classifier.bias", "token_classifier.bias")]:
        names = labels or [f"LABEL_{i}" for i in range(len(bias[0]))]
        if len(names) != len(bias[0]):
            raise DataError(
                f"{directory}: the model has {len(bias[0])} outputs and {len(names)} labels ({', '.join(names)}); "
                "its task.json is of another model, copy the model again"
            )
        fields["id2label"] = {str(i): name for i, name in enumerate(names)}
        fields["label2id"] = {name: i for i, name in enumerate(names)}
    with replaced_directory(directory) as temporary:
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        write_file_durably(temporary / CONFIG_NAME, [text.encode()])
        write_safetensors(temporary / WEIGHTS_NAME, tensors)
        if tokenizer is not None:
            write_tokenizer_files(tokenizer, temporary, config.max_position_embeddings)
    return architecture


def refuse_inexpressible(config: ModelConfig) -> None:
    """Refuse models that Hugging Face's AlbertModel cannot compute.

    Raises:
        ConfigError: says which property, and where the model can go instead.
    """
    reasons = []
    if config.layout == "brightmart":
        reasons.append("layout brightmart (it adds positions at the hidden size)")
    if config.ln_type == "preln":
        reasons.append("ln_type preln (its layers are post-LN)")
    if config.share_type in ("attention", "ffn"):
        reasons.append(
            f"share_type {config.share_type} (its groups share attention and feed-forward together)"
        )
    if reasons:
        raise ConfigError(
            f"Hugging Face's ALBERT cannot express {' and '.join(reasons)}; keep the model directory "
            "(model.safetensors and config.json) or export it with `python -m albert.convert to-onnx`"
        )


def hugging_face_config(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Hugging Face's config.json of a model; layers that share nothing become one group per layer."""
    fields: dict[str, Any] = config.model_dump(exclude=_OURS_ONLY)
    if config.share_type == "none":
        fields["num_hidden_groups"] = config.num_hidden_layers
    extra = {"model_type": "albert", "architectures": [architecture], "dtype": "float32"}
    return {**fields, **extra}


def _architecture_of(state: Mapping[str, Tensor]) -> str:
    """The class with exactly the heads that are there (without a sentence-order head: masked LM)."""
    heads = {name.partition(".")[0] for name in state}
    for architecture, parts in ARCHITECTURES.items():
        if set(parts) == heads:
            return architecture
    raise ConfigError(
        f"no Hugging Face class has the parts {', '.join(sorted(heads))}; choose with --architecture: "
        f"{', '.join(ARCHITECTURES)}"
    )


def _select(state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors that a class loads."""
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"--architecture {architecture}: unknown; there are {', '.join(ARCHITECTURES)}")
    parts = ARCHITECTURES[architecture]
    chosen = {n: t for n, t in state.items() if n.partition(".")[0] in parts}
    if missing := set(parts) - {n.partition(".")[0] for n in chosen}:
        raise ConfigError(
            f"--architecture {architecture}: the model has no {' and no '.join(sorted(missing))}; "
            f"it has {', '.join(sorted({n.partition('.')[0] for n in state}))}"
        )
    if architecture in _WITHOUT_POOLER:
        return {n: t for n, t in chosen.items() if not n.startswith("albert.pooler.")}
    return chosen
