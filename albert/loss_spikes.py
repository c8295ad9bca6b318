"""Loss spikes: noticed by robust statistics; where asked for, the run goes back and leaves the batch out.

What is left out is kept in `RUN/checkpoints/skipped.json`, so that it survives whatever happens after: a checkpoint
that has consumed such positions is not used again.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from albert.config import SpikeConfig
from albert.durable_files import write_file_durably
from albert.errors import DataError

SKIPPED_NAME = "skipped.json"
_MIN_HISTORY = 16
_SIGMA_OF_MAD = 1.4826
_MIN_RELATIVE_SIGMA = 0.005


class SkippedStep(BaseModel):
    """A step whose examples are left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    begin: int
    """First position."""
    end: int
    """Position after the last."""
    step: int
    """Number that the step had."""
    loss: float
    rewind: int
    """Which rewind of the run it was, from 1."""


_SkippedSteps = TypeAdapter(list[SkippedStep])


class SpikeDetector:
    """Compares every loss with those before it: a spike lies far above their median, in units of their spread."""

    def __init__(self, config: SpikeConfig, losses: Sequence[float] = ()) -> None:
        """Begin with the losses that a checkpoint remembers."""
        self._config = config
        self._losses = deque(losses, maxlen=config.window_steps)
        self._expected: deque[tuple[int, int, int]] = deque()

    @property
    def losses(self) -> list[float]:
        """The last ones, for a checkpoint."""
        return list(self._losses)

    @property
    def newest(self) -> tuple[int, int]:
        """First position of the newest step, and that after its last."""
        return self._expected[-1][1:]

    def expect(self, step: int, begin: int, end: int) -> None:
        """A step with these positions was done; its loss follows."""
        self._expected.append((step, begin, end))

    def observe(self, losses: Sequence[tuple[float, float]]) -> list[SkippedStep]:
        """Take the MLM and SOP losses of the next steps that were expected; returns the spikes among them."""
        found = []
        for mlm_loss, sop_loss in losses:
            step, begin, end = self._expected.popleft()
            loss = mlm_loss + sop_loss
            if self.is_spike(loss):
                found.append(SkippedStep(begin=begin, end=end, step=step, loss=loss, rewind=0))
        return found

    def is_spike(self, loss: float) -> bool:
        """Whether the next loss is one; it is remembered in any case. Losses that are not finite are not counted."""
        if not math.isfinite(loss):
            return False
        limit = self._limit()
        self._losses.append(loss)
        return loss > limit

    def _limit(self) -> float:
        if not self._config.threshold or len(self._losses) < _MIN_HISTORY:
            return math.inf
        losses = np.asarray(self._losses)
        median = float(np.median(losses))
        sigma = _SIGMA_OF_MAD * float(np.median(np.abs(losses - median)))
        return median + self._config.threshold * max(sigma, _MIN_RELATIVE_SIGMA * median)


def read_skipped(directory: Path) -> list[SkippedStep]:
    """Steps that are left out, ascending; none where there is no file.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / SKIPPED_NAME
    try:
        return _SkippedSteps.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError as error:
        problem = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged ({problem}); restore it, or remove it to skip nothing") from None


def write_skipped(directory: Path, skipped: Iterable[SkippedStep]) -> None:
    """Replace the file; the steps are given in ascending order."""
    content = json.dumps([step.model_dump() for step in skipped], indent=1)
    write_file_durably(directory / SKIPPED_NAME, [content.encode()])
