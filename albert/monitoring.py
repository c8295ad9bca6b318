"""What a run reports: JSON lines, TensorBoard, a progress bar, and how much of the hardware it uses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from albert.config import LogConfig

METRICS_NAME = "metrics.jsonl"


def measure_matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix-multiplication rate of this process, the ceiling that utilisation is reported against."""
    size = 8192 if device.type == "cuda" else 512
    left = torch.randn(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(8):
        _synchronize(device)
        begin = time.perf_counter()
        left @ left
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Monitor:
    """Writes metrics on rank 0; silent on the others."""

    def __init__(
        self,
        run_directory: Path,
        config: LogConfig,
        first_step: int,
        num_steps: int,
        shown: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Open the logs and drop what they say about steps after `first_step`, which will be done again.

        Args:
            run_directory: gets the files.
            config: what is reported.
            first_step: steps already done.
            num_steps: steps of the whole run.
            shown: kind -> metrics for the terminal; default those of pretraining.
        """
        self._directory, self._config = run_directory, config
        self._shown = shown or _SHOWN
        self._open(first_step)
        shows_bar = config.progress == "on" or (config.progress == "auto" and sys.stderr.isatty())
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", disable=not shows_bar, dynamic_ncols=True
        )
        self._prints_lines = not shows_bar and config.progress != "off"

    def _open(self, first_step: int) -> None:
        path = self._directory / METRICS_NAME
        _truncate_metrics(path, first_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._tensorboard = (
            SummaryWriter(str(self._directory / "tensorboard"), purge_step=first_step + 1)
            if self._config.tensorboard
            else None
        )

    def rewind(self, step: int) -> None:
        """Drop what the logs say about steps after this one, which will be done again."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        self._open(step)
        self.advance(step)

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one line of metrics, its TensorBoard scalars, and show it."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
            self._tensorboard.flush()
        self._show(kind, step, values)

    def event(self, step: int, message: str, **details: Any) -> None:
        """Record that something happened that is not a number."""
        line = {"kind": "event", "step": step, "time": round(time.time(), 3), "message": message, **details}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.print(f"step {step}: {message}")

    def print(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(step - self._bar.n)

    def _show(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        text = "  ".join(
            f"{name} {_format(name, value)}" for name, value in values.items() if name in self._shown[kind]
        )
        if kind == "train" and not self._prints_lines:
            self._bar.set_postfix_str(text, refresh=False)
        elif kind != "train" or self._prints_lines:
            self.print(f"{kind:5} step {step}/{self._bar.total}  {text}")

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        """Use as a context manager that closes."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


_SHOWN = {
    "train": ("mlm_loss", "sop_loss", "learning_rate", "tokens_per_s", "mfu", "remaining_s"),
    "eval": ("mlm_loss", "mlm_accuracy", "sop_loss", "sop_accuracy"),
    "probe": ("accuracy", "majority_accuracy", "f1", "matthews", "pearson", "exact_match", "entity_f1"),
}


def _format(name: str, value: float) -> str:
    if name.endswith("_s"):
        return f"{value:,.0f}"
    return f"{value:.2e}" if name == "learning_rate" else f"{value:.4f}"


def _truncate_metrics(path: Path, last_step: int) -> None:
    """Keep the lines up to a step; a line that a crash tore is dropped."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(run_directory: Path | str, kind: str) -> list[dict[str, Any]]:
    """All lines of one kind of a run, in order."""
    path = Path(run_directory) / METRICS_NAME
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]
