"""Mistakes of a command line that are found here, in milliseconds, instead of on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from albert.command_line import CommandParser
from albert.config import load_run_config
from albert.deepspeed_config import build_deepspeed_config
from albert.errors import ConfigError
from albert.manifest import read_manifest


def check_pretrain(arguments: Sequence[str], num_ranks: int, *, with_data: bool = True) -> None:
    """Check the configuration of a pretraining, the placement, and that the dataset is there.

    Args:
        arguments: of `albert.pretrain`.
        num_ranks: of the job.
        with_data: False if the dataset is made by a job that runs before.

    Raises:
        ConfigError, MissingInputError: as `albert.pretrain` would, seconds later and on every rank.
    """
    parser = CommandParser("python -m albert.pretrain", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(list(arguments))
    if any(word.startswith("-") for word in rest):
        return  # --help, or something that only the program itself understands
    if known.config is None:
        raise ConfigError("pretrain: --config is missing; give a recipe such as base, or a YAML file")
    config = load_run_config(known.config, rest)
    build_deepspeed_config(config, num_ranks)
    if with_data:
        read_manifest(config.data.directory)


def check_num_ranks(num_ranks: int) -> int:
    """At least one.

    Raises:
        ConfigError: fewer.
    """
    if num_ranks < 1:
        raise ConfigError(f"-n: {num_ranks} ranks cannot run anything; give 1 or more")
    return num_ranks
