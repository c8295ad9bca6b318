"""The bytes of a dataset depend neither on who builds it nor on how often the build is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpora import english_tokenizer, fingerprint, write_english

pytestmark = pytest.mark.multiprocess

TIMEOUT_S = 120
ROOT = Path(__file__).parents[2]
_MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and two corpora of a few tasks together."""
    directory = tmp_path_factory.mktemp("parallel")
    english_tokenizer(directory)
    text = write_english(directory / "english.txt").read_text()
    (directory / "many.txt").write_text((text + "\n") * 12)
    (directory / "few.txt").write_text(text * 2)
    return directory


def command(output: str, *options: str, inputs: tuple[str, ...] = ("many.txt", "few.txt")) -> list[str]:
    arguments = ["--input", *inputs, "--tokenizer", "tokenizer", "--max-seq-length", "128"]
    program = [sys.executable, "-m", "data_prep", "build", *arguments, "--output", output]
    return [*program, "--eval-fraction", "0.1", *options]


def run(place: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        arguments,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def wanted(place: Path) -> str:
    result = run(place, command("one", "--workers", "1"))
    assert result.returncode == 0, result.stderr
    assert len(list((place / "one").glob("train-*.tar"))) >= 4
    return fingerprint(place / "one")


@pytest.mark.parametrize("workers", ["2", "4"])
def test_any_number_of_workers_gives_the_same_bytes(place, wanted, workers):
    result = run(place, command(f"w{workers}", "--workers", workers))
    assert result.returncode == 0, result.stderr
    assert fingerprint(place / f"w{workers}") == wanted
    assert "documents=" in result.stderr


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_any_number_of_mpi_ranks_gives_the_same_bytes(place, wanted, ranks):
    assert _MPIRUN, "mpirun is missing; `pip install mpich` brings it"
    result = run(place, [_MPIRUN, "-n", ranks, *command(f"mpi{ranks}", "--mpi")])
    assert result.returncode == 0, result.stderr
    assert fingerprint(place / f"mpi{ranks}") == wanted


def test_several_processes_verify_like_one(place, wanted, tmp_path):
    program = [sys.executable, "-m", "data_prep", "verify", "--workers"]
    result = run(place, [*program, "2", "one"])
    assert result.returncode == 0, result.stderr
    assert "every byte as the manifest says" in result.stdout
    copy = tmp_path / "copy"
    shutil.copytree(place / "one", copy)
    shard = sorted(copy.glob("train-*.tar"))[2]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    result = run(place, [*program, "3", str(copy)])
    assert result.returncode == 65
    assert f"error: {shard}: block 0: checksum mismatch" in result.stderr.splitlines()[-1]
    result = run(place, [*program, "0", "one"])
    assert (result.returncode, result.stderr) == (78, "error: --workers 0: must be at least 1\n")


def test_duplicates_are_dropped_alike_by_processes_and_ranks(place):
    assert _MPIRUN
    for name, program in (
        ("d1", command("d1", "--dedup", "near", "--workers", "1", inputs=("few.txt",))),
        ("d2", command("d2", "--dedup", "near", "--workers", "2", inputs=("few.txt",))),
        ("d3", [_MPIRUN, "-n", "3", *command("d3", "--dedup", "near", "--mpi", inputs=("few.txt",))]),
    ):
        result = run(place, program)
        assert result.returncode == 0, result.stderr
        assert "'repeated':" in result.stdout
        assert fingerprint(place / name) == fingerprint(place / "d1")


@pytest.mark.parametrize("mode", ["processes", "mpi"])
def test_killed_at_random_points_it_goes_on_and_ends_with_the_same_bytes(place, wanted, mode, request):
    """SIGKILL after random times; no orphan spoils what follows, no temporary file stays. 20 kills with --slow."""
    output = place / f"killed-{mode}"
    program = command(str(output), "--workers", "2")
    if mode == "mpi":
        program = [str(_MPIRUN), "-n", "3", *command(str(output), "--mpi")]
    generator = random.Random(5)
    is_slow = request.config.getoption("--slow")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began_at = time.monotonic()
    undisturbed = [word.replace(str(output), f"{output}-undisturbed") for word in program]
    subprocess.run(undisturbed, cwd=place, env=environment, capture_output=True, check=True)
    usual_s = time.monotonic() - began_at
    kills = 0
    for _ in range(20 if is_slow else 7):
        process = subprocess.Popen(
            program,
            cwd=place,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=usual_s * generator.uniform(0.3, 0.7 if is_slow else 0.9))
            assert code == 0
            break
        except subprocess.TimeoutExpired:
            # The first process alone; what it leaves behind must end by itself.
            process.kill()
            process.wait()
            kills += 1
    assert kills > (10 if is_slow else 0)
    for _ in range(100):  # a build whose predecessor is still dying is refused
        result = run(place, program)
        if "another build is writing" not in result.stderr:
            break
        time.sleep(0.1)
    assert result.returncode == 0, result.stderr
    assert fingerprint(output) == wanted


def test_a_killed_worker_ends_the_build_with_one_line(place):
    process = subprocess.Popen(
        command("lost", "--workers", "2", "--dupe-factor", "40"),
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    worker = 0
    for _ in range(600):
        found = [int(pid) for pid in children.read_text().split()]
        names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
        workers = [pid for pid, line in names.items() if b"spawn_main" in line]
        if len(workers) == 2 and list((place / "lost").glob("*.tar*")):
            worker = workers[0]
            break
        time.sleep(0.02)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 76
    assert errors.splitlines()[-1].startswith("error: a worker process was killed (out of memory?)")


def test_an_error_on_rank_0_ends_all_ranks(place):
    result = run(place, [str(_MPIRUN), "-n", "3", *command("never", "--mpi", "--weight", "x")])
    assert result.returncode == 78
    assert "error: --weight 'x' is not of the form PATTERN=WEIGHT" in result.stderr
    assert not (place / "never").exists()


def test_an_error_on_another_rank_ends_all_ranks(place):
    """A damaged compressed file is found by whoever reads it."""
    import gzip

    data = gzip.compress((place / "many.txt").read_bytes())
    (place / "broken.txt.gz").write_bytes(data[: len(data) // 2])
    inputs = ("few.txt", "broken.txt.gz")
    result = run(place, [str(_MPIRUN), "-n", "3", *command("never2", "--mpi", inputs=inputs)])
    assert result.returncode == 65
    assert "error: broken.txt.gz: damaged .gz file" in result.stderr
    result = run(place, command("never3", "--workers", "2", inputs=inputs))
    assert result.returncode == 65
    assert result.stderr.splitlines()[-1].startswith("error: broken.txt.gz: damaged .gz file")
