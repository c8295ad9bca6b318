"""Run every benchmark in turn: `python -m benchmarks [NAME ...]`; one JSON line per figure."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

_NOT_BENCHMARKS = {
    "__init__",
    "__main__",
    "figure",
    "learning",
    "length_balance",
    "scaling_table",
    "small_run",
}


def main() -> None:
    """Run the named benchmarks, or all."""
    names = sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NOT_BENCHMARKS
    )
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    chosen = parser.parse_args().names or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(names)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], env=environment, check=False).returncode
        for name in chosen
    ]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
