"""Probes: while a pretraining runs, a task is fine-tuned from its checkpoints in a process of its own.

The process has its own session, the lowest priority and (by default) one thread of the CPU; there is one at a time.
Whatever happens to it is an event in the log of the pretraining and never its failure. A pretraining that is done
waits for the probe of its last checkpoint; one that is stopped or killed takes its probe with it. Imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from albert.config import ProbeConfig
from albert.errors import ConfigError, MissingInputError
from albert.processes import die_with_parent

_DIRECTORY = "probes"
_RESULTS = "results.json"
_LOWEST_PRIORITY = 19
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
"""Variables by which the probe would take itself for a rank of the pretraining; all SLURM_* do so too."""


class Log(Protocol):
    """What a probe needs of `albert.monitoring.Monitor`."""

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write numbers."""

    def event(self, step: int, message: str) -> None:
        """Write what happened."""


class Probes:
    """Starts probes at committed checkpoints and collects their scores. No method raises anything."""

    def __init__(self, config: ProbeConfig, run_directory: Path, log: Log | None) -> None:
        """Start nothing yet; probes that an earlier part of the run finished are not repeated.

        Args:
            config: what to run, and how often.
            run_directory: of the pretraining.
            log: gets the scores; None for no probes, on all ranks but the first.
        """
        self._config, self._log = config, log
        self._directory = run_directory / _DIRECTORY
        done = (int(path.parent.name[5:]) for path in self._directory.glob(f"step-{'[0-9]' * 8}/{_RESULTS}"))
        self._last_step = max(done, default=0)
        self._awaited_step = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def begin(self, step: int, checkpoint: Path) -> None:
        """Start a probe if this checkpoint is the first one in its interval of steps."""
        interval = self._config.interval_steps
        if (
            self._log is None
            or self._is_closed
            or not interval
            or step // interval <= self._last_step // interval
        ):
            return
        self.poll()
        if self._process:
            self._log.event(step, f"probe skipped: that of step {self._last_step} still runs")
            return
        self._try_to_start(step, checkpoint)

    def finish(self, step: int, checkpoint: Path) -> bool:
        """Probe the last checkpoint, whatever the interval, once no other probe runs.

        Returns:
            Whether there is still something to wait for; call it again then, with the same arguments.
        """
        if self._log is None or not self._config.interval_steps:
            return False
        self.poll()
        if self._process is None and self._last_step < step:
            self._try_to_start(step, checkpoint)
        if self._process and self._awaited_step != self._last_step:
            self._awaited_step = self._last_step
            self._log.event(
                step,
                f"the training is done; waiting for the probe of step {self._last_step}, a signal ends it",
            )
        return self._process is not None

    def _try_to_start(self, step: int, checkpoint: Path) -> None:
        self._last_step = step
        try:
            self._start(checkpoint)
        except OSError as error:
            if self._log:
                self._log.event(step, f"probe not started: {error}")

    def _start(self, checkpoint: Path) -> None:
        output = self._output
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        try:
            # Links keep the files while the checkpoint may be removed.
            model = Path(shutil.copytree(checkpoint, output / "checkpoint", copy_function=os.link))
        except OSError:
            model = checkpoint
        command = [sys.executable, "-m", "albert.probes", str(os.getpid()), *self._arguments(model)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self._config),
                start_new_session=True,
            )

    def _arguments(self, model: Path) -> list[str]:
        """Command line of the fine-tuning."""
        config = self._config
        options: dict[str, Any] = {
            "task": config.task,
            "task-file": config.task_file,
            "data-dir": config.data,
            "model": model,
            "output": self._output,
            "max-steps": config.num_steps,
            "learning-rate": config.learning_rate,
            "batch-size": config.batch_size,
            "max-seq-length": config.max_seq_length,
            "eval-interval-steps": config.num_steps,
            "checkpoint-interval-steps": 0,
            "hang-timeout-s": 0,  # with the lowest priority, a step may wait for the processor as long as it likes
            "device": config.device,
            "progress": "off",
        }
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [*given, "--do-train", "--do-eval", "--no-tensorboard"]

    @property
    def _output(self) -> Path:
        return self._directory / f"step-{self._last_step:08d}"

    @property
    def _log_path(self) -> Path:
        return self._output / "log.txt"

    def poll(self) -> None:
        """Record the scores of a probe that has ended since the last call, or why it has none."""
        code = self._process.poll() if self._process else None
        if code is None or self._log is None:
            return
        self._process = None
        try:
            if code:
                raise ValueError(f"exit code {code}: {_last_line(self._log_path)}")
            results = json.loads((self._output / _RESULTS).read_bytes())
            self._log.record("probe", self._last_step, results["splits"]["dev"])
        except (OSError, ValueError, KeyError) as error:
            self._log.event(self._last_step, f"probe failed: {error}")
        self._remove_models()

    def close(self) -> None:
        """Take the scores of a probe that has ended, and end one that still runs."""
        self.poll()
        self._is_closed = True
        if self._process is None or self._log is None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._log.event(self._last_step, "probe ended with the training, before it had a score")
        self._remove_models()

    def _remove_models(self) -> None:
        for name in ("checkpoint", "model"):
            shutil.rmtree(self._output / name, ignore_errors=True)


def check_probe(config: ProbeConfig) -> None:
    """Refuse a probe that could never run.

    Raises:
        ConfigError: no such task.
        MissingInputError: no data for it.
    """
    if not config.interval_steps:
        return
    from albert.finetune.custom import read_task
    from albert.finetune.reading import find_file
    from albert.finetune.tasks import find_task

    try:
        task = read_task(Path(config.task_file)) if config.task_file else find_task(config.task or "")
    except ConfigError as error:
        raise ConfigError(f"probe.task: {error}") from None
    for split in ("train", "dev"):
        try:
            find_file(task, Path(config.data or ""), split)
        except MissingInputError as error:
            raise MissingInputError(f"probe.data: {error}") from None


def _environment(config: ProbeConfig) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_RANK and not name.startswith("SLURM_")
    }
    if config.device == "cpu":
        inherited |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**inherited, "OMP_NUM_THREADS": str(config.num_threads)}


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return lines[-1] if lines else "no output"


def main() -> None:
    """The probe's own process: `python -m albert.probes PARENT FINETUNE-ARGUMENTS`."""
    parent = int(sys.argv.pop(1))
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)
    # The kernel ends this process with the pretraining, even where that is killed.
    die_with_parent(parent, signal.SIGKILL)
    from albert.finetune import cli

    cli.main()


if __name__ == "__main__":
    main()
