"""Errors that a user can act on, and the exit code that each one ends a program with.

Every message is one sentence: where, what is wrong with which value, what is allowed, what to do. A known
error prints one line and no traceback; anything else is a defect of this project and keeps its traceback.
The codes follow BSD sysexits(3), so that a batch script can tell "requeue me" (75) from "fix the input" (65).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class AlbertError(Exception):
    """Base of all errors that end a program with one line and `exit_code`."""

    exit_code = 1


class DataError(AlbertError, ValueError):
    """Data was read and is wrong: a damaged shard, a bad row, text that is not UTF-8."""

    exit_code = 65


class MissingInputError(AlbertError, FileNotFoundError):
    """A file or directory that was named does not exist or holds nothing."""

    exit_code = 66


class NonFiniteError(AlbertError, ArithmeticError):
    """Loss or gradients were NaN or infinite too many times in a row."""

    exit_code = 70


class DiskError(AlbertError, OSError):
    """Writing failed: no space, quota, read-only or an I/O error."""

    exit_code = 74


class PreemptedError(AlbertError):
    """A signal asked the run to stop and its checkpoint is committed; start it again to go on."""

    exit_code = 75


class PeerLostError(AlbertError, RuntimeError):
    """Another rank died or hangs."""

    exit_code = 76


class UnsafeError(AlbertError):
    """Refused because it could run code or destroy data."""

    exit_code = 77


class ConfigError(AlbertError, ValueError):
    """The configuration or the command line asks for something impossible."""

    exit_code = 78


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
_PATH_ADVICE = {
    errno.EACCES: "change its permissions or ",
    errno.EPERM: "change its permissions or ",
    errno.EISDIR: "",
    errno.ENOTDIR: "",
    errno.ENAMETOOLONG: "",
}
"""What to do about a path that the user named, before another one is chosen."""


def run_command(main: Callable[[], None]) -> int:
    """Run an entry point and turn known errors into one line on stderr and their exit code.

    Ranks other than 0 prefix their line with `[rank N]`, so that a cluster log says who failed.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    try:
        main()
    except AlbertError as error:
        kind = "stopped" if isinstance(error, PreemptedError) else "error"
        sys.stderr.write(f"{prefix}{kind}: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (for example `| head`); keep the interpreter's own flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in _DISK_ERRNOS:
            advice = "free space or "
        elif error.errno in _PATH_ADVICE and error.filename is not None:
            advice = _PATH_ADVICE[error.errno]
        else:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"{prefix}error: {where}{error.strerror}; {advice}choose another place\n")
        return DiskError.exit_code
    return 0


def end_rank(code: int) -> NoReturn:
    """End a process that was a rank, without the C++ runtime's way out.

    That way aborts about once in a hundred runs, after all work is done, because a thread of the process groups is
    still joinable; a finished rank would be counted as killed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
