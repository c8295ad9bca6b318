"""Every program in every place: `--dry-run` prints exactly what would run, and runs nothing."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher import hosts as hosts_module
from launcher.job import PROGRAMS, Job
from tests.synthetic import make_dataset

PLACES = {
    "local": ["local", "-n", "2"],
    "hosts": ["hosts", "--hostfile", "hosts", "--via", "openmpi"],
    "no-ssh": ["hosts", "--hostfile", "hosts", "--no-ssh", "--node-rank", "1"],
    "slurm": ["slurm", "--nodes", "1", "--ranks-per-node", "2"],
}
ARGUMENTS = {
    "pretrain": ["--config", "demo", "data.directory=shards", "train.output_dir=it's $(touch canary)"],
    "finetune": ["--task", "a b", "--x=$(touch canary)"],
    "data": ["build", "--input", "a b.txt", "--output", "`touch canary`"],
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A directory with a dataset and a hostfile."""
    make_dataset(tmp_path / "shards")
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosts_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def dry_run(monkeypatch, capsys, place: str, program: str) -> list[str]:
    options = PLACES[place]
    monkeypatch.setattr(sys, "argv", ["launcher", *options, "--dry-run", program, *ARGUMENTS[program]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return said.out.splitlines()


@pytest.mark.parametrize(("place", "program"), list(itertools.product(PLACES, ARGUMENTS)))
def test_dry_run_prints_what_would_run(here, monkeypatch, capsys, place, program):
    before = sorted(here.rglob("*"))
    lines = dry_run(monkeypatch, capsys, place, program)
    assert sorted(here.rglob("*")) == before
    arguments = ARGUMENTS[program]
    if place == "slurm":
        assert f"arguments=({shlex.join(arguments)})" in lines
        last = f'exec "$python" -m launcher slurm job "${{job_options[@]}}" {program} "${{arguments[@]}}"'
        assert lines[-1] == last
        return
    # What starts the ranks carries the job, and what the job is can be read below it.
    word = next(found[1] for line in lines if (found := re.search(r"--job (\S+)$", line)))
    job = Job.decode(word)
    extra = [] if program != "data" else ["--workers", "2"] if place == "local" else ["--part", "rank"]
    assert (job.module, job.arguments) == (PROGRAMS[program], (*arguments, *extra))
    rank = [sys.executable, "-u", "-m", PROGRAMS[program], *arguments]
    assert shlex.join([*rank, *extra]) in lines
    if extra[:1] == ["--part"]:
        assert lines[-1] == shlex.join(rank)  # once all hosts are done
    assert all(f"export {name}={shlex.quote(value)}" in lines for name, value in job.environment)


def test_hosts_prepare_data_with_one_process_each(here, monkeypatch, capsys):
    (here / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    assert dry_run(monkeypatch, capsys, "hosts", "data")[0] == "# 2 ranks on node1, node2 through openmpi"
    assert (
        dry_run(monkeypatch, capsys, "hosts", "finetune")[0] == "# 16 ranks on node1, node2 through openmpi"
    )


@pytest.mark.parametrize("words", ["audit shards", "build --mpi --output x"])
def test_hosts_divide_builds_only(here, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["launcher", *PLACES["hosts"], "data", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 78
    assert "error: data: hosts divide 'data build' among them, without --mpi" in capsys.readouterr().err
