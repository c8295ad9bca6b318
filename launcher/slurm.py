"""Slurm from outside a job: render and submit a batch script, show the state of jobs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from albert.errors import ConfigError
from launcher.allocation import job_fields, run_slurm_command
from launcher.batch_script import (
    Options,
    checked_job_name,
    cluster_options,
    read_template,
    render,
    setting_lines,
    template_options,
)
from launcher.cluster import ClusterConfig
from launcher.progress import committed_step, last_metrics, run_directory

LOG_ROOT = "slurm-logs"
"""Below the directory that a job is submitted from."""
TEMPLATES = {
    "pretrain": "pretrain",
    "finetune": "finetune",
    "preflight": "preflight",
    "data": "data_prep",
}
"""Template of each program."""

_JOB_FILE = "job.json"
_DEPENDENCY = re.compile(r"\d+(:\d+)*")


@dataclass(frozen=True)
class Submission:
    """One job for Slurm."""

    program: str
    arguments: tuple[str, ...]
    cluster: ClusterConfig
    template: str
    job_name: str | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    after: str | None = None
    """Jobs that have to be done first: 123 or 123:124."""
    hold: bool = False

    def script(self) -> str:
        """The whole batch script.

        Raises:
            UnsafeError: a name or a value that no batch script may carry.
            ConfigError: --after names no jobs.
        """
        python = self.cluster.python or sys.executable
        lines = setting_lines(self.cluster, python, self.arguments)
        return render(read_template(self.template), self._options(), lines)

    def num_ranks(self) -> int:
        """Ranks of the job, from its options."""
        options = {**template_options(read_template(self.template)), **self._options()}
        return int(options.get("nodes") or 1) * int(options.get("ntasks-per-node") or 1)

    def _options(self) -> Options:
        options = cluster_options(self.cluster)
        if self.job_name is not None:
            options["job-name"] = checked_job_name(self.job_name)
        if self.nodes is not None:
            options["nodes"] = str(self.nodes)
        if self.ranks_per_node is not None:
            options["ntasks-per-node"] = str(self.ranks_per_node)
        if self.hold:
            options["hold"] = None
        if self.after is not None:
            if _DEPENDENCY.fullmatch(self.after) is None:
                raise ConfigError(f"--after {self.after!r}: not job ids; write 123, or 123:124 for several")
            options |= {"dependency": f"afterok:{self.after}", "kill-on-invalid-dep": "yes"}
        return options


def submit(submission: Submission) -> int:
    """Submit a job; returns its id.

    Raises:
        ConfigError: sbatch is not there or refuses; quotes what it says.
    """
    root = Path(LOG_ROOT)
    root.mkdir(exist_ok=True)
    script = root / "submitted.sbatch"
    script.write_text(submission.script(), encoding="utf-8")
    answer = run_slurm_command("sbatch", "--parsable", str(script))
    job_id = int(answer.strip().split(";")[0])
    name = job_fields(job_id).get("JobName", "job")
    directory = root / f"{name}-{job_id}"
    directory.mkdir(exist_ok=True)
    script.rename(directory / "job.sbatch")
    write_job_file(directory, job_id, submission.program, submission.arguments)
    return job_id


def write_job_file(directory: Path, job_id: int, program: str, arguments: Sequence[str]) -> None:
    """Leave what a job is, for `launcher slurm status`."""
    fields = {
        "job_id": job_id,
        "program": program,
        "arguments": list(arguments),
        "directory": str(Path.cwd()),
    }
    (directory / _JOB_FILE).write_text(json.dumps(fields), encoding="utf-8")


def describe(submission: Submission) -> str:
    """What would be submitted."""
    return f"# {shlex.join(['sbatch', '--parsable'])} reads:\n{submission.script()}"


def status_lines(job_ids: Sequence[int]) -> list[str]:
    """A table of the jobs submitted from here: state, step, loss, time left, restarts.

    Args:
        job_ids: only these; empty for all.
    """
    rows: list[tuple[str, ...]] = [("JOB", "NAME", "STATE", "STEP", "LOSS", "LEFT", "RESTARTS", "REASON")]
    for path in sorted(Path(LOG_ROOT).glob(f"*/{_JOB_FILE}")):
        job = json.loads(path.read_text(encoding="utf-8"))
        if not job_ids or job["job_id"] in job_ids:
            rows.append(_status_row(path.parent, job["job_id"], job["program"], job["arguments"]))
    missing = set(job_ids) - {int(row[0]) for row in rows[1:]}
    if missing:
        raise ConfigError(f"job {', '.join(map(str, sorted(missing)))} was not submitted from this directory")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _status_row(directory: Path, job_id: int, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
    run = run_directory(program, arguments)
    metrics = last_metrics(run)
    step = metrics.get("step", committed_step(run))
    name = directory.name.rsplit("-", 1)[0]
    try:
        fields = job_fields(job_id)
        left = run_slurm_command("squeue", "--noheader", "--format=%L", f"--jobs={job_id}").strip()
    except ConfigError:
        fields, left = {}, ""
    history = directory / "history.jsonl"
    ended = json.loads(history.read_text(encoding="utf-8").splitlines()[-1]) if history.exists() else {}
    state = fields.get("JobState", f"ENDED ({ended['exit_code']})" if ended else "UNKNOWN")
    return (
        str(job_id),
        name,
        state,
        str(step) if step >= 0 else "-",
        f"{metrics['loss']:.4f}" if "loss" in metrics else "-",
        left or "-",
        fields.get("Restarts", str(ended.get("restart", "-"))),
        ended.get("cause") or fields.get("Reason", "-"),
    )
