"""`launcher slurm status`: the jobs submitted from a directory, with what their logs and runs say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from albert.errors import ConfigError
from launcher.allocation import all_job_fields, run_slurm_command
from launcher.progress import committed_step, last_metrics, run_directory
from launcher.slurm import JOB_FILE
from launcher.slurm_ranks import LOG_ROOT

_UNKNOWN_JOB = "Invalid job id specified"
"""Slurm's answer for a job that ended some minutes ago, which is nothing to worry about."""


def status_lines(job_ids: Sequence[int]) -> list[str]:
    """A table of the jobs submitted from here: state, step, loss, time left, restarts.

    Args:
        job_ids: only these; empty for all.

    Returns:
        The lines of the table, and below it what Slurm refused to say.

    Raises:
        ConfigError: a job was not submitted from here.
    """
    refusals: set[str] = set()
    rows: list[tuple[str, ...]] = [("JOB", "NAME", "STATE", "STEP", "LOSS", "LEFT", "RESTARTS", "REASON")]
    for path in sorted(Path(LOG_ROOT).glob(f"*/{JOB_FILE}")):
        job = json.loads(path.read_text(encoding="utf-8"))
        if not job_ids or job["job_id"] in job_ids:
            rows.append(_status_row(path.parent, job["job_id"], job["program"], job["arguments"], refusals))
    missing = set(job_ids) - {int(row[0]) for row in rows[1:]}
    if missing:
        raise ConfigError(f"job {', '.join(map(str, sorted(missing)))} was not submitted from this directory")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return table + [f"states and times may be missing: {refusal}" for refusal in sorted(refusals)]


def _status_row(
    directory: Path, job_id: int, program: str, arguments: Sequence[str], refusals: set[str]
) -> tuple[str, ...]:
    """What is known of a job; what Slurm refused to say is added to `refusals`."""
    run = run_directory(program, arguments)
    metrics = last_metrics(run)
    step = metrics.get("step", committed_step(run))
    name = directory.name.rsplit("-", 1)[0]
    tasks, left = [], ""
    try:
        tasks = all_job_fields(job_id)
        left = run_slurm_command("squeue", "--noheader", "--format=%L", f"--jobs={job_id}").strip()
    except ConfigError as error:
        if _UNKNOWN_JOB not in str(error):
            refusals.add(str(error))
    history = directory / "history.jsonl"
    ended = json.loads(history.read_text(encoding="utf-8").splitlines()[-1]) if history.exists() else {}
    states = "/".join(sorted({task["JobState"] for task in tasks}))
    state = states or (f"ENDED ({ended['exit_code']})" if ended else "UNKNOWN")
    fields = tasks[0] if tasks else {}
    return (
        str(job_id),
        name,
        state,
        str(step) if step >= 0 else "-",
        f"{metrics['loss']:.4f}" if "loss" in metrics else "-",
        " ".join(sorted(set(left.split()))) or "-",
        fields.get("Restarts", str(ended.get("restart", "-"))),
        ended.get("cause") or fields.get("Reason", "-"),
    )
