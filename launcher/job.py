"""What is run: a program with its arguments and environment, and where the ranks meet. Pure, frozen data.

A job travels to its ranks as one word of letters, digits, `-`, `_` and `=`, so that names, paths and
overrides with spaces, quotes or `$()` arrive literally whatever carries them: an argument list, srun,
mpirun, or pdsh with its shell.
"""

from __future__ import annotations

import base64
import binascii
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from typing import Self

from albert.errors import ConfigError

PROGRAMS = {
    "pretrain": "albert.pretrain",
    "finetune": "albert.finetune",
    "preflight": "albert.preflight",
    "data": "data_prep",
}
"""Programs by the name that the command line gives them; each value is a module for `python -m`."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a job find each other."""

    address: str
    """Host of rank 0."""
    port: int


@dataclass(frozen=True)
class Job:
    """One program, started as one or more ranks."""

    module: str
    """Run as `python -m MODULE`."""
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that every rank gets on top of its own environment."""
    status_directory: str | None = None
    """Where each rank leaves its pid and its exit code; the launcher reads them."""
    log_directory: str | None = None
    """Where each rank writes rank-N.log; rank 0 is shown on the terminal besides."""

    polls_signals: bool = False
    """Whether ranks look for signals in the status directory, because nobody can send them any."""

    def command(self) -> list[str]:
        """What a rank runs."""
        return [sys.executable, "-u", "-m", self.module, *self.arguments]

    def describe(self) -> list[str]:
        """What a rank runs and with which variables, as lines for a shell and a reader."""
        variables = [f"export {name}={shlex.quote(value)}" for name, value in self.environment]
        return ["# each rank then runs:", *variables, shlex.join(self.command())]

    def encode(self) -> str:
        """The job as one word that no shell changes."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, word: str) -> Self:
        """Undo `encode`.

        Raises:
            ConfigError: `word` was not made by `encode`.
        """
        try:
            raw = json.loads(base64.urlsafe_b64decode(word.encode()))
            return cls(
                module=str(raw["module"]),
                arguments=tuple(map(str, raw["arguments"])),
                environment=tuple((str(key), str(value)) for key, value in raw["environment"]),
                status_directory=raw["status_directory"],
                log_directory=raw["log_directory"],
                polls_signals=bool(raw["polls_signals"]),
            )
        except (binascii.Error, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--job: '{word[:40]}' is not a job; only the launcher makes them") from error
