"""Names the tensor in which a dropped step went wrong, by running the step once more and looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from albert.distributed import gather_rows
from albert.engine import Engine

_NAME_BYTES = 160


def first_bad_tensors(engine: Engine, losses: Sequence[Callable[[], Tensor]]) -> dict[int, str]:
    """The first tensor of the step that is not finite, for every rank that has one. Collective.

    Args:
        engine: whose last step was dropped, so that its weights are as before.
        losses: one per micro-batch of this rank; each runs the forward pass and returns the loss.

    Returns:
        Rank -> description. Under ZeRO-3 gradients are not looked into.
    """
    name = _bad_weight(engine.model) or next((found for loss in losses if (found := _look(engine, loss))), "")
    row = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    encoded = name.encode()[:_NAME_BYTES]
    row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    names = [bytes(other.tolist()).rstrip(b"\0").decode(errors="replace") for other in gather_rows(row)]
    return {rank: name for rank, name in enumerate(names) if name}


def _bad_weight(model: nn.Module) -> str | None:
    bad = (name for name, parameter in model.named_parameters() if not _is_finite(parameter.detach()))
    return next((f"weight {name}" for name in bad), None)


def _look(engine: Engine, loss: Callable[[], Tensor]) -> str | None:
    outputs: list[tuple[str, Tensor]] = []

    def remember(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.extend((name, value) for value in _tensors(output))

    handles = [module.register_forward_hook(remember(name)) for name, module in engine.model.named_modules()]
    try:
        # Inside a compiled layer nothing could be seen.
        with torch.compiler.set_stance("force_eager"):
            value = loss()
    finally:
        for handle in handles:
            handle.remove()
    # A module's output comes after those of the modules inside it.
    bad = next((name for name, output in outputs if not _is_finite(output.detach())), None)
    if bad is not None:
        return f"output of {bad or 'the model'}"
    if not _is_finite(value.detach()):
        return "loss"
    return None if engine.stage == 3 else _bad_gradient(value * engine.loss_scale, outputs)


def _bad_gradient(loss: Tensor, outputs: Sequence[tuple[str, Tensor]]) -> str | None:
    """Gradients of outputs only, so that no parameter's accumulated gradient changes."""
    wanted = [(name, output) for name, output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(loss, [output for _, output in wanted], allow_unused=True)
    for (_, output), gradient in reversed(list(zip(wanted, gradients, strict=True))):
        if gradient is not None and not _is_finite(gradient):
            innermost = next(name for name, other in wanted if other is output)
            return f"gradient of the output of {innermost or 'the model'}"
    return None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
