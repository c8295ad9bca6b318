"""What an ALBERT is: its configuration, the published presets, and readers of other projects' config.json.

Imports no torch. Field names are Google's and Hugging Face's. Sources of the presets: the configurations of the
released checkpoints (google-research/albert, brightmart/albert_zh).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from albert.config_files import read_text
from albert.errors import ConfigError, MissingInputError


class ModelConfig(BaseModel):
    """Shape and behaviour of the encoder and its heads."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layout: Literal["google", "brightmart"] = "google"
    """Where the embedding is projected: after adding positions (google) or before (brightmart)."""
    ln_type: Literal["postln", "preln"] = "postln"
    share_type: Literal["all", "ffn", "attention", "none"] = "all"
    """What the layers share; `attention` shares attention and gives each layer its own FFN."""
    final_ln: bool = False
    """LayerNorm after the last layer; only for preln (true for new models, false for brightmart's)."""
    vocab_size: int = Field(default=30000, ge=6)
    embedding_size: int = Field(default=128, ge=1)
    hidden_size: int = Field(default=768, ge=1)
    num_hidden_layers: int = Field(default=12, ge=1)
    num_hidden_groups: int = Field(default=1, ge=1)
    inner_group_num: int = Field(default=1, ge=1)
    num_attention_heads: int = Field(default=12, ge=1)
    intermediate_size: int = Field(default=3072, ge=1)
    hidden_act: Literal["gelu_new", "gelu", "relu"] = "gelu_new"
    """gelu_new is the tanh approximation that Google and brightmart trained with; gelu is the erf form."""
    hidden_dropout_prob: float = Field(default=0.0, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(default=0.0, ge=0, lt=1)
    classifier_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    max_position_embeddings: int = Field(default=512, ge=4)
    type_vocab_size: int = Field(default=2, ge=1)
    initializer_range: float = Field(default=0.02, gt=0)
    layer_norm_eps: float = Field(default=1e-12, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.num_hidden_layers % self.num_hidden_groups:
            problems.append(
                f"num_hidden_layers ({self.num_hidden_layers}) is not a multiple of num_hidden_groups "
                f"({self.num_hidden_groups})"
            )
        if self.share_type != "all" and (self.num_hidden_groups, self.inner_group_num) != (1, 1):
            problems.append(
                f"share_type '{self.share_type}' needs num_hidden_groups 1 and inner_group_num 1; "
                "groups are Google's way to say how layers are shared"
            )
        if self.final_ln and self.ln_type == "postln":
            problems.append("final_ln is for ln_type preln; a post-LN layer already ends with a LayerNorm")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def num_layer_uses(self) -> int:
        """How often a layer is applied in one forward pass."""
        return self.num_hidden_layers * self.inner_group_num


def _google(hidden: int, layers: int, heads: int, **other: Any) -> ModelConfig:
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return ModelConfig(**{**fields, **other})


MODEL_PRESETS: dict[str, ModelConfig] = {
    "base": _google(768, 12, 12),
    "large": _google(1024, 24, 16),
    "xlarge": _google(2048, 24, 16),
    "xxlarge": _google(4096, 12, 64),
    "tiny_zh": _google(312, 4, 12, vocab_size=21128),
    "small_zh": _google(384, 6, 12, vocab_size=21128),
    "base_zh": _google(768, 12, 12, vocab_size=21128, hidden_act="relu"),
    "large_zh": _google(1024, 24, 16, vocab_size=21128, hidden_act="relu"),
    "xlarge_zh": _google(2048, 24, 16, vocab_size=21128, hidden_act="relu", initializer_range=0.014),
    "xxlarge_zh": _google(4096, 12, 16, vocab_size=21128, hidden_act="relu", initializer_range=0.01),
    "tiny_brightmart": _google(312, 4, 12, vocab_size=21128, layout="brightmart"),
    "base_brightmart": _google(768, 12, 12, vocab_size=21128, layout="brightmart"),
    "large_brightmart": _google(1024, 24, 16, vocab_size=21128, layout="brightmart"),
    "xlarge_brightmart": _google(2048, 24, 32, vocab_size=21128, layout="brightmart"),
    "xxlarge_brightmart": _google(4096, 12, 64, vocab_size=21128, layout="brightmart", ln_type="preln"),
}
"""Published configurations; English dropout is v2's (0). v1 trained with 0.1 / 0.1 except xxlarge."""


def read_model_config(path: Path) -> ModelConfig:
    """Read a config.json of this project, Google, brightmart, Hugging Face or albert_pytorch.

    Unknown keys of the other projects are ignored. Their "gelu" means the tanh form in Google's and brightmart's
    files (no `model_type`) and the erf form in Hugging Face's.

    Raises:
        MissingInputError: no such file.
        ConfigError: not UTF-8, not JSON, or values that make no model.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: no such model configuration")
    text = re.sub(r"/\*.*?\*/", "", read_text(path), flags=re.DOTALL)
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    try:
        if raw.get("model_type") == "albert-pretraining":
            return ModelConfig.model_validate({k: v for k, v in raw.items() if k != "model_type"})
        return ModelConfig.model_validate(_translate_foreign(raw))
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}".removeprefix(": ") for item in error.errors()
        ]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error


def _translate_foreign(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep the keys that mean something here and translate those whose meaning differs."""
    known = {
        key: value for key, value in raw.items() if key in ModelConfig.model_fields and value is not None
    }
    if known.get("hidden_act") == "gelu" and raw.get("model_type") != "albert":
        known["hidden_act"] = "gelu_new"
    if "share_type" in known:
        known["share_type"] = str(known["share_type"]).lower()
    if raw.get("ln_type"):
        known.setdefault("layout", "brightmart")
    return known


def model_config_bytes(config: ModelConfig) -> bytes:
    """Content of a config.json in this project's own form."""
    fields = {"model_type": "albert-pretraining", **config.model_dump()}
    return (json.dumps(fields, indent=2) + "\n").encode()


def write_model_config(config: ModelConfig, path: Path) -> None:
    """Write config.json in this project's own form."""
    path.write_bytes(model_config_bytes(config))
