"""`python -m launcher hosts`: its command line."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from albert.errors import ConfigError
from launcher.checks import check_pretrain
from launcher.hosts import VIAS, plan_hosts, plan_one_host, read_hostfile, run_hosts, run_one_host
from launcher.job import PROGRAMS, Job, Rendezvous
from launcher.local import node_command

_EXAMPLES = """\
examples:
  python -m launcher hosts --hostfile hosts.txt pretrain --config xlarge train.output_dir=/shared/runs/a
  python -m launcher hosts --hostfile hosts.txt --via openmpi --interface ib0 pretrain --config xlarge
  python -m launcher hosts --hostfile hosts.txt --no-ssh --node-rank 1 pretrain --config xlarge
                                                  (on every host, each with its own number)

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
    parser.add_argument("program", choices=[name for name in PROGRAMS if name != "data"], help="what to run")
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
        check_pretrain(arguments, hosts.num_ranks)
    job = Job(PROGRAMS[options.program], arguments)
    if options.no_ssh:
        rendezvous = Rendezvous(options.master_addr or hosts.first, options.master_port or _PORT)
        job = plan_one_host(job, hosts, options.node_rank, os.environ)
        if options.dry_run:
            print(shlex.join(node_command(job, hosts.world(), options.node_rank, rendezvous)))
            return 0
        return run_one_host(job, hosts, options.node_rank, rendezvous)
    run = plan_hosts(
        job,
        options.hostfile,
        options.via,
        os.environ,
        address=options.master_addr,
        interface=options.interface,
    )
    if options.dry_run:
        print(run.describe())
        return 0
    return run_hosts(run)
