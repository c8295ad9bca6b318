"""Time of one LAMB step over a model's parameters against torch.optim.AdamW (foreach), alternating.

python -m benchmarks.lamb_step [--preset xlarge] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from albert.config import OptimizerConfig
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS
from albert.optim.lamb import build_optimizer
from benchmarks.figure import print_figure


def _timed(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="xlarge", choices=MODEL_PRESETS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AlbertForPreTraining(MODEL_PRESETS[options.preset])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    lamb = build_optimizer(model, OptimizerConfig(learning_rate=1e-3))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    for optimizer in (lamb, adamw):
        optimizer.step()
    ratios = []
    for turn in range(options.rounds):
        order = (lamb, adamw) if turn % 2 else (adamw, lamb)
        seconds = {optimizer: _timed(optimizer.step) for optimizer in order}
        ratios.append(seconds[lamb] / seconds[adamw])
    print_figure(
        "lamb_step_over_adamw_foreach", ratios, "x CPU time", preset=options.preset, precision="fp32"
    )


if __name__ == "__main__":
    main()
