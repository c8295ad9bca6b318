"""One figure as one JSON line: value, spread, conditions; and curves as SVG."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def print_figure(name: str, values: Sequence[float], unit: str, **conditions: Any) -> None:
    """Print the median over rounds with its minimum and maximum, and where it was measured."""
    line = {
        "name": name,
        "value": round(statistics.median(values), 4),
        "unit": unit,
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "rounds": len(values),
        **conditions,
        "environment": {
            "commit": _commit(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "deepspeed": version("deepspeed"),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        },
    }
    print(json.dumps(line), flush=True)


@contextlib.contextmanager
def svg_axes(path: Path, xlabel: str, ylabel: str) -> Iterator[Any]:
    """Axes of matplotlib to draw on, which become an SVG file with a legend; equal drawings give equal bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "curve", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    yield axes
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
