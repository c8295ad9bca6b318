"""What ranks leave behind for the launcher: small JSON files in a directory that both can see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.outcome import RankEnd

_SIGNALS = "signals.json"


def write_record(directory: str | Path, rank: int, event: str, fields: dict[str, Any]) -> None:
    """Write one record; readers see it whole or not at all."""
    path = Path(directory) / f"rank-{rank}.{event}.json"
    hidden = path.with_suffix(".tmp")
    hidden.write_text(json.dumps({"rank": rank, **fields}))
    hidden.rename(path)


def read_records(directory: Path, event: str) -> dict[int, dict[str, Any]]:
    """Records of one kind, by rank."""
    records = [json.loads(path.read_text()) for path in directory.glob(f"rank-*.{event}.json")]
    return {record["rank"]: record for record in records}


def read_ends(directory: Path) -> list[RankEnd]:
    """How the ranks ended that have ended."""
    return [
        RankEnd(rank, end["host"], end["code"], end["at"], tuple(end["sent"]))
        for rank, end in read_records(directory, "ended").items()
    ]


def write_signals(directory: Path, numbers: Sequence[int]) -> None:
    """Leave the signals that came so far for ranks that no signal reaches."""
    hidden = directory / f"{_SIGNALS}.tmp"
    hidden.write_text(json.dumps(list(numbers)))
    hidden.rename(directory / _SIGNALS)


def read_signals(directory: str | Path) -> list[int]:
    """Signals that came so far."""
    try:
        return [int(number) for number in json.loads((Path(directory) / _SIGNALS).read_text())]
    except FileNotFoundError:
        return []
