"""Local copies of a remote dataset's files, shared by all processes of a host. Imports no torch.

Copies are named by their SHA-256, so datasets share what they have in common and a dataset that changed at its
address never mixes with its older self. `locks/SHA256` is locked by the kernel: exclusively while the copy is made
or removed, shared while a reader has it open.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from albert.addresses import check_address, file_address
from albert.durable_files import sync_directory, write_file_durably
from albert.errors import AlbertError, ConfigError, DataError, DiskError
from albert.remote import Patience, fetch


def default_cache_directory() -> Path:
    """`$XDG_CACHE_HOME/albert-shards`, or `~/.cache/albert-shards`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "albert-shards"


@dataclass(frozen=True)
class CacheOptions:
    """Where copies lie, how much space they may take, and how long a server is waited for."""

    directory: Path = field(default_factory=default_cache_directory)
    max_bytes: int = 64 << 30
    patience: Patience = field(default_factory=Patience)


class _OpenCopy(io.FileIO):
    """A shard open for reading; it cannot be evicted until it is closed."""

    def __init__(self, path: Path, lock: io.FileIO) -> None:
        self._lock = lock
        super().__init__(str(path), "rb")

    def close(self) -> None:
        super().close()
        self._lock.close()

    def __del__(self) -> None:
        """A source that is dropped lets go of its shard."""
        self.close()


class ShardCache:
    """The files of one remote dataset through the cache of this host."""

    def __init__(self, address: str, options: CacheOptions) -> None:
        """Touch nothing yet.

        Raises:
            ConfigError, UnsafeError: see `albert.remote.check_address`.
        """
        check_address(address)
        self._address, self._options = address, options
        self._shards = options.directory / "shards"
        self._locks = options.directory / "locks"

    def open_shard(self, name: str, size: int, sha256: str) -> io.FileIO:
        """Open a shard, copied first if it is not here; other processes that want it wait for that copy.

        Raises:
            MissingInputError, DataError, UnsafeError: see `albert.remote.fetch`.
            ConfigError: the shard alone is larger than the cache may be.
            DiskError: the cache cannot be written.
        """
        address, path = file_address(self._address, name), self._shards / f"{_checked(sha256)}.tar"
        with self._disk_errors():
            lock = self._open_lock(sha256)
            while True:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if _is_whole(path, size):
                    os.utime(path)  # its last use, for the eviction
                    return _OpenCopy(path, lock)
                # Not atomic: another process may copy or evict in between, so every step looks again.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_whole(path, size):
                    self._copy(address, path, size, sha256)

    def tokenizer(self, name: str, sha256: str) -> Path:
        """A copy of the dataset's tokenizer under its own name; never evicted.

        Raises:
            MissingInputError, DataError, UnsafeError, DiskError: as `open_shard`.
        """
        address = file_address(self._address, name)
        path = self._options.directory / "tokenizers" / _checked(sha256) / PurePosixPath(name).name
        with self._disk_errors(), self._open_lock(sha256) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                path.parent.mkdir(parents=True, exist_ok=True)
                content = io.BytesIO()
                fetch(address, content, None, lambda file: _has_hash(file, sha256), self._options.patience)
                write_file_durably(path, [content.getvalue()])
        return path

    def _copy(self, address: str, path: Path, size: int, sha256: str) -> None:
        """Copy a shard under a temporary name, verify, sync, rename. Its lock is held exclusively."""
        part = path.with_suffix(".part")
        try:
            with self._make_room(part, size, address) as file:
                fetch(address, file, size, lambda copy: _has_hash(copy, sha256), self._options.patience)
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)

    def _make_room(self, part: Path, size: int, address: str) -> BinaryIO:
        """Evict what was used longest ago, and take the space of a new copy at once, so that others count it."""
        limit = self._options.max_bytes
        if size > limit:
            raise ConfigError(
                f"{address}: the shard has {size / 2**30:.3g} GiB, data.cache_max_gib allows {limit / 2**30:.3g}; "
                "raise it to the size of the dataset"
            )
        self._shards.mkdir(parents=True, exist_ok=True)
        with self._open_lock("room") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part.unlink(missing_ok=True)  # of a process that was killed
            copies = _stats(self._shards)
            used = sum(stat.st_size for stat, _ in copies)
            for stat, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
                if used + size <= limit:
                    break
                if self._evict(path):
                    used -= stat.st_size
            # If all the rest is in use, the limit is exceeded by the copies that readers hold open.
            file = part.open("w+b")
            os.posix_fallocate(file.fileno(), 0, size)
            return file

    def _evict(self, path: Path) -> bool:
        """Remove a copy, or what a killed process left of one, unless it is in use."""
        with self._open_lock(path.stem) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink(missing_ok=True)
            return True

    def _open_lock(self, name: str) -> io.FileIO:
        self._locks.mkdir(parents=True, exist_ok=True)
        return io.FileIO(os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except AlbertError:
            raise
        except OSError as error:
            raise DiskError(
                f"{error.filename or self._options.directory}: {error.strerror}; free space or choose another "
                "local disk with data.cache_directory"
            ) from error


def _is_whole(path: Path, size: int) -> bool:
    """Only verified copies get their name; a wrong size would be a file system that lost data."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _stats(directory: Path) -> list[tuple[os.stat_result, Path]]:
    """All files; one may be renamed by its owner while we look."""
    found = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            found.append((path.stat(), path))
    return found


def _has_hash(file: Any, sha256: str) -> bool:
    file.flush()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _checked(sha256: str) -> str:
    """A hash names files of the cache, so it must be one."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DataError(f"{sha256[:80]!r}: the manifest's SHA-256 is no hash; build the dataset again")
    return sha256
