"""What a file or directory of weights is: kind, configuration, tensors, parameters."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from albert.convert.tensor_bundle import TensorBundle
from albert.errors import MissingInputError
from albert.model_config import ModelConfig

_DTYPES = {1: "f32", 2: "f64", 3: "i32", 9: "i64", 14: "bf16", 19: "f16"}


def describe(path: Path) -> str:
    """A readable description: one line per tensor, then totals.

    Raises:
        MissingInputError: nothing known lies there.
        DataError: it is damaged.
    """
    if not path.exists() and not Path(f"{path}.index").is_file():
        raise MissingInputError(f"{path}: does not exist")
    if path.is_file() and path.suffix in (".bin", ".pt", ".pth"):
        from albert.convert.huggingface import read_torch_file

        state = read_torch_file(path)
        return _table(f"PyTorch state dict {path}", {n: tuple(t.shape) for n, t in state.items()})
    if path.is_file() and path.suffix == ".safetensors":
        from albert.weights import read_safetensors

        state = read_safetensors(path)
        return _table(f"safetensors file {path}", {n: tuple(t.shape) for n, t in state.items()})
    if path.is_dir() and ((path / "config.json").is_file() or (path / "checkpoints").is_dir()):
        return _describe_model(path)
    bundle = TensorBundle(path)
    shapes = {name: entry.shape for name, entry in bundle.entries.items()}
    kinds = {name: _DTYPES.get(e.dtype, str(e.dtype)) for name, e in bundle.entries.items()}
    return _table(f"TensorFlow checkpoint {bundle.prefix}", shapes, kinds)


def _describe_model(path: Path) -> str:
    from albert.pretrained import load_pretrained

    config, state, tokenizer = load_pretrained(path)
    head = f"model {path}\ntokenizer {tokenizer or 'none'}\nconfiguration {_config_line(config)}"
    return _table(head, {n: tuple(t.shape) for n, t in state.items()})


def _config_line(config: ModelConfig) -> str:
    return json.dumps(config.model_dump())


def _table(head: str, shapes: dict[str, tuple[int, ...]], kinds: dict[str, str] | None = None) -> str:
    lines = [head]
    for name in sorted(shapes):
        kind = f"{kinds[name]} " if kinds else ""
        lines.append(f"  {name} {kind}{list(shapes[name])}")
    total = sum(prod(shape) for shape in shapes.values())
    lines.append(f"{len(shapes)} tensors, {total:,} numbers")
    return "\n".join(lines)
