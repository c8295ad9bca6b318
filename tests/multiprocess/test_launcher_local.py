"""`launcher local` with real gloo ranks: exit codes, signals, lost ranks, no orphans, literal arguments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "launcher_programs"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.multiprocess


class Launched:
    """A launcher with its toy ranks."""

    def __init__(self, directory: Path, *arguments: str, ranks: int = 2, logs: str = "-"):
        self.directory = directory
        path = os.pathsep.join([str(ROOT), str(PROGRAMS)])
        environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(directory)}
        environment.pop("OMP_NUM_THREADS", None)
        self.process = subprocess.Popen(
            [
                sys.executable,
                PROGRAMS / "launch_toy.py",
                str(ranks),
                logs,
                "--directory",
                directory,
                *arguments,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pid_once_training(self, rank: int) -> int:
        """Pid of a rank that has finished a step."""
        path = self.directory / f"step-{rank}"
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return int(path.read_text().split()[0])

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors

    def leftovers(self) -> list[str]:
        """Command lines of processes that still work on this directory, and temporary files."""
        lines = [*self.directory.glob("albert-launch-*")]
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"TMPDIR={self.directory}\0".encode() in path.read_bytes():
                    lines.append((path.parent / "cmdline").read_text())
            except OSError:
                continue
        return lines


def facts(directory: Path, rank: int) -> list[str]:
    return (directory / f"facts-{rank}").read_bytes().decode().split("\0")


HOSTILE = [
    "a b",
    "'",
    '"',
    "$(touch canary)",
    "`touch canary`",
    "; touch canary",
    "\n",
    "",
    "--",
    "-n",
    "é漢",
    "\\",
    "%n",
]


def test_ranks_get_literal_arguments_a_rendezvous_and_a_log_each(tmp_path):
    words = [f"--echo={word}" for word in HOSTILE]
    launched = Launched(tmp_path, "--steps", "3", *words, logs=str(tmp_path / "logs"))
    code, output, errors = launched.end()
    assert (code, errors) == (0, "")
    assert output.splitlines() == [f"rank 0 step {step}" for step in range(3)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert facts(tmp_path, 0) == ["0", "2", "0", "127.0.0.1", threads, *HOSTILE]
    assert facts(tmp_path, 1) == ["1", "2", "1", "127.0.0.1", threads, *HOSTILE]
    assert (tmp_path / "logs/rank-0.log").read_text() == output
    assert (tmp_path / "logs/rank-1.log").read_text() == output.replace("rank 0", "rank 1")
    assert not list(tmp_path.rglob("canary"))
    assert not (ROOT / "canary").exists()
    assert launched.leftovers() == []


def test_the_rank_that_failed_first_decides_the_exit_code(tmp_path):
    launched = Launched(tmp_path, "--exit", "1:65", "--steps", "100000")
    code, _, errors = launched.end()
    assert code == 65
    assert "launcher: rank 1 on " in errors
    assert " ended with exit code 65" in errors
    assert launched.leftovers() == []


@pytest.mark.parametrize(("number", "commit_s"), [(signal.SIGTERM, 1.5), (signal.SIGUSR1, 0)])
def test_a_signal_reaches_every_rank_once_and_the_commit_has_time(tmp_path, number, commit_s):
    # Rank 1 leaves with 75 while rank 0 still commits: DeepSpeed's launcher would have sent rank 0 a SIGTERM.
    launched = Launched(tmp_path, "--steps", "100000", "--commit-s", str(commit_s))
    launched.pid_once_training(1)
    launched.process.send_signal(number)
    code, _, errors = launched.end()
    assert code == 75
    assert (tmp_path / "committed").read_text() == str(int(number))
    assert f"launcher: {number.name} received, waiting for the ranks to stop" in errors
    assert launched.leftovers() == []


def test_ctrl_c_in_a_terminal_reaches_the_ranks_once(tmp_path):
    launched = Launched(tmp_path, "--steps", "100000")
    launched.pid_once_training(1)
    os.killpg(launched.process.pid, signal.SIGINT)
    code, _, errors = launched.end()
    assert code == 75
    assert (tmp_path / "committed").read_text() == "2"
    assert "Ctrl-C 2 more times kills them" in errors


def test_the_third_ctrl_c_kills_ranks_that_do_not_stop(tmp_path):
    launched = Launched(tmp_path, "--steps", "100000", "--commit-s", "600")
    launched.pid_once_training(1)
    for _ in range(3):
        launched.process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # equal signals that wait together arrive as one
    code, _, errors = launched.end()
    assert code == 76
    assert "had to be killed" in errors
    assert launched.leftovers() == []


def test_a_killed_rank_is_named_with_its_signal(tmp_path):
    launched = Launched(tmp_path, "--steps", "100000")
    os.kill(launched.pid_once_training(1), signal.SIGKILL)
    code, _, errors = launched.end()
    assert code == 76
    assert "launcher: rank 1 on " in errors
    assert " was killed by SIGKILL; start the job again" in errors
    assert launched.leftovers() == []


def test_a_killed_launcher_leaves_a_checkpoint_and_no_orphans(tmp_path):
    launched = Launched(tmp_path, "--steps", "100000")
    launched.pid_once_training(1)
    launched.process.kill()
    launched.process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while (
        left := [line for line in launched.leftovers() if isinstance(line, str)]
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert set((tmp_path / "committed").read_text().split()) == {"15"}


def test_a_stop_before_the_ranks_have_started_asks_for_a_restart(tmp_path):
    launched = Launched(tmp_path, "--steps", "100000")
    time.sleep(0.7)  # the launcher holds signals back by now, no rank is there yet
    launched.process.send_signal(signal.SIGTERM)
    code, _, errors = launched.end()
    assert code == 75
    assert "SIGTERM" in errors
    assert launched.leftovers() == []


def test_a_lost_rank_starts_the_job_again_as_often_as_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_RESTARTS", "1")
    launched = Launched(tmp_path, "--steps", "100000")
    for _ in range(2):
        pid = launched.pid_once_training(1)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        (tmp_path / "step-1").unlink()  # the next one is that of the restarted rank
    code, _, errors = launched.end()
    assert code == 76
    assert errors.count("launcher: rank 1 on ") == 2
    assert errors.count("launcher: restart 1 of 1") == 1
    assert launched.leftovers() == []


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_starter_is_a_lost_job(tmp_path):
    launched = Launched(tmp_path, "--steps", "100000")
    rank = launched.pid_once_training(1)
    starter = parent(parent(rank))  # between them is launcher.rank
    os.kill(starter, signal.SIGKILL)
    code, _, _ = launched.end()  # the ranks end with it, and may or may not be noticed first
    assert code == 76
    assert launched.leftovers() == []
