"""`python -m launcher slurm`: its command line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from launcher.checks import check_pretrain
from launcher.cluster import read_cluster
from launcher.job import PROGRAMS
from launcher.slurm import TEMPLATES, Submission, describe, submit
from launcher.slurm_job import run_slurm_job
from launcher.slurm_ranks import LOG_ROOT, SlurmSettings
from launcher.slurm_status import status_lines

_EXAMPLES = """\
examples:
  python -m launcher slurm --cluster my.yaml --nodes 8 pretrain --config xlarge train.output_dir=runs/a
  python -m launcher slurm --nodes 2 --ranks-per-node 64 data build --mpi --input text/*.txt ...
  python -m launcher slurm --array 64 --ranks-per-node 16 data build --input text/*.txt ...
  python -m launcher slurm --after 4711 finetune --task lcqmc ...     once job 4711 is done
  python -m launcher slurm --dry-run --nodes 8 pretrain --config xlarge    print the batch script
  python -m launcher slurm status                              jobs submitted from this directory

The last line printed is the job's id. Logs are in slurm-logs: NAME-ID.log is what rank 0 prints,
NAME-ID/restart-N/rank-M.log each rank's own. The batch scripts in slurm/ also work by hand with sbatch.
"""


def add_slurm_command(places: Any) -> None:
    """Register `slurm` with the launcher's command line."""
    parser = places.add_parser(
        "slurm",
        help="submit to Slurm; show jobs",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cluster", metavar="FILE", help="cluster file, like slurm/cluster.example.yaml")
    parser.add_argument("--template", help="batch script to start from (default: the program's own)")
    parser.add_argument("--job-name", metavar="NAME", help="letters, digits, '.', '_', '-'")
    parser.add_argument("--nodes", type=int, help="nodes (default: the template's)")
    parser.add_argument("--ranks-per-node", type=int, help="ranks on each node, one per GPU")
    parser.add_argument("--after", metavar="ID[:ID]", help="start once these jobs are done")
    parser.add_argument(
        "--array", metavar="N[%M]",
        help="divide 'data build' among a job array of N tasks, M at a time, and a last job for the manifest",
    )  # fmt: skip
    parser.add_argument(
        "--sbatch-option", action="append", default=[], metavar="OPTION",
        help="further option of sbatch, such as --sbatch-option=--time=02:00:00",
    )  # fmt: skip
    parser.add_argument(
        "--no-preflight", action="store_true", help="do not check the nodes before a pretraining starts"
    )
    parser.add_argument("--hold", action="store_true", help="submit, but do not start until released")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, and submit nothing")
    actions = parser.add_subparsers(dest="action", required=True, metavar="PROGRAM")
    for name in PROGRAMS:
        action = actions.add_parser(name, help=f"submit {PROGRAMS[name]}", prefix_chars="\0", add_help=False)
        action.add_argument("arguments", nargs=argparse.REMAINDER)
        action.set_defaults(run=_run_submit)
    status = actions.add_parser("status", help="state, step, loss, time left and restarts of jobs")
    status.add_argument("jobs", nargs="*", type=int, metavar="ID")
    status.set_defaults(run=_run_status)
    _add_job(actions)


def _add_job(actions: Any) -> None:
    job = actions.add_parser("job", help="what batch scripts run inside a job")
    job.add_argument("--srun-option", action="append", default=[], help="further option of srun")
    job.add_argument("--rank-prefix", action="append", default=[], help="word of a command before python")
    job.add_argument("--mpi", default="pmi2", help="how srun starts MPI ranks of data preparation (pmi2)")
    job.add_argument("--no-preflight", action="store_true", help="start the ranks without checking the nodes")
    job.add_argument("--log-root", default=LOG_ROOT, help=f"directory of the logs ({LOG_ROOT})")
    programs = job.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    for name in PROGRAMS:
        program = programs.add_parser(name, prefix_chars="\0", add_help=False)
        program.add_argument("arguments", nargs=argparse.REMAINDER)
    job.set_defaults(run=_run_job)


def _run_submit(options: argparse.Namespace) -> int:
    submission = Submission(
        program=options.action,
        arguments=tuple(options.arguments),
        cluster=read_cluster(options.cluster),
        template=options.template or TEMPLATES[options.action],
        job_name=options.job_name,
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        after=options.after,
        hold=options.hold,
        array=options.array,
        sbatch_options=tuple(options.sbatch_option),
        preflight=not options.no_preflight,
    )
    jobs = submission.jobs()
    if options.action == "pretrain":
        has_data = options.after is None and not options.dry_run
        check_pretrain(submission.words(), submission.num_ranks(), with_data=has_data)
    if options.dry_run:
        print("\n".join(describe(job) for job in jobs))
        return 0
    job_id = submit(jobs[0])
    for job in jobs[1:]:
        last = submit(replace(job, after=str(job_id)))
        sys.stderr.write(f"launcher: job array {job_id} makes the shards, then {last} the manifest\n")
        job_id = last
    sys.stderr.write(
        f"launcher: logs are in {LOG_ROOT}; python -m launcher slurm status shows how far it is\n"
    )
    print(job_id)
    return 0


def _run_status(options: argparse.Namespace) -> int:
    print("\n".join(status_lines(options.jobs)))
    return 0


def _run_job(options: argparse.Namespace) -> int:
    settings = SlurmSettings(
        tuple(options.srun_option),
        tuple(options.rank_prefix),
        options.mpi,
        options.log_root,
        not options.no_preflight,
    )
    return run_slurm_job(options.program, tuple(options.arguments), settings)
