"""One job owns a run directory. The lock is the kernel's and goes with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO, TYPE_CHECKING

from albert.durable_files import make_directory
from albert.errors import ConfigError

if TYPE_CHECKING:
    from albert.distributed import World

LOCK_NAME = "lock"
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def lock_for_all_ranks(directory: Path, option: str, world: World) -> IO[str] | None:
    """Own a run directory on rank 0; if another job does, all ranks refuse. Collective.

    Args:
        directory: to be locked.
        option: by which the user chose it, for the message.
        world: the ranks.

    Returns:
        What `lock_run_directory` returns on rank 0; None on the others.

    Raises:
        ConfigError: another job owns the directory.
    """
    from albert.distributed import min_over_ranks

    lock, problem = None, None
    try:
        lock = lock_run_directory(directory, option) if world.is_main else None
    except ConfigError as error:
        problem = error
    if not min_over_ranks(0 if problem else 1):
        raise problem or ConfigError(f"{directory}: refused by rank 0, see its message")
    return lock


def lock_run_directory(directory: Path, option: str = "train.output_dir") -> IO[str]:
    """Lock a run directory until the returned file is closed or the process ends.

    POSIX record locks are used because network file systems carry them between hosts; where a file system knows no
    locks, the directory stays unlocked.

    Raises:
        ConfigError: another job owns the directory; says which, where and since when it runs.
    """
    make_directory(directory)
    file = (directory / LOCK_NAME).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return file
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"{directory}: owned by {owner}, which still runs; wait for it, stop it, or choose another {option}"
        ) from None
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f" (Slurm job {job})" if job else ""))
    file.flush()
    return file
