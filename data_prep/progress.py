"""A bar for a terminal: bytes, rate, time left; in a log file a line now and then."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(name: str, total: int, initial: int = 0) -> tqdm:
    """A progress bar over bytes.

    Args:
        name: what is done.
        total: bytes in all.
        initial: bytes that were done before.
    """
    interval_s = 0.5 if sys.stderr.isatty() else 15.0  # a log file needs no lively bar
    return tqdm(desc=name, total=total, initial=initial, unit="B", unit_scale=True, mininterval=interval_s)
