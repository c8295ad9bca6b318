"""Slurm from outside a job: render and submit batch scripts."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albert.errors import ConfigError
from launcher.allocation import job_fields, run_slurm_command
from launcher.batch_script import (
    Options,
    checked_job_name,
    cluster_options,
    read_template,
    render,
    sbatch_option,
    setting_lines,
    template_arguments,
    template_options,
)
from launcher.cluster import ClusterConfig
from launcher.slurm_ranks import LOG_ROOT

TEMPLATES = {
    "pretrain": "pretrain",
    "finetune": "finetune",
    "preflight": "preflight",
    "data": "data_prep",
}
"""Template of each program."""

JOB_FILE = "job.json"

_OF_ANOTHER_JOB = ("SLURM_JOB", "SLURM_STEP", "SLURM_TASK", "SLURM_N", "SLURM_MEM", "SLURM_CPU", "SLURM_GPU",
                   "SLURM_ARRAY", "SLURM_TRES", "SLURM_PROCID", "SLURM_LOCALID", "SLURMD_", "PMI_")  # fmt: skip
_DEPENDENCY = re.compile(r"\d+(:\d+)*")
_ARRAY = re.compile(r"([1-9]\d{0,4})(%[1-9]\d*)?")


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
    array: str | None = None
    """Number of tasks among which a build of data is divided: 64, or 64%8 for at most 8 at a time."""
    sbatch_options: tuple[str, ...] = ()
    """Further options of sbatch, such as --time=02:00:00; they come after those of the cluster file."""
    preflight: bool = True

    def script(self) -> str:
        """The whole batch script.

        Raises:
            UnsafeError: a name or a value that no batch script may carry.
            ConfigError: --after names no jobs.
        """
        python = self.cluster.python or sys.executable
        lines = setting_lines(self.cluster, python, self.words(), preflight=self.preflight)
        return render(read_template(self.template), self._options(), lines)

    def words(self) -> tuple[str, ...]:
        """Arguments of the program: the template's own, then the user's."""
        return (*template_arguments(read_template(self.template)), *self.arguments)

    def num_ranks(self) -> int:
        """Ranks of the job, from its options."""
        options = {**template_options(read_template(self.template)), **self._options()}
        return int(options.get("nodes") or 1) * int(options.get("ntasks-per-node") or 1)

    def jobs(self) -> list[Submission]:
        """What is submitted, each after the one before: a job array needs a last job that writes the manifest.

        Raises:
            ConfigError: the program cannot be done in parts, or only on one node.
        """
        is_build, is_mpi = self.arguments[:1] == ("build",), "--mpi" in self.arguments
        if self.array is None:
            if self.program == "data" and not is_mpi and (self.nodes or 1) > 1:
                raise ConfigError(
                    "--nodes: data preparation uses several nodes with 'build --mpi' or --array only"
                )
            return [self]
        if self.program != "data" or not is_build or is_mpi:
            raise ConfigError("--array: only 'data build' without --mpi is done in parts; leave --array out")
        if _ARRAY.fullmatch(self.array) is None:
            raise ConfigError(
                f"--array {self.array!r}: give a number of tasks such as 64, or 64%8 for 8 at a time"
            )
        if (self.nodes or 1) > 1:
            raise ConfigError("--nodes: each task of a job array has one node; give --array more tasks")
        name = self.job_name or str(template_options(read_template(self.template)).get("job-name"))
        return [self, replace(self, array=None, after=None, hold=False, job_name=f"{name}-manifest")]

    def _options(self) -> Options:
        options = {**cluster_options(self.cluster), **self._devices()}
        if self.program == "preflight":
            options.pop("time", None)  # the template's minutes, not the days of a pretraining
        for text in (*self.cluster.sbatch_options, *self.sbatch_options):
            options |= sbatch_option(text)
        if self.job_name is not None:
            options["job-name"] = checked_job_name(self.job_name)
        if self.nodes is not None:
            options["nodes"] = str(self.nodes)
        if self.array is not None:
            number, _, at_once = self.array.partition("%")
            options["array"] = f"0-{int(number) - 1}" + (f"%{at_once}" if at_once else "")
            options["output"] = f"{LOG_ROOT}/%x-%A_%a.log"
        if self.hold:
            options["hold"] = None
        if self.after is not None:
            if _DEPENDENCY.fullmatch(self.after) is None:
                raise ConfigError(f"--after {self.after!r}: not job ids; write 123, or 123:124 for several")
            options |= {"dependency": f"afterok:{self.after}", "kill-on-invalid-dep": "yes"}
        return options

    def _devices(self) -> Options:
        """Ranks and GPUs of a node: one rank on each GPU, and cores alone for data preparation."""
        template = template_options(read_template(self.template))
        gpus = self.cluster.gpus_per_node
        ranks = self.ranks_per_node
        if self.program == "data":
            own = {"gpus-per-node": "", "cpus-per-task": template.get("cpus-per-task", "1")}
            return own if ranks is None else {**own, "ntasks-per-node": str(ranks)}
        if ranks is None and gpus and self.program != "finetune":
            ranks = gpus
        if ranks is None:
            ranks = int(template.get("ntasks-per-node") or 1)
        has_gpus = gpus != 0 and "gpus-per-node" in template
        return {"ntasks-per-node": str(ranks), "gpus-per-node": str(ranks) if has_gpus else ""}


def submit(submission: Submission) -> int:
    """Submit a job; returns its id.

    Raises:
        ConfigError: sbatch is not there or refuses; quotes what it says.
    """
    root = Path(LOG_ROOT)
    root.mkdir(exist_ok=True)
    script = root / f"submitted-{secrets.token_hex(8)}.sbatch"
    script.write_text(submission.script(), encoding="utf-8")
    # Variables of a job in which the user may be sitting are not meant for this one.
    answer = run_slurm_command("sbatch", "--parsable", str(script), strip=_OF_ANOTHER_JOB)
    job_id = int(answer.strip().split(";")[0])
    name = job_fields(job_id).get("JobName", "job")
    directory = root / f"{name}-{job_id}"
    directory.mkdir(exist_ok=True)
    script.rename(directory / "job.sbatch")
    write_job_file(directory, job_id, submission.program, submission.words())
    return job_id


def write_job_file(directory: Path, job_id: int, program: str, arguments: Sequence[str]) -> None:
    """Leave what a job is, for `launcher slurm status`."""
    fields = {
        "job_id": job_id,
        "program": program,
        "arguments": list(arguments),
        "directory": str(Path.cwd()),
    }
    (directory / JOB_FILE).write_text(json.dumps(fields), encoding="utf-8")


def describe(submission: Submission) -> str:
    """What would be submitted."""
    return f"# {shlex.join(['sbatch', '--parsable'])} reads:\n{submission.script().rstrip()}"
