"""What a build keeps on disk while it runs, so that it can go on after a kill.

A hidden directory inside the output holds the settings, a lock, a record of every finished task and, with --dedup,
signatures. It disappears when the manifest is written.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from albert.durable_files import write_file_durably
from albert.errors import ConfigError, UnsafeError
from albert.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest
from data_prep.plan import Source

_NAME = ".build"


class TaskRecord(BaseModel):
    """What a finished task left behind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: int
    input_bytes: int
    counts: dict[str, int]
    shards: tuple[ShardEntry, ...]


def finished_manifest(output: Path, description: dict[str, Any]) -> Manifest | None:
    """The manifest of a dataset that this very command has built already.

    Raises:
        ConfigError: it was built with other settings.
    """
    if not (output / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(output)
    _refuse_difference(output, manifest.settings, description)
    return manifest


def _refuse_difference(output: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [key for key in wanted if there.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise ConfigError(
            f"{output}: holds a dataset made with {key}={there.get(key)!r}, this command says {wanted[key]!r}; "
            "use the same settings to go on, or another --output"
        )


@contextmanager
def locked_work_directory(
    output: Path, description: dict[str, Any], sources: Sequence[Source]
) -> Iterator[Path]:
    """The work directory of this build, made or found again, held by this process alone.

    Raises:
        UnsafeError: the output directory holds something else, or another build is running in it.
        ConfigError: it holds an unfinished build with other settings.
    """
    work = _make_work_directory(output)
    busy = f"--output {output}: another build is writing there; wait for it"
    with _locked(work / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB, busy):
        _begin_or_resume(work, description, sources)
        remove_leftovers(output, work)
        yield work


@contextmanager
def shared_work_directory(output: Path, index: int, count: int) -> Iterator[Path]:
    """The work directory of a build that is done in parts, held together with the other parts.

    Raises:
        UnsafeError: the output directory holds something else, or a whole build or this very part is running in it.
    """
    work = _make_work_directory(output)
    busy = f"--output {output}: another build is writing there; wait for it"
    mine = f"--output {output}: part {index}/{count} is being built already; wait for it"
    with (
        _locked(work / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB, busy),
        _locked(work / f"part-{index}-of-{count}", fcntl.LOCK_EX | fcntl.LOCK_NB, mine),
    ):
        yield work


@contextmanager
def begin_part(work: Path, description: dict[str, Any], sources: Sequence[Source]) -> Iterator[None]:
    """The first moments of a part, one part after the other, so that what all share is written once.

    Raises:
        ConfigError: the directory holds an unfinished build with other settings.
    """
    with _locked(work / "begin", fcntl.LOCK_EX, ""):
        _begin_or_resume(work, description, sources)
        yield


def _make_work_directory(output: Path) -> Path:
    work = output / _NAME
    if output.exists() and not work.is_dir() and (not output.is_dir() or any(output.iterdir())):
        raise UnsafeError(
            f"--output {output}: exists and is not a dataset; name a directory that is new or empty"
        )
    work.mkdir(parents=True, exist_ok=True)
    return work


@contextmanager
def _locked(path: Path, kind: int, busy: str) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, kind)
        except BlockingIOError:
            raise UnsafeError(busy) from None
        yield
    finally:
        os.close(handle)


def _begin_or_resume(work: Path, description: dict[str, Any], sources: Sequence[Source]) -> None:
    """Remember what is built from which files, or check that it is still the same.

    Raises:
        ConfigError: it is not.
    """
    path, output = work / "settings.json", work.parent
    changed_at = {source.path: Path(source.path).stat().st_mtime_ns for source in sources}
    if path.is_file():
        before = json.loads(path.read_bytes())
        _refuse_difference(output, before["settings"], description)
        touched = [name for name, at in changed_at.items() if before["changed_at"].get(name, at) != at]
        if touched:
            raise ConfigError(
                f"{touched[0]}: was changed after the build in {output} began; remove {output} and start again"
            )
    else:
        state = {"settings": description, "changed_at": changed_at}
        write_file_durably(path, [json.dumps(state, indent=1).encode()])


def remove_leftovers(*directories: Path) -> None:
    """Remove what a killed writer left half-written."""
    for directory in directories:
        for leftover in directory.glob("*.tmp-*"):
            leftover.unlink(missing_ok=True)


def read_records(work: Path) -> dict[int, TaskRecord]:
    """Records of the tasks that are done; a task whose shards are not all there with their size is not."""
    records = {}
    for path in sorted(work.glob("task-*.json")):
        try:
            record = TaskRecord.model_validate_json(path.read_bytes())
        except ValidationError:
            continue
        sizes = [(work.parent / shard.name, shard.bytes) for shard in record.shards]
        if all(shard.is_file() and shard.stat().st_size == size for shard, size in sizes):
            records[record.task] = record
    return records


def save_record(work: Path, record: TaskRecord) -> None:
    """Remember that a task is done; its shards are on disk already."""
    write_file_durably(record_path(work, record.task), [record.model_dump_json().encode()])


def record_path(work: Path, task: int) -> Path:
    """Where the record of a task lies."""
    return work / f"task-{task:05d}.json"


def signature_path(output: str | Path, task: int) -> Path:
    """Where the signatures of a task's documents lie while a build with --dedup runs."""
    return Path(output) / _NAME / f"signatures-{task:05d}.npy"


def repeated_path(output: str | Path, task: int) -> Path:
    """Where it says which documents of a task repeat an earlier one."""
    return Path(output) / _NAME / f"repeated-{task:05d}.npy"
