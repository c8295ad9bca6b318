"""Mistakes on a command line are reported as all other mistakes are."""

from __future__ import annotations

import argparse
from typing import NoReturn

from albert.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """Ends with one line and exit code 78, not with argparse's usage and 2; so do its subcommands."""

    def error(self, message: str) -> NoReturn:
        """Report a mistake.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")
