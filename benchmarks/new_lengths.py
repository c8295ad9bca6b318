"""Training steps on a CPU whose sequences have lengths that no step had before, against steps on one batch again.

    python -m benchmarks.new_lengths [--rounds 60]

Forward and backward of a small model (hidden 384, 6 layers), one thread, fp32, 8 sequences of 40 to 128 tokens. The
figure is the ratio of tokens per CPU second, new over repeated lengths; memory is what the process grew by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from albert.heads import AlbertForPreTraining
from benchmarks.figure import print_figure
from benchmarks.training_step import CASES, Case, make_batch, own_step, timed

_CONFIG = CASES["small-8x128"].config.model_copy(update={"classifier_dropout_prob": 0.0})
_MEAN, _SEQUENCES = 84, 8


def main() -> None:
    """Measure and print the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AlbertForPreTraining(_CONFIG).train()
    repeated = Case(_CONFIG, (_MEAN,) * _SEQUENCES, 128)
    again = own_step(model, make_batch(repeated))
    for _ in range(3):
        again()
    start, rng, ratios = _private_mib(), np.random.default_rng(0), []
    for _ in range(options.rounds):
        case = Case(_CONFIG, tuple(rng.integers(40, 129, _SEQUENCES).tolist()), 128)
        new = own_step(model, make_batch(case))
        ratios.append(timed(again) / timed(new) * sum(case.lengths) / sum(repeated.lengths))
    print_figure(
        "new_lengths_over_repeated_ones", ratios, "x tokens/s", model="hidden 384, 6 layers",
        tokens=sum(repeated.lengths), precision="fp32", grown_mib=round(_private_mib() - start),
    )  # fmt: skip


def _private_mib() -> float:
    """Memory of this process that no file backs."""
    words = Path("/proc/self/status").read_text(encoding="ascii").split()
    return int(words[words.index("RssAnon:") + 1]) / 1024


if __name__ == "__main__":
    main()
