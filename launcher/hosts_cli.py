"""`python -m launcher hosts`: its command line."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
from typing import Any

from albert.errors import ConfigError
from launcher.checks import check_pretrain
from launcher.hosts import (
    VIAS,
    Hosts,
    plan_hosts,
    plan_one_host,
    read_hostfile,
    run_hosts,
    run_one_host,
)
from launcher.job import PROGRAMS, Job, Rendezvous
from launcher.local import PORTS, node_command, python_path

_EXAMPLES = """\
examples:
  python -m launcher hosts --hostfile hosts.txt pretrain --config xlarge train.output_dir=/shared/runs/a
  python -m launcher hosts --hostfile hosts.txt --via openmpi --interface ib0 pretrain --config xlarge
  python -m launcher hosts --hostfile hosts.txt --no-ssh --node-rank 1 pretrain --config xlarge
                                                  (on every host, each with its own number)
  python -m launcher hosts --hostfile hosts.txt data build --input text/*.txt --tokenizer tok --output shards
                                                  (each host makes its part of the shards, with all its cores)

The hostfile has a line 'node1 slots=8' for each host. The working directory and the python of this environment
have to be there on every host, on a file system that all share. The logs of all ranks are in launcher-logs.
"""
_PORT = 29500


def add_hosts_command(places: Any) -> None:
    """Register `hosts` with the launcher's command line."""
    parser = places.add_parser(
        "hosts",
        help="ranks on the hosts of a DeepSpeed hostfile",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hostfile", required=True, help="lines 'node1 slots=8'")
    parser.add_argument("--via", choices=VIAS, default="pdsh", help="how hosts are reached (pdsh)")
    parser.add_argument("--master-addr", help="address of the first host, if its name does not serve")
    parser.add_argument("--interface", help="network interface for the traffic between ranks")
    parser.add_argument("--no-ssh", action="store_true", help="start only this host's ranks")
    parser.add_argument("--node-rank", type=int, help="this host's number in the hostfile, from 0")
    parser.add_argument(
        "--master-port", type=int, help=f"port of rank 0 (--no-ssh: {_PORT}; else a random one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("program", choices=PROGRAMS, help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="given to the program as they are")
    parser.set_defaults(run=_run_hosts)


def _run_hosts(options: argparse.Namespace) -> int:
    if options.no_ssh != (options.node_rank is not None):
        raise ConfigError(
            "--no-ssh and --node-rank belong together: each host starts itself with its own number"
        )
    hosts = read_hostfile(options.hostfile)
    arguments = tuple(options.arguments)
    if options.program == "pretrain":
        check_pretrain(arguments, hosts.num_ranks, with_data=not options.dry_run)
    last: list[str] = []
    if options.program == "data":
        last = Job(PROGRAMS["data"], arguments).command()
        arguments, hosts = data_part(arguments), hosts.one_rank_each()
    job = Job(PROGRAMS[options.program], arguments)
    return (_start_this_host if options.no_ssh else _start_all_hosts)(job, hosts, last, options)


def data_part(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments with which each host prepares its part of the data.

    Raises:
        ConfigError: a command without parts, or MPI.
    """
    if arguments[:1] != ("build",) or "--mpi" in arguments:
        raise ConfigError(
            "data: hosts divide 'data build' among them, without --mpi; use 'launcher local' else"
        )
    return (*arguments, "--part", "rank")


def _start_this_host(job: Job, hosts: Hosts, last: list[str], options: argparse.Namespace) -> int:
    rendezvous = Rendezvous(options.master_addr or hosts.first, options.master_port or _PORT)
    job = plan_one_host(job, hosts, options.node_rank, os.environ, options.interface)
    if options.dry_run:
        run = node_command(job, hosts.world(), options.node_rank, rendezvous)
        print("\n".join([f"# host {options.node_rank}, without ssh", shlex.join(run), *job.describe()]))
    code = 0 if options.dry_run else run_one_host(job, hosts, options.node_rank, rendezvous)
    if last and code == 0:
        print(f"# once all hosts are done, this writes the manifest:\n{shlex.join(last)}")
    return code


def _start_all_hosts(job: Job, hosts: Hosts, last: list[str], options: argparse.Namespace) -> int:
    rendezvous = Rendezvous(options.master_addr or hosts.first, options.master_port or secrets.choice(PORTS))
    run = plan_hosts(job, hosts, options.via, os.environ, rendezvous, options.interface)
    if options.dry_run:
        print(run.describe())
        if last:
            print(f"# and here, once all hosts are done:\n{shlex.join(last)}")
        return 0
    code = run_hosts(run)
    if last and code == 0:
        return subprocess.run(
            last, check=False, env={**os.environ, "PYTHONPATH": python_path(os.environ)}
        ).returncode
    return code
