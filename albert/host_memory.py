"""Memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST = 32 * 2**20
"""The most that glibc takes. What is larger still goes back to the system at once."""


def keep_freed_memory() -> bool:
    """Let the process keep what it has freed for what it allocates next, instead of giving it back to the system.

    A step frees and takes hundreds of megabytes, and every page that the system gives has to be mapped and cleared.
    The process stays as large as it was at its peak.

    Returns:
        False where it does nothing: the C library is not glibc, or the environment sets glibc up
            (MALLOC_*, GLIBC_TUNABLES).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and mallopt(_M_MMAP_THRESHOLD, _LARGEST))
