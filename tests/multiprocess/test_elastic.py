"""Stop with W ranks and go on with W': the same examples in the same order, the same losses, in every ZeRO stage."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.runs import NO_DROPOUT, audit, losses, make_workspace, train

pytestmark = pytest.mark.multiprocess
MICRO_BATCH_SIZES = {1: 4, 2: 3, 3: 2, 4: 3, 6: 1}
"""By number of ranks, so that accumulation changes as well; the global batch is 12."""
WORLDS = list(MICRO_BATCH_SIZES)
WALK = [
    *(world for i, a in enumerate(WORLDS) for b in (None, *WORLDS[i + 1 :]) for world in (a, b) if world),
    WORLDS[0],
]
"""Numbers of ranks, one for each start; every ordered pair is in it once, so it is a de Bruijn sequence."""
SHORT_WALK = [1, 2, 4, 6, 3, 1]
"""Every number of ranks is left once and come to once."""
STAGES = ["zero0", "zero1", "zero2", "zero3"]
OPTIONS = (*NO_DROPOUT, "eval.interval_steps=0", "data.num_workers=0", "log.ledger=true")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_workspace(tmp_path_factory.mktemp("elastic"), num_steps=len(WALK))
    assert train(directory, "one-rank", 1, *OPTIONS, "deepspeed.config=zero0") == [0]
    return directory


def walk(workspace: Path, name: str, world_sizes: list[int], stages: list[str]) -> None:
    """One step with each number of ranks: the losses are those of one rank, the examples those of the order."""
    for start, (world_size, stage) in enumerate(zip(world_sizes, itertools.cycle(stages), strict=False)):
        placement = (f"deepspeed.config={stage}", f"train.micro_batch_size={MICRO_BATCH_SIZES[world_size]}")
        codes = train(
            workspace, name, world_size, *OPTIONS, *placement, f"train.stop_after_steps={start + 1}"
        )
        assert set(codes) == {0 if start + 1 == len(WALK) else 75}, f"start {start} on {world_size} ranks"
    ours, theirs = losses(workspace / name), losses(workspace / "one-rank")
    assert len(ours) == len(world_sizes)
    differences = [
        abs(ours[key][kind] / theirs[key][kind] - 1) for key in ours for kind in ("mlm_loss", "sop_loss")
    ]
    print(f"{name}: largest relative difference of a loss {max(differences):.1e}")
    assert max(differences) < 1e-6
    assert audit(workspace, name, *OPTIONS) == 0


def test_every_number_of_ranks_and_stage(workspace):
    walk(workspace, "short", SHORT_WALK, STAGES)


def test_the_walk_takes_every_ordered_pair_once():
    assert sorted(itertools.pairwise(WALK)) == sorted(itertools.product(WORLDS, WORLDS))


@pytest.mark.slow
def test_every_pair_of_world_sizes_with_stages_in_turn(workspace):
    walk(workspace, "in-turn", WALK, STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_pair_of_world_sizes_in_every_stage(workspace, stage):
    walk(workspace, stage, WALK, [stage])
