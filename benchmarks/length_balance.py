"""How much longer the fullest rank of a step takes than the mean, on documents shorter than the sequences.

    python -m benchmarks.length_balance [--steps 200]

A simulation, not a measurement. Ranks get the same number of sequences, so with short documents not the same number
of tokens, and at the end of a step all wait for the fullest. Lengths are exponential, cut at 512 tokens, such that
17 % of the rows are full and 57 % of a padded batch would be padding, as in short Chinese documents. Prints one JSON
line for each number of ranks with a global batch of 4,096: fullest rank over mean, mean over the steps.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.figure import print_figure

_MAX_LENGTH, _MEAN_BEFORE_CUT = 512, 290
_GLOBAL_BATCH = 4096


def fullest_over_mean(num_ranks: int, steps: int) -> np.ndarray:
    """Tokens of the fullest rank over the mean of all ranks, [steps]."""
    lengths = np.random.default_rng(0).exponential(
        _MEAN_BEFORE_CUT, (steps, num_ranks, _GLOBAL_BATCH // num_ranks)
    )
    tokens = np.clip(lengths, 1, _MAX_LENGTH).sum(axis=2)
    return tokens.max(axis=1) / tokens.mean(axis=1)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    for num_ranks in (8, 64, 512):
        ratios = fullest_over_mean(num_ranks, options.steps)
        print_figure(
            "fullest_rank_over_mean", [float(ratios.mean())], "ratio", ranks=num_ranks,
            sequences_per_rank=_GLOBAL_BATCH // num_ranks, steps=options.steps,
        )  # fmt: skip


if __name__ == "__main__":
    main()
