"""Loss spikes against a simulated loss curve, and the file of what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from albert.config import SpikeConfig
from albert.errors import DataError
from albert.loss_spikes import SKIPPED_NAME, SkippedStep, SpikeDetector, read_skipped, write_skipped


def loss_curve(num_steps: int) -> np.ndarray:
    """Falls from 10 towards 2 with the noise of batches."""
    steps = np.arange(num_steps)
    return 2 + 8 * np.exp(-steps / 1500) + np.random.default_rng(0).normal(0, 0.05, num_steps)


def test_at_most_one_false_alarm_in_10000_steps():
    detector = SpikeDetector(SpikeConfig())
    assert sum(detector.is_spike(loss) for loss in loss_curve(10_000)) <= 1


@pytest.mark.parametrize("at", [40, 700, 9_000])
@pytest.mark.parametrize("height", [1.0, 5.0])
def test_a_spike_is_noticed_at_its_first_step(at, height):
    losses = loss_curve(10_000)
    losses[at : at + 3] += height
    detector = SpikeDetector(SpikeConfig())
    found = [step for step, loss in enumerate(losses[: at + 50]) if detector.is_spike(loss)]
    assert found == [at, at + 1, at + 2]


def test_threshold_0_and_short_histories_find_nothing():
    assert not any(SpikeDetector(SpikeConfig(threshold=0)).is_spike(loss) for loss in [1.0] * 50 + [100.0])
    assert not any(SpikeDetector(SpikeConfig()).is_spike(loss) for loss in [1.0] * 15 + [100.0])


def test_a_detector_goes_on_from_the_losses_of_a_checkpoint():
    losses = loss_curve(100)
    whole = SpikeDetector(SpikeConfig())
    for loss in losses:
        whole.is_spike(loss)
    assert whole.losses == losses[-64:].tolist()
    resumed = SpikeDetector(SpikeConfig(), whole.losses)
    assert resumed._limit() == whole._limit()
    assert not resumed.is_spike(float("nan"))
    assert resumed.losses == whole.losses


def test_losses_are_matched_with_their_steps():
    detector = SpikeDetector(SpikeConfig(), [1.0] * 20)
    for step in (21, 22, 23):
        detector.expect(step, 12 * step, 12 * step + 12)
    assert detector.observe([(0.6, 0.4)]) == []
    assert detector.observe([(8.0, 1.0), (0.5, 0.5)]) == [
        SkippedStep(begin=264, end=276, step=22, loss=9.0, rewind=0)
    ]


def test_the_file_of_skipped_steps_is_kept_in_order(tmp_path):
    assert read_skipped(tmp_path) == []
    steps = [SkippedStep(begin=k, end=k + 12, step=k // 12, loss=9.5, rewind=1) for k in (24, 120)]
    write_skipped(tmp_path, steps)
    assert read_skipped(tmp_path) == steps
    (tmp_path / SKIPPED_NAME).write_text('[{"begin": 1}]')
    with pytest.raises(DataError, match=r"skipped\.json: damaged \(4 validation errors"):
        read_skipped(tmp_path)
