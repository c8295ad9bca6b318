"""Stop requests: a signal sets a flag, the ranks agree on it, the trainer stops at the end of a step."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers that a signal arrived; a second one changes nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def is_set(self) -> bool:
        """True once a signal arrived."""
        return self.signal_name is not None

    def install(self) -> None:
        """Handle SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.signal_name = signal.Signals(number).name
