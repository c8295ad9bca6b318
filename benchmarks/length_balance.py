"""How much longer the fullest rank of a step takes than the mean, on documents shorter than the sequences.

    python -m benchmarks.length_balance [--steps 200]

A simulation, not a measurement. Ranks get the same number of sequences, so with short documents not the same number
of tokens, and at the end of a step all wait for the fullest. Lengths are exponential, cut at 512 tokens, such that
17 % of the rows are full and 57 % of a padded batch would be padding, as in short Chinese documents. Prints two JSON
lines for each number of ranks with a global batch of 4,096, in the order of albert/sample_order.py and in a plain
shuffle: fullest rank over mean, mean over the steps, and the spread of the tokens of a step.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from albert.blocks import MAX_EXAMPLES_PER_BLOCK
from albert.sample_order import SampleOrder, rank_share, step_positions
from benchmarks.figure import print_figure

_MAX_LENGTH, _MEAN_BEFORE_CUT = 512, 290
_GLOBAL_BATCH, _NUM_LANES = 4096, 960
_BLOCKS_PER_LANE = 8


def lengths_in_order(count: int) -> NDArray[np.int64]:
    """Lengths at the first positions of a large dataset."""
    num_blocks = _NUM_LANES * _BLOCKS_PER_LANE
    drawn = np.random.default_rng(0).exponential(_MEAN_BEFORE_CUT, (num_blocks, MAX_EXAMPLES_PER_BLOCK))
    lengths = np.sort(np.clip(drawn, 1, _MAX_LENGTH).astype(np.int64), axis=1)
    sizes = [MAX_EXAMPLES_PER_BLOCK] * num_blocks
    order = SampleOrder(sizes, seed=0, num_lanes=_NUM_LANES, window_blocks=4, global_batch_size=_GLOBAL_BATCH)
    places = (order.locate(position) for position in range(count))
    return np.array([lengths[place.block, place.by_length] for place in places])


def tokens_of_ranks(lengths: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """Tokens of each rank in each step: [positions] to [steps, ranks]."""
    steps = range(len(lengths) // _GLOBAL_BATCH)
    positions = [step_positions(step * _GLOBAL_BATCH, _GLOBAL_BATCH) for step in steps]
    return np.array(
        [[lengths[rank_share(k, rank, num_ranks)].sum() for rank in range(num_ranks)] for k in positions]
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    ordered = lengths_in_order(options.steps * _GLOBAL_BATCH)
    shuffled = np.random.default_rng(1).permutation(ordered)
    for num_ranks in (8, 64, 512):
        for name, lengths in (("order", ordered), ("plain shuffle", shuffled)):
            tokens = tokens_of_ranks(lengths, num_ranks)
            ratios, totals = tokens.max(axis=1) / tokens.mean(axis=1), tokens.sum(axis=1)
            print_figure(
                "fullest_rank_over_mean", [float(ratios.mean())], "ratio", examples=name, ranks=num_ranks,
                sequences_per_rank=_GLOBAL_BATCH // num_ranks, steps=options.steps,
                spread_of_step_tokens=round(float(totals.std() / totals.mean()), 5),
            )  # fmt: skip


if __name__ == "__main__":
    main()
