"""What a use of the shared layer costs besides its matrix products: kernels, bytes moved, bytes saved for backward.

    python -m benchmarks.layer_traffic [--presets base xlarge] [--length 512]

Counts of forward and backward in bf16, which are the same on every machine that takes the same kernels (a GPU is used
where there is one). Moved are the bytes of all tensors that operations read and write, views, matrix products and
attention apart; saved are the bytes that autograd keeps for backward, every storage once, parameters apart. Counted
with two and three layers, so that embeddings, heads and the last layer (of fewer tokens) drop out, and with two and
four sequences, which separates what a token costs from what a use costs (the sum of the weights' gradients).
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from albert.batches import PretrainBatch
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS, ModelConfig
from benchmarks.figure import print_figure
from benchmarks.training_step import Case, make_batch

BARS_KB = {"base": (25.0, 100.0), "xlarge": (66.0, 260.0)}
"""Saved and moved per token and layer use, in 1000 bytes."""
_MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "linear_backward"}
_NO_KERNELS = {
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}
"""Views that are not marked as such, and allocations."""
_MOVED = "moved by "
_VOCAB_SIZE = 1000
"""The vocabulary belongs to embeddings and heads, which drop out."""


class _CountOperations(TorchDispatchMode):
    """Counts what is dispatched, the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _MATRIX_PRODUCTS or "attention" in name or "attn" in name:
            self.counts["products"] += 1
        elif not (func.is_view or name in _NO_KERNELS):
            self.counts["kernels"] += 1
            self.counts[f"{_MOVED}{name}"] += sum(map(_num_bytes, tree_leaves((args, kwargs, outputs))))
        return outputs


def _num_bytes(value: Any) -> int:
    """Bytes of a tensor that an operation touches; a broadcast one has fewer than elements."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def count(model: AlbertForPreTraining, batch: PretrainBatch) -> Counter[str]:
    """Run forward and backward; returns kernels, products, bytes saved, and bytes moved by each operation."""
    saved: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held until the end, so that no other takes its address
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _CountOperations() as mode:
        output = model(batch)
        (output.mlm_loss_sum + output.sop_loss_sum).backward()
    mode.counts["saved"] = sum(storage.nbytes() for storage in saved.values())
    return mode.counts


@dataclass(frozen=True)
class LayerUse:
    """What one more use of the layer costs, forward and backward."""

    kernels: float
    """Operations that move bytes."""
    products: float
    """Matrix products and attention."""
    saved: float
    """Bytes per token that are kept for backward."""
    moved: dict[str, float]
    """Bytes per token that each operation reads and writes."""
    moved_per_use: dict[str, float]
    """The same whatever the number of tokens: the sum of the weights' gradients over the uses."""


def layer_use(config: ModelConfig, length: int, device: str = "cpu") -> LayerUse:
    """Count with two and three layers, and two and four sequences (one alone makes some copies free).

    Args:
        config: of the model; its numbers of layers and pieces do not matter.
        length: tokens of a sequence.
        device: where to run.
    """
    two, four = Counter[str](), Counter[str]()
    for num_layers, sign in ((3, 1), (2, -1)):
        model = _model(config, num_layers).to(device)
        for sequences, total in ((2, two), (4, four)):
            batch = make_batch(Case(model.config, (length,) * sequences, length)).to(device)
            for name, value in count(model, batch).items():
                total[name] += sign * value
    per_token = {name: (four[name] - two[name]) / (2 * length) for name in four}
    per_use = {name: two[name] - value * 2 * length for name, value in per_token.items()}
    return LayerUse(
        per_use["kernels"], per_use["products"], per_token["saved"], _moved(per_token), _moved(per_use)
    )


def _moved(counts: dict[str, float]) -> dict[str, float]:
    moved = {name.removeprefix(_MOVED): value for name, value in counts.items() if name.startswith(_MOVED)}
    return {name: value for name, value in sorted(moved.items(), key=lambda item: -item[1]) if value}


def _model(config: ModelConfig, num_layers: int) -> AlbertForPreTraining:
    changes = {"num_hidden_layers": num_layers, "vocab_size": _VOCAB_SIZE}
    return AlbertForPreTraining(config.model_copy(update=changes)).bfloat16().train()


def main() -> None:
    """Count and print a line for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=MODEL_PRESETS, default=list(BARS_KB))
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for preset in options.presets:
        use = layer_use(MODEL_PRESETS[preset], options.length, device)
        bars = dict(zip(("bar_saved", "bar_moved"), BARS_KB.get(preset, ()), strict=False))
        print_figure(
            "layer_traffic", [sum(use.moved.values()) / 1000], "KB moved per token and layer use", preset=preset,
            kernels=use.kernels, products=use.products, saved_kb=round(use.saved / 1000, 2), **bars,
            moved_kb={name: round(value / 1000, 2) for name, value in use.moved.items()},
            mb_per_use={name: round(value / 1e6, 2) for name, value in use.moved_per_use.items()},
            tokens=options.length, precision="bf16", device=device,
        )  # fmt: skip


if __name__ == "__main__":
    main()
