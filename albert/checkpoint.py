"""Checkpoints: topology-free, pickle-free, committed atomically, verified before use.

`checkpoints/step-00000100/` holds `manifest.json`, `config.json`, the tokenizer and one safetensors file per rank
that wrote it. Tensors are full fp32 weights and moments, dealt over the ranks by size, so any number of ranks
and any ZeRO stage loads any checkpoint.

Commit: every rank copies its tensors and a thread writes them into `step-N.tmp`, hashing and syncing, while the
training goes on; when the files of all ranks are there, rank 0 writes the manifest with all hashes, renames the
directory, syncs its parent, moves the pointer `latest`, and only then removes older checkpoints. A crash at any
moment leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from albert.distributed import World, barrier, gather_rows, min_over_ranks
from albert.durable_files import make_directory, sync_directory, write_file_durably
from albert.errors import DataError, DiskError, MissingInputError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_REPLACED_SUFFIX = ".replaced.tmp"
_TEMPORARY_NAME = re.compile(r"step-\d{8,}(\.replaced)?\.tmp|latest\.tmp-\d+")
_PARTS = ("weights", "exp_avg", "exp_avg_sq")
_SPACE_FACTOR = 1.05


class FileEntry(BaseModel):
    """How to verify one file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class TrainingState(BaseModel):
    """Everything besides tensors that a run needs to go on exactly."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    """Optimizer steps done, skipped ones included."""
    position: int
    """Global positions consumed; the whole state of the loader."""
    optimizer_steps: int
    """Steps that the moments have seen."""
    loss_scaler: dict[str, float]
    run_config: dict[str, Any]
    dataset_sha256: str
    tokenizer_sha256: str
    world_size: int
    recent_losses: list[float] = []
    """With which the loss-spike detector goes on."""
    skipped: list[tuple[int, int]] = []
    """Ranges of positions that this state has left out."""


class CheckpointManifest(BaseModel):
    """Content of manifest.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int
    state: TrainingState
    files: dict[str, FileEntry]
    sha256: str = ""
    """Of this manifest with this field empty, so that a flipped bit in it is noticed too."""


def _content_sha256(manifest: dict[str, Any]) -> str:
    """What the manifest's `sha256` has to be, whatever fields its program knew."""
    return hashlib.sha256(json.dumps({**manifest, "sha256": ""}, sort_keys=True).encode()).hexdigest()


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Steps of all committed checkpoints, ascending; other names are ignored."""
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def find_latest(run_directory: Path | str) -> Path:
    """Newest committed checkpoint of a run directory (or of its `checkpoints` directory).

    Raises:
        MissingInputError: there is none.
    """
    run_directory = Path(run_directory)
    nested = run_directory / "checkpoints"
    directory = nested if nested.is_dir() else run_directory
    steps = list_steps(directory)
    if not steps:
        raise MissingInputError(f"{run_directory}: no committed checkpoint; start the pretraining first")
    return step_directory(directory, steps[-1])


def deal_over_ranks(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Rank that writes each tensor: the largest first, always to the rank with the least so far."""
    loads = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda key: (-sizes[key], key)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += sizes[name]
    return owners


class Save:
    """One checkpoint on its way to disk: taken now, written by a thread, committed by all ranks together."""

    def __init__(
        self,
        directory: Path,
        state: TrainingState,
        tensors: Iterable[tuple[str, str, Tensor]],
        shapes: Mapping[str, torch.Size],
        world: World,
    ) -> None:
        """Copy this rank's share of the tensors and begin to write it. Collective.

        Args:
            directory: of the run's checkpoints, shared by all ranks.
            state: equal on all ranks.
            tensors: (part, name, full tensor) in equal order on all ranks, nobody else's from now on; see
                `Engine.gather_state`.
            shapes: of every parameter.
            world: the ranks.

        Raises:
            DiskError: there is no space or no permission; earlier checkpoints are untouched.
        """
        self.final = step_directory(directory, state.step)
        self.state = state
        self._temporary = self.final.with_name(f"{self.final.name}.tmp")
        self._world = world
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        owners = deal_over_ranks(sizes, world.size)
        self._mine = {
            f"{part}/{name}": tensor for part, name, tensor in tensors if owners[name] == world.rank
        }
        num_bytes = len(_PARTS) * 4 * sum(sizes.values())
        _on_all_ranks(lambda: self._stage(num_bytes), directory)
        self._row = torch.zeros(5, dtype=torch.int64)
        self._problem: OSError | None = None
        self._writer = threading.Thread(target=self._write, name="checkpoint-writer")
        self._writer.start()

    @property
    def is_written(self) -> bool:
        """True when this rank's file is on disk, or could not be written."""
        return not self._writer.is_alive()

    def commit(self, extra_files: Mapping[str, bytes], keep_last: int, keep_every: int) -> Path:
        """Wait for the files of all ranks and commit them. Collective.

        Args:
            extra_files: small files that rank 0 adds, such as config.json and the tokenizer.
            keep_last: newest checkpoints that stay.
            keep_every: steps that are multiples of this stay too; 0 for none.

        Raises:
            DiskError: any rank could not write; earlier checkpoints are untouched.
        """
        self._writer.join()
        directory = self.final.parent
        _on_all_ranks(self._raise_problem, directory)
        rows = gather_rows(self._row)

        def commit() -> None:
            if self._world.is_main:
                _commit(self._temporary, self.final, self.state, rows, extra_files)

        def retain() -> None:
            if self._world.is_main:
                _remove_old(directory, self.state.step, keep_last, keep_every)

        _on_all_ranks(commit, directory)
        _on_all_ranks(retain, directory, "remove old checkpoints", "newer")
        return self.final

    def _stage(self, num_bytes: int) -> None:
        if not self._world.is_main:
            return
        if self._temporary.exists():
            _remove(self._temporary)
        make_directory(self._temporary.parent)
        self._temporary.mkdir()
        free_bytes = shutil.disk_usage(self._temporary).free
        if free_bytes < num_bytes * _SPACE_FACTOR:
            message = f"{free_bytes >> 20} MiB are free, a checkpoint needs {num_bytes >> 20}"
            raise OSError(errno.ENOSPC, message, str(self.final.parent))

    def _write(self) -> None:
        try:
            data = safetensors.torch.save(self._mine)
            self._mine.clear()
            path = self._temporary / _rank_file(self._world.rank, self._world.size)
            sha256 = write_file_durably(path, [data])
            self._row[0] = len(data)
            self._row[1:] = torch.frombuffer(bytearray.fromhex(sha256), dtype=torch.int64)
        except OSError as error:
            self._problem = error

    def _raise_problem(self) -> None:
        if self._problem:
            raise self._problem


def _rank_file(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def _on_all_ranks(
    action: Callable[[], None], directory: Path, what: str = "write the checkpoint", others: str = "older"
) -> None:
    """Run an action on every rank; if it fails on any of them, all ranks raise."""
    problem: OSError | None = None
    try:
        action()
    except OSError as error:
        problem = error
    if min_over_ranks(0 if problem else 1):
        return
    if problem is None:
        raise DiskError(f"{directory}: another rank could not {what}; {others} ones are untouched")
    raise DiskError(
        f"{problem.filename or directory}: cannot {what} ({problem.strerror}); {others} ones are untouched; "
        "free space or choose another train.output_dir"
    ) from problem


def _commit(
    temporary: Path, final: Path, state: TrainingState, rows: Tensor, extra_files: Mapping[str, bytes]
) -> None:
    files = {
        _rank_file(rank, len(rows)): FileEntry(bytes=int(row[0]), sha256=row[1:].numpy().tobytes().hex())
        for rank, row in enumerate(rows)
    }
    for name, data in extra_files.items():
        sha256 = write_file_durably(temporary / name, [data])
        files[name] = FileEntry(bytes=len(data), sha256=sha256)
    manifest = CheckpointManifest(format_version=FORMAT_VERSION, state=state, files=files)
    sha256 = _content_sha256(manifest.model_dump(mode="json"))
    manifest = manifest.model_copy(update={"sha256": sha256})
    write_file_durably(temporary / MANIFEST_NAME, [manifest.model_dump_json(indent=1).encode()])
    replaced = final.with_name(f"{final.name}{_REPLACED_SUFFIX}")
    if final.exists():
        # After a resume from an older step, or a second start of a finished run. `remove_leftovers` puts the old
        # one back if this process ends before the new one has its name.
        final.rename(replaced)
    temporary.rename(final)
    sync_directory(final.parent)
    if replaced.exists():
        _remove(replaced)
    write_file_durably(final.parent / POINTER_NAME, [f"{final.name}\n".encode()])


def _remove_old(directory: Path, newest: int, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints that are neither new nor to be kept, and what interrupted saves left; nothing else.

    Args:
        directory: of the checkpoints.
        newest: step that was just committed. Later ones did not verify when the run went on from an earlier one;
            they go too, lest they take the place of good ones.
        keep_last: see `Save.commit`.
        keep_every: see `Save.commit`.
    """
    steps = list_steps(directory)
    earlier = [step for step in steps if step <= newest]
    old = [step for step in earlier[:-keep_last] if not keep_every or step % keep_every]
    remove_steps(directory, old + steps[len(earlier) :])
    _remove_temporary(directory)


def _remove_temporary(directory: Path) -> None:
    for path in directory.iterdir():
        if _TEMPORARY_NAME.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a directory, a file, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def read_checkpoint(directory: Path) -> tuple[TrainingState, dict[str, dict[str, Tensor]]]:
    """Read and verify every byte of a checkpoint.

    Returns:
        The state, and part ("weights", "exp_avg", "exp_avg_sq") -> parameter name -> fp32 tensor.

    Raises:
        MissingInputError: no manifest, so not a committed checkpoint.
        DataError: names the file that differs from the manifest.
    """
    manifest = read_manifest(directory)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, entry in manifest.files.items():
        data = _read_verified(directory / name, entry)
        if name.endswith(".safetensors"):
            for key, tensor in safetensors.torch.load(data).items():
                part, _, parameter = key.partition("/")
                parts[part][parameter] = tensor
    return manifest.state, parts


def read_manifest(directory: Path) -> CheckpointManifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        MissingInputError: there is none.
        DataError: it is damaged or of another format version.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        raw = json.loads(path.read_bytes())
        if raw["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: checkpoint format {raw['format_version']}, this program reads {FORMAT_VERSION}"
            )
        manifest = CheckpointManifest.model_validate(raw)
    except FileNotFoundError:
        raise MissingInputError(
            f"{directory}: no {MANIFEST_NAME}; this is not a committed checkpoint"
        ) from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged manifest ({str(error).splitlines()[0]})") from error
    if manifest.sha256 != _content_sha256(raw):
        raise DataError(f"{path}: damaged manifest (its own SHA-256 differs)")
    return manifest


def _read_verified(path: Path, entry: FileEntry) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: the manifest names this file and it is missing") from None
    if len(data) != entry.bytes:
        raise DataError(f"{path}: {len(data)} bytes, the manifest says {entry.bytes}; the file is torn")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(f"{path}: SHA-256 differs from the manifest; the file is damaged")
    return data


def verify(directory: Path | str) -> CheckpointManifest:
    """Verify every byte of one checkpoint; see `read_checkpoint` for what is raised."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        _read_verified(directory / name, entry)
    return manifest


def read_weights(directory: Path | str) -> dict[str, Tensor]:
    """Verified fp32 weights of a checkpoint by parameter name."""
    return read_checkpoint(Path(directory))[1]["weights"]


def load_newest(
    directory: Path, warn: Callable[[str], None]
) -> tuple[TrainingState, dict[str, dict[str, Tensor]]] | None:
    """Newest checkpoint that verifies on every rank, or None where there is no checkpoint at all. Collective.

    Raises:
        DataError: there are checkpoints and none of them verifies.
    """
    steps = list_steps(directory)
    num_checkpoints = len(steps)
    while (step := min_over_ranks(steps[-1] if steps else -1)) >= 0:
        loaded = None
        try:
            loaded = read_checkpoint(step_directory(directory, step))
        except (DataError, MissingInputError) as error:
            warn(f"{error}; trying the checkpoint before it")
        if min_over_ranks(1 if loaded else 0):
            return loaded
        steps = [earlier for earlier in steps if earlier < step]
    if num_checkpoints:
        raise DataError(
            f"{directory}: none of {num_checkpoints} checkpoints verifies; remove them to start anew"
        )
    return None


def remove_steps(directory: Path, steps: Iterable[int]) -> None:
    """Remove checkpoints."""
    for step in steps:
        # Renamed first, so that a crash in between leaves no half checkpoint under a committed name.
        doomed = step_directory(directory, step)
        _remove(doomed.rename(doomed.with_name(f"{doomed.name}.tmp")))


def remove_leftovers(directory: Path, world: World) -> None:
    """Remove what interrupted saves left behind. Collective."""
    if world.is_main and directory.is_dir():
        for replaced in directory.glob(f"step-*{_REPLACED_SUFFIX}"):
            final = replaced.with_name(replaced.name.removesuffix(_REPLACED_SUFFIX))
            if not final.exists():
                replaced.rename(final)
        _remove_temporary(directory)
    barrier()
