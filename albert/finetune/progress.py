"""How far a fine-tuning is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Everything that a training knows besides its weights; plain values, written into every checkpoint."""

    step: int = 0
    best_step: int = 0
    """0 before the first evaluation."""
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_answers: list[int] = field(default_factory=list)
    """Which outputs are the highest of any dev example; a single one is a collapsed classifier."""
    evaluations_since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every evaluation, with `step`."""
    stopped_early: bool = False
