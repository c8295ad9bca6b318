"""How far a run is, read from its directory: the newest committed step, and the last line of metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from albert.command_line import CommandParser
from albert.config import load_run_config
from albert.errors import AlbertError
from launcher.job import PROGRAMS

_TAIL_BYTES = 65536
_STEP = re.compile(r"step-(\d+)")


def run_directory(program: str, arguments: Sequence[str]) -> Path | None:
    """Where a program writes its run, as far as its arguments say."""
    parser = CommandParser(f"python -m {PROGRAMS[program]}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--output")
    known, rest = parser.parse_known_args(list(arguments))
    if program not in ("pretrain", "preflight"):
        return Path(known.output) if known.output else None
    if known.config is None:
        return None
    try:
        return Path(load_run_config(known.config, [word for word in rest if "=" in word]).train.output_dir)
    except AlbertError:
        return None


def committed_step(directory: Path | None) -> int:
    """Step of the newest committed checkpoint; -1 if there is none."""
    if directory is None:
        return -1
    names = (path.name for path in (directory / "checkpoints").glob("step-*"))
    return max((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), default=-1)


def last_metrics(directory: Path | None) -> dict[str, Any]:
    """The last training line of metrics.jsonl; empty if there is none."""
    path = None if directory is None else directory / "metrics.jsonl"
    if path is None or not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut at the start of the tail, or still being written
        if isinstance(record, dict) and record.get("kind") == "train":
            return record
    return {}
