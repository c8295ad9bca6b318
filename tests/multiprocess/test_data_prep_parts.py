"""A build done in parts by processes that only share a disk has the bytes of a build done by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpora import english_tokenizer, fingerprint, write_english

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
NUM_PARTS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and many corpus files, which make several tasks."""
    directory = tmp_path_factory.mktemp("parts")
    english_tokenizer(directory)
    text = write_english(directory / "english.txt").read_text()
    for number in range(6):
        (directory / f"text-{number}.txt").write_text((text + "\n") * 2)
    return directory


def build(place: Path, output: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    inputs = [f"text-{number}.txt" for number in range(6)]
    arguments = ["--tokenizer", "tokenizer", "--max-seq-length", "128", "--eval-fraction", "0.1"]
    words = ["build", "--input", *inputs, *arguments, "--output", output, "--workers", "1", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture(scope="module")
def wanted(place: Path) -> str:
    code, said = end(build(place, "whole"))
    assert code == 0, said
    assert len(list((place / "whole").glob("train-*.tar"))) >= NUM_PARTS
    return fingerprint(place / "whole")


def test_parts_at_the_same_time_and_a_last_build_give_the_same_bytes(place, wanted):
    parts = [build(place, "parts", "--part", f"{k}/{NUM_PARTS}") for k in range(NUM_PARTS)]
    for number, (code, said) in enumerate(map(end, parts)):
        assert code == 0, said
        assert f"parts: part {number}/{NUM_PARTS} is done" in said
    assert not (place / "parts/manifest.json").exists()
    shards = {path: path.stat().st_mtime_ns for path in (place / "parts").glob("*.tar")}
    code, said = end(build(place, "parts"))
    assert code == 0, said
    assert fingerprint(place / "parts") == wanted
    assert {path: path.stat().st_mtime_ns for path in shards} == shards  # nothing was done twice
    assert end(build(place, "parts", "--part", "0/2"))[0] == 0  # done already


def test_a_part_that_was_never_done_is_made_up_for(place, wanted):
    """RANK and WORLD_SIZE number the parts of hosts; the last build does what is missing."""
    for rank in ("0", "2"):
        code, said = end(build(place, "gap", "--part", "rank", RANK=rank, WORLD_SIZE="3"))
        assert code == 0, said
    assert end(build(place, "gap"))[0] == 0
    assert fingerprint(place / "gap") == wanted


def test_parts_exclude_a_whole_build_and_themselves(place):
    import fcntl

    assert end(build(place, "busy", "--part", "0/2"))[0] == 0
    work = place / "busy/.build"
    with (work / "lock").open("r+") as lock, (work / "part-1-of-2").open("w") as part:
        fcntl.flock(lock, fcntl.LOCK_SH)
        fcntl.flock(part, fcntl.LOCK_EX)
        code, said = end(build(place, "busy"))
        assert (code, "another build is writing there; wait for it" in said) == (77, True)
        code, said = end(build(place, "busy", "--part", "1/2"))
        assert (code, "part 1/2 is being built already; wait for it" in said) == (77, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "3/3"), "--part 3/3: 3/3 is no K/N with K from 0 to N-1, such as 0/8"),
        (("--part", "x"), "--part x: x is no K/N"),
        (("--part", "rank"), "--part rank (RANK and WORLD_SIZE): / is no K/N"),
        (("--part", "0/2", "--mpi"), "--part: MPI ranks share a build by themselves"),
        (
            ("--part", "0/2", "--dedup", "exact"),
            "--dedup: compares all documents, so parts cannot work alone",
        ),
    ],
)
def test_what_parts_cannot_do_is_said(place, options, message):
    code, said = end(build(place, "never", *options, RANK="", WORLD_SIZE=""))
    assert code == 78
    assert f"error: {message}" in said
    assert not (place / "never").exists()
