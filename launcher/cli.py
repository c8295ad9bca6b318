"""Start any job anywhere: `python -m launcher {local,hosts,slurm,preflight,plan}`. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from albert.command_line import CommandParser
from albert.errors import ConfigError, run_command
from launcher.checks import check_num_ranks, check_pretrain
from launcher.demo import add_demo_command
from launcher.hosts_cli import add_hosts_command
from launcher.job import PROGRAMS, Job
from launcher.local import count_gpus, plan_local
from launcher.plan_cli import add_plan_command
from launcher.progress import run_directory
from launcher.slurm_cli import add_slurm_command
from launcher.supervisor import fewer_ranks_chooser, run_with_restarts

_EXAMPLES = """\
examples:
  python -m launcher local -n 2 pretrain --config demo train.num_steps=200
  python -m launcher local -n 8 pretrain --config xlarge data.directory=shards train.output_dir=runs/a
  python -m launcher local -n 2 --dry-run pretrain --config demo     print what would run
  python -m launcher local -n 4 data build --input text/*.txt --tokenizer spiece.model --output shards
  python -m launcher local finetune --task lcqmc --data-dir lcqmc --model runs/a --output runs/b --do-train

SIGTERM, SIGUSR1 and Ctrl-C reach every rank: they commit a checkpoint and the job ends with 75;
start it again to go on. Exit codes: 0 done, 65 bad data, 66 missing input, 70 not finite, 74 disk,
75 stopped, 76 a rank was lost, 77 refused, 78 configuration.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of the launcher."""
    parser = CommandParser(
        prog="python -m launcher",
        description="Start training, fine-tuning or data preparation on this machine, on hosts or on Slurm.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    places = parser.add_subparsers(dest="place", required=True, metavar="PLACE")
    local = places.add_parser(
        "local",
        help="ranks on this machine",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    local.add_argument("-n", dest="num_ranks", type=int, help="ranks (default: one per GPU, or 1)")
    local.add_argument(
        "--restarts", type=int, default=0, help="start again so many times after a rank was lost (0)"
    )
    local.add_argument(
        "--min-ranks", type=int, help="each such start may use fewer ranks, down to this (default: as many)"
    )
    local.add_argument("--log-dir", help="directory for rank-N.log (default: all on the terminal)")
    _add_program(local)
    local.set_defaults(run=_run_local)
    add_demo_command(places)
    add_hosts_command(places)
    add_slurm_command(places)
    add_plan_command(places)
    preflight = places.add_parser(
        "preflight", help="check this machine before an expensive start", prefix_chars="\0", add_help=False
    )
    preflight.add_argument("arguments", nargs=argparse.REMAINDER)
    preflight.set_defaults(run=_run_preflight)
    return parser


def _add_program(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("program", choices=PROGRAMS, help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="given to the program as they are")


def _run_preflight(options: argparse.Namespace) -> int:
    """`launcher preflight [-n N] ...` is `launcher local [-n N] preflight ...`."""
    words = list(options.arguments)
    ranks = words[:2] if words[:1] == ["-n"] else []
    local = build_parser().parse_args(["local", *ranks, "preflight", *words[len(ranks) :]])
    return int(local.run(local))


def _run_local(options: argparse.Namespace) -> int:
    num_ranks = count_gpus(os.environ) or 1 if options.num_ranks is None else options.num_ranks
    check_num_ranks(num_ranks)
    arguments = tuple(options.arguments)
    if options.program == "pretrain":
        check_pretrain(arguments, num_ranks, with_data=not options.dry_run)
    if options.program == "data":
        arguments, num_ranks = data_workers(arguments, num_ranks), 1
    job = Job(PROGRAMS[options.program], arguments, log_directory=options.log_dir)
    if options.dry_run:
        print(plan_local(job, num_ranks, os.environ).describe())
        return 0
    run = run_directory(options.program, arguments)
    return run_with_restarts(job, num_ranks, options.restarts, run, _rule_for_ranks(options))


def _rule_for_ranks(options: argparse.Namespace) -> Callable[[int], int]:
    """How many ranks the next start uses after one was lost.

    Raises:
        ConfigError: --min-ranks makes no sense here.
    """
    if options.min_ranks is None:
        return lambda num_ranks: num_ranks
    if options.program != "pretrain" or not options.restarts:
        raise ConfigError(f"--min-ranks ({options.min_ranks}) is for 'pretrain' with --restarts only")
    check_num_ranks(options.min_ranks)
    return fewer_ranks_chooser(lambda num: check_pretrain(options.arguments, num), options.min_ranks)


def data_workers(arguments: tuple[str, ...], num_workers: int) -> tuple[str, ...]:
    """Arguments of data_prep, where one process starts the others itself.

    Raises:
        ConfigError: -n contradicts --workers, or the command uses one process only.
    """
    if num_workers == 1:
        return arguments
    if not arguments or arguments[0] != "build":
        raise ConfigError(f"-n: {num_workers} processes are for 'data build' only; leave -n out")
    if any(word == "--workers" or word.startswith("--workers=") for word in arguments):
        raise ConfigError("--workers: -n says the same; give one of them")
    return (*arguments, "--workers", str(num_workers))


def _main() -> None:
    options = build_parser().parse_args()
    sys.exit(options.run(options))


def main() -> None:
    """Entry point of `python -m launcher` and `albert-launch`."""
    sys.exit(run_command(_main))
