"""Learning rate as a pure function of the step: nothing to save, nothing that a resume can get wrong.

Step t counts from 0 and is the step that is about to be taken.
"""

from __future__ import annotations

import math

from albert.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, num_steps: int, step: int) -> float:
    """Learning rate of step `step` of `num_steps`.

    `google_polynomial` is Google's optimization.py: linear warm-up, then (1 - t / T)^power counted from step 0,
    so the rate jumps down at the end of the warm-up by the factor (1 - warmup / T)^power.
    """
    warmup, end = schedule.warmup_steps, schedule.end_learning_rate
    if step < warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "google_polynomial":
        remaining = 1 - min(step, num_steps) / num_steps
        return end + (peak - end) * remaining**schedule.power
    if schedule.name == "wsd":
        remaining = min(1.0, (num_steps - step) / schedule.decay_steps)
        return end + (peak - end) * max(0.0, remaining)
    remaining = 1 - min(1.0, (step - warmup) / (num_steps - warmup))
    if schedule.name == "cosine":
        return end + (peak - end) * 0.5 * (1 - math.cos(math.pi * remaining))
    power = schedule.power if schedule.name == "polynomial" else 1.0
    return end + (peak - end) * remaining**power
