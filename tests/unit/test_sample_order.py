"""The order of examples: once per epoch, the same for every division, resumable anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from albert.errors import ConfigError
from albert.sample_order import Place, SampleOrder, choose_num_lanes, rank_share, step_positions

SIZES = [7, 5, 7, 7, 3, 7, 7, 1, 7, 7, 7, 2, 7]


def make(
    num_lanes: int = 4, window_blocks: int = 2, seed: int = 3, sizes: list[int] | None = None
) -> SampleOrder:
    return SampleOrder(
        sizes or SIZES, seed=seed, num_lanes=num_lanes, window_blocks=window_blocks, global_batch_size=12
    )


@pytest.mark.parametrize("num_lanes", [1, 2, 4, 6, 13])
@pytest.mark.parametrize("window_blocks", [1, 2, 100])
def test_every_lane_sees_every_example_of_an_epoch_once(num_lanes, window_blocks):
    order = make(num_lanes, window_blocks)
    everything = Counter((block, index) for block, size in enumerate(SIZES) for index in range(size))
    for epoch in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        for lane in range(num_lanes):
            order.locate(lane + num_lanes * 200)  # epochs far ahead must not disturb what follows
            first, last = (int(order._epoch_starts[epoch + i][lane]) for i in (0, 1))
            seen.update(order.locate(lane + num_lanes * index)[:2] for index in range(first, last))
        assert seen == everything


def test_order_is_a_function_of_seed_and_position_alone():
    positions = [int(k) for k in np.random.default_rng(0).permutation(600)]
    forward = make()
    scattered = {k: forward.locate(k) for k in positions}
    assert [make().locate(k) for k in (599, 5, 317)] == [scattered[k] for k in (599, 5, 317)]
    assert scattered != {k: make(seed=4).locate(k) for k in positions}


def test_consecutive_epochs_of_a_lane_differ():
    order = make(num_lanes=1)
    size = sum(SIZES)
    first, second = ([order.locate(k + start) for k in range(size)] for start in (0, size))
    assert [place[:2] for place in first] != [place[:2] for place in second]
    assert {place.epoch for place in first} == {0}
    assert {place.epoch for place in second} == {1}


def ranks_by_length(num_lanes: int, steps: int, batch: int) -> np.ndarray:
    """What is found at every position: an example's rank by length in its block, between 0 and 1. [steps, batch]"""
    sizes = [64] * 20 * num_lanes
    order = SampleOrder(sizes, seed=1, num_lanes=num_lanes, window_blocks=4, global_batch_size=batch)
    found = [order.locate(k).by_length for k in range(steps * batch)]
    return (np.array(found).reshape(steps, batch) + 0.5) / 64


@pytest.mark.parametrize("num_lanes", [1, 12, 60])
@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8, 11, 13, 17, 40, 88, 104, 143])
def test_short_and_long_examples_are_dealt_evenly_to_ranks_and_steps(num_lanes, world_size):
    """A plain shuffle would give means with a deviation of sqrt(1/12/n). 143 is 11 x 13, the first two bases."""
    per_rank, steps = 16, 12
    ranks = ranks_by_length(num_lanes, steps, per_rank * world_size)
    shares = ranks.reshape(steps, per_rank, world_size).mean(axis=1)
    assert shares.std() < 0.75 * (1 / 12 / per_rank) ** 0.5
    assert ranks.mean(axis=1).std() < 0.7 * (1 / 12 / per_rank / world_size) ** 0.5


def test_neighbours_in_a_block_are_scattered():
    """Even dealing leaves the choice among examples of similar lengths to chance."""
    order = SampleOrder([64] * 80, seed=1, num_lanes=4, window_blocks=4, global_batch_size=8)
    first = [order.locate(k) for k in range(0, 64 * 80, 4)]  # lane 0
    at = {place[:2]: index for index, place in enumerate(first)}
    gaps = np.array([abs(at[block, i + 1] - at[block, i]) for block, i in at if (block, i + 1) in at])
    assert gaps.mean() > 0.25 * 4 * 64  # a third in a plain shuffle of a window
    other = SampleOrder([64] * 80, seed=2, num_lanes=4, window_blocks=4, global_batch_size=8)
    same = [order.locate(k) == other.locate(k) for k in range(64 * 80)]
    assert np.mean(same) < 0.01


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("start", [0, 48, 53])
def test_ranks_share_a_step_without_gap_or_overlap(world_size, start):
    positions = step_positions(start, 48)
    parts = [rank_share(positions, rank, world_size).tolist() for rank in range(world_size)]
    assert sorted(k for part in parts for k in part) == list(range(start, start + 48))
    assert {len(part) for part in parts} == {48 // world_size}
    assert all(k % world_size == rank for rank, part in enumerate(parts) for k in part)


def test_a_rank_reads_only_its_own_lanes_when_the_world_divides_them():
    order = make(num_lanes=6)
    blocks_of_lane = [set(order._lane_blocks(0, lane).tolist()) for lane in range(6)]
    for rank in range(3):
        own = set().union(*(blocks_of_lane[lane] for lane in range(rank, 6, 3)))
        first_epoch = range(rank, 6 * 8, 3)
        assert {order.locate(k)[0] for k in first_epoch} <= own


def test_thousand_schedules_of_kills_and_resizes_lose_and_repeat_nothing():
    """Stops at random steps, lost work since the last commit, other world sizes and batch divisions."""
    generator = np.random.default_rng(1)
    total, batch = 20, 12
    order = make(num_lanes=12)
    expected = [order.locate(k) for k in range(total * batch)]
    for _ in range(1000):
        done: dict[int, Place] = {}
        step = 0
        while step < total:
            world_size = int(generator.choice([1, 2, 3, 4, 6, 12]))
            reached = min(total, step + int(generator.integers(1, 8)))
            for at in range(step, reached):
                for rank in range(world_size):
                    done |= {
                        k: order.locate(k)
                        for k in rank_share(step_positions(at * batch, batch), rank, world_size)
                    }
            step = reached if reached == total else int(generator.integers(step, reached + 1))
        assert [done[k] for k in range(total * batch)] == expected


def test_lanes_are_chosen_from_the_number_of_blocks():
    assert [choose_num_lanes(n) for n in (1, 15, 31, 32, 500, 27000, 10**6)] == [1, 1, 1, 2, 24, 960, 960]


def test_impossible_orders_are_refused():
    with pytest.raises(ConfigError, match=r"data.num_lanes \(14\) is more than the dataset's 13 blocks"):
        make(num_lanes=14)
    with pytest.raises(ConfigError, match="train split holds no examples"):
        SampleOrder([], seed=0, num_lanes=1, window_blocks=1, global_batch_size=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize(
    "skipped", [[(0, 12)], [(48, 60)], [(5, 8), (30, 50), (200, 260)], [(7, 13), (13, 25)]]
)
def test_skipped_positions_are_used_by_no_step_and_ranks_stay_even(world_size, skipped):
    left_out = {k for begin, end in skipped for k in range(begin, end)}
    start, used = 0, []
    for _ in range(20):
        positions = step_positions(start, 12, skipped)
        start = int(positions[-1]) + 1
        shares = [rank_share(positions, rank, world_size).tolist() for rank in range(world_size)]
        assert {len(share) for share in shares} == {12 // world_size}
        assert sorted(k for share in shares for k in share) == positions.tolist()
        used += positions.tolist()
    assert used == [k for k in range(used[-1] + 1) if k not in left_out]
