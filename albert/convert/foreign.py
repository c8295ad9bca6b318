"""Google's, brightmart's and albert_pytorch's checkpoints: names, layout, what a configuration gets wrong.

Names are those of albert_pytorch; `tensorflow.py` brings TensorFlow's into that form. Everything is strict: a
tensor that is not understood keeps its name and is reported, with what is missing, before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from albert.errors import ConfigError, DataError
from albert.model_config import ModelConfig
from albert.weights import check_tensors


@dataclass(frozen=True)
class Imported:
    """A model read from another project's files."""

    config: ModelConfig
    state: dict[str, Tensor]
    """By our names."""
    notes: list[str] = field(default_factory=list)
    """What was ignored, assumed or looks wrong; for the user to read."""


_PART = r"(weight|bias)"
_GOOGLE = r"bert\.encoder\.transformer\.group\.(?P<group>\d+)\.inner_group\.(?P<inner>\d+)\."
_BRIGHT = r"bert\.encoder\.layer(?:_shared|\.(?P<layer>\d+))\."
_ATTENTION_BLOCK, _FEED_FORWARD_BLOCK = "albert.encoder.attention.{n}.", "albert.encoder.feed_forward.{n}."
_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), template)
    for pattern, template in [
        (r"bert\.embeddings\.(?P<rest>\w+\.(?:weight|bias))", "albert.embeddings.{rest}"),
        (
            rf"bert\.encoder\.(?P<rest>embedding_hidden_mapping_in\.{_PART})",
            "albert.encoder.{rest}",
        ),
        (
            rf"{_GOOGLE}attention\.self\.(?P<rest>(query|key|value)\.{_PART})",
            f"{_ATTENTION_BLOCK}{{rest}}",
        ),
        (
            rf"{_GOOGLE}attention\.output\.(?P<rest>dense\.{_PART})",
            f"{_ATTENTION_BLOCK}{{rest}}",
        ),
        (rf"{_GOOGLE}(?P<rest>LayerNorm\.{_PART})", f"{_ATTENTION_BLOCK}{{rest}}"),
        (
            rf"{_GOOGLE}ffn\.intermediate\.dense\.(?P<rest>{_PART})",
            f"{_FEED_FORWARD_BLOCK}intermediate.{{rest}}",
        ),
        (
            rf"{_GOOGLE}ffn\.intermediate\.output\.dense\.(?P<rest>{_PART})",
            f"{_FEED_FORWARD_BLOCK}output.{{rest}}",
        ),
        (
            rf"{_GOOGLE}LayerNorm_1\.(?P<rest>{_PART})",
            f"{_FEED_FORWARD_BLOCK}LayerNorm.{{rest}}",
        ),
        (
            rf"{_BRIGHT}attention(?:\.(?P<own>\d+))?\.self\.(?P<rest>(query|key|value)\.{_PART})",
            f"{_ATTENTION_BLOCK}{{rest}}",
        ),
        (
            rf"{_BRIGHT}attention(?:\.(?P<own>\d+))?\.output\.(?P<rest>(dense|LayerNorm)\.{_PART})",
            f"{_ATTENTION_BLOCK}{{rest}}",
        ),
        (
            rf"{_BRIGHT}intermediate(?:\.(?P<own>\d+))?\.dense\.(?P<rest>{_PART})",
            f"{_FEED_FORWARD_BLOCK}intermediate.{{rest}}",
        ),
        (
            rf"{_BRIGHT}output(?:\.(?P<own>\d+))?\.dense\.(?P<rest>{_PART})",
            f"{_FEED_FORWARD_BLOCK}output.{{rest}}",
        ),
        (
            rf"{_BRIGHT}output(?:\.(?P<own>\d+))?\.LayerNorm\.(?P<rest>{_PART})",
            f"{_FEED_FORWARD_BLOCK}LayerNorm.{{rest}}",
        ),
        (rf"bert\.pooler\.dense\.(?P<rest>{_PART})", "albert.pooler.{rest}"),
        (
            rf"cls\.predictions\.transform\.(?P<rest>(dense|LayerNorm)\.{_PART})",
            "predictions.{rest}",
        ),
        (r"cls\.predictions\.(?P<rest>bias)", "predictions.{rest}"),
        (rf"cls\.seq_relationship\.(?P<rest>{_PART})", "sop_classifier.{rest}"),
        (rf"(?P<rest>classifier\.{_PART})", "{rest}"),
        (rf"qa_outputs\.(?P<rest>{_PART})", "span_classifier.{rest}"),
    ]
]


def our_name(name: str, inner_group_num: int) -> str | None:
    """Our name of a parameter by albert_pytorch's name, None where there is no counterpart."""
    for pattern, template in _RULES:
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            if found.get("group") is not None:
                block = int(found["group"]) * inner_group_num + int(found["inner"])
            else:
                block = int(found.get("own") or found.get("layer") or 0)
            return template.format(n=block, rest=found["rest"])
    return None


def detect_layout(names: Iterable[str], where: str) -> dict[str, Any]:
    """Layout and sharing that the names reveal, as fields of the configuration.

    Raises:
        DataError: neither Google's nor brightmart's variables are there.
    """
    text = "\n".join(names)
    if "embedding_hidden_mapping_in" in text:
        return {"layout": "google", "share_type": "all"}
    if not re.search(r"word_embeddings_2|encoder\.layer_shared|encoder\.layer\.\d", text):
        raise DataError(
            f"{where}: holds no ALBERT: neither encoder/embedding_hidden_mapping_in (Google) nor "
            f"word_embeddings_2 or encoder/layer_shared (brightmart); use `inspect` to see what it holds"
        )
    share_type = "all"
    if re.search(r"encoder\.layer\.\d", text):
        share_type = "none"
    elif re.search(r"layer_shared\.attention\.\d", text):
        share_type = "ffn"
    elif re.search(r"layer_shared\.(intermediate|output)\.\d", text):
        share_type = "attention"
    return {"layout": "brightmart", "share_type": share_type}


def import_tensors(
    tensors: Mapping[str, Tensor], config: ModelConfig, overrides: Mapping[str, Any], where: str
) -> Imported:
    """Rename, complete and check tensors that have albert_pytorch's names.

    Args:
        tensors: without optimizer slots.
        config: as its file says; layout and sharing are taken from the tensors instead.
        overrides: fields that the user gave, stronger than everything else.
        where: for messages.

    Raises:
        ConfigError: the overridden configuration is impossible.
        DataError: lists tensors that are missing, not understood or of another shape.
    """
    config = with_fields(config, {**detect_layout(tensors, where), **overrides})
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        state[our_name(name, config.inner_group_num) or name] = tensor.float()
    notes = [*_drop_tied(state), *_fold_square_projection(state, config)]
    check_tensors(config, state, where)
    return Imported(config, state, [*notes, *published_mistakes(config)])


def with_fields(config: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration with some fields replaced, checked again.

    Raises:
        ConfigError: the result is no model.
    """
    try:
        return ModelConfig.model_validate({**config.model_dump(), **fields})
    except ValueError as error:
        text = "; ".join(f"{key}={value}" for key, value in fields.items())
        reason = str(error).splitlines()[-2].strip() if "\n" in str(error) else str(error)
        raise ConfigError(f"{text}: {reason}") from error


def _drop_tied(state: dict[str, Tensor]) -> list[str]:
    """Drop stored copies of tied parameters; say where a copy differs from what it is tied to."""
    words = state.get("albert.embeddings.word_embeddings.weight")
    projection = state.get("albert.embeddings.word_embeddings_2.weight")
    originals = {
        "cls.predictions.decoder.weight": words,
        "cls.predictions.project_layer.weight": None if projection is None else projection.T,
    }
    notes = []
    for name, original in originals.items():
        copy = state.pop(name, None)
        if copy is not None and (original is None or not torch.equal(copy, original)):
            notes.append(
                f"{name} differs from the embedding that it is tied to and was replaced by it; "
                "albert_pytorch leaves it random after a conversion"
            )
    return notes


def _fold_square_projection(state: dict[str, Tensor], config: ModelConfig) -> list[str]:
    """Multiply a projection between equal sizes into the word embeddings, which changes no result."""
    name = "albert.embeddings.word_embeddings_2.weight"
    if config.layout != "brightmart" or config.embedding_size != config.hidden_size or name not in state:
        return []
    words = "albert.embeddings.word_embeddings.weight"
    state[words] = (state[words].double() @ state.pop(name).double().T).float()
    return ["word_embeddings_2 between equal sizes was multiplied into word_embeddings"]


def published_mistakes(config: ModelConfig) -> list[str]:
    """Where published configurations are known to be wrong or to disagree; shapes cannot tell."""
    is_google, is_chinese = config.layout == "google", config.vocab_size == 21128
    hidden, heads = config.hidden_size, config.num_attention_heads
    notes = []
    if is_google and not is_chinese and hidden == 2048 and heads == 32:
        notes.append("Google's xlarge was published with num_attention_heads 32 and 16; 16 is right")
    if is_google and is_chinese and hidden == 4096 and heads == 64:
        notes.append("Google's Chinese xxlarge has num_attention_heads 16, the English one 64")
    if is_google and is_chinese and hidden >= 768 and config.hidden_act != "relu":
        notes.append("Google's Chinese models (base and larger) were trained with hidden_act relu")
    if not is_google and hidden == 2048:
        notes.append("brightmart's xlarge was published as ln_type preln and as postln")
    if config.hidden_act == "gelu":
        notes.append("hidden_act gelu is the erf form; Google and brightmart trained with gelu_new")
    remedy = "set it with an option, or let --probe TEXT compare"
    return [f"{note} (this configuration: {_describe(config)}); {remedy}" for note in notes]


def _describe(config: ModelConfig) -> str:
    return f"{config.num_attention_heads} heads, {config.hidden_act}, {config.ln_type}"


def fold_pooled_shift(imported: Imported) -> Imported:
    """Undo albert_pytorch's `dropout(pooled_output + 0.1)`: W(p + 0.1) + b = Wp + (b + 0.1 * sum of W's rows).

    Raises:
        ConfigError: there is no sequence classifier.
    """
    state = dict(imported.state)
    if "classifier.weight" not in state:
        raise ConfigError("--legacy-pooled-shift is for fine-tuned sequence classifiers; there is none here")
    shift = 0.1 * state["classifier.weight"].double().sum(1)
    state["classifier.bias"] = (state["classifier.bias"].double() + shift).float()
    return replace(imported, state=state)
