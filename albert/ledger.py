"""The ledger of a run: which examples every step used, as JSON lines per start of the run and rank.

`RUN/ledger/start-0003/rank-00001.jsonl` begins with a line about the start (`step` and `position` where it goes on,
`rank`, `world_size`). Then follows a line per step with `step` and `examples`, this rank's [position, block, index
by length, epoch] as the loader read them, and, where the run went back, a line with `rewound_to` (a step). Steps that
a later start does again are therefore in the ledger twice. `audit_ledger` of `albert/ledger_audit.py` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from albert.batches import PretrainBatch
from albert.distributed import World, max_over_ranks

LEDGER_NAME = "ledger"


class Ledger:
    """Writes what one rank used."""

    def __init__(self, run_directory: Path, world: World, step: int, position: int) -> None:
        """Open this start's file. Collective.

        Args:
            run_directory: of the run.
            world: the ranks.
            step: steps done so far.
            position: positions consumed so far.
        """
        directory = run_directory / LEDGER_NAME
        number = len(list(directory.glob("start-*"))) if world.is_main else 0
        directory /= f"start-{max_over_ranks(number):04d}"
        directory.mkdir(parents=True, exist_ok=True)
        # Line by line, so that a killed process leaves every step that it finished.
        self._file = (directory / f"rank-{world.rank:05d}.jsonl").open("w", encoding="utf-8", buffering=1)
        self._write(step=step, position=position, rank=world.rank, world_size=world.size)

    def record(self, step: int, micro_batches: Sequence[PretrainBatch]) -> None:
        """A step was done with these examples."""
        self._write(step=step, examples=[example for batch in micro_batches for example in batch.examples])

    def rewind(self, step: int) -> None:
        """The run went back to where it was after `step`."""
        self._write(rewound_to=step)

    def sync(self) -> None:
        """Make the lines so far survive a crash of the machine; before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
