"""A short pretraining that measures: the configuration that several benchmarks share."""

from __future__ import annotations

from pathlib import Path

from benchmarks.loader import VOCAB_SIZE

SMALL_MODEL = ["model.hidden_size=384", "model.intermediate_size=1536", "model.num_hidden_layers=6"]
"""Over the recipe `base`: hidden 384, 6 layers, the smallest size that keeps a core busy with matrix products."""


def run_overrides(
    directory: Path, run: str, *, num_steps: int, global_batch_size: int, micro_batch_size: int
) -> list[str]:
    """Overrides of a recipe for a dataset of `benchmarks.loader` in a directory, without evaluation.

    Args:
        directory: of the dataset.
        run: name of the run's own directory inside it.
        num_steps: of the whole run.
        global_batch_size: sequences per step.
        micro_batch_size: sequences per rank and forward pass.
    """
    return [
        f"data.directory={directory}", f"train.output_dir={directory / run}", f"train.num_steps={num_steps}",
        f"train.global_batch_size={global_batch_size}", f"train.micro_batch_size={micro_batch_size}",
        f"model.vocab_size={VOCAB_SIZE}", "schedule.warmup_steps=1", "eval.interval_steps=0", "log.progress=off",
    ]  # fmt: skip
