"""Jobs travel as one word; ranks find their place; the command line is checked before anything starts."""

import re
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albert.errors import ConfigError, MissingInputError
from launcher import cli
from launcher.checks import check_pretrain
from launcher.job import Job, Rendezvous
from launcher.local import LocalRun, count_gpus, free_port, plan_local
from launcher.rank import rank_place

SAFE = set(string.ascii_letters + string.digits + "-_=")


@given(st.lists(st.text().filter(lambda text: "\0" not in text)), st.text(), st.text())
def test_a_job_survives_the_journey_as_one_safe_word(arguments, name, value):
    job = Job("albert.pretrain", tuple(arguments), ((name, value),), "/status", None)
    word = job.encode()
    assert set(word) <= SAFE
    assert Job.decode(word) == job


@pytest.mark.parametrize("word", ["", "!", "AAAA", "bm8=", "e30="])
def test_a_word_that_is_no_job_is_refused(word):
    with pytest.raises(ConfigError, match=r"^--job: '.*' is not a job; only the launcher makes them$"):
        Job.decode(word)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
        # Inside a batch job of Slurm, mpirun's own variables count.
        {
            "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
            "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
    ],
)  # fmt: skip
def test_a_rank_finds_its_place(environment):
    assert rank_place(environment) == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_a_rank_without_a_place_is_refused():
    with pytest.raises(ConfigError, match="neither RANK nor OMPI_COMM_WORLD_RANK nor SLURM_PROCID is set"):
        rank_place({"RANK": "0", "SLURM_PROCID": "x"})


def test_the_local_command_goes_through_deepspeed_on_loopback():
    run = LocalRun(Job("albert.pretrain", ("--config", "demo")), 2, Rendezvous("127.0.0.1", 12345))
    command = run.command()
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert "--master_addr=127.0.0.1" in command
    assert "--master_port=12345" in command
    assert "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19" in command  # {"localhost": [0, 1]}
    assert command[-3:] == ["launcher.rank", "--job", run.job.encode()]


def test_a_plan_fills_in_what_the_user_left_open():
    added = dict(plan_local(Job("m", ()), 2, {}).job.environment)
    assert "TORCH_EXTENSIONS_DIR" in added
    mine = {
        "TORCH_EXTENSIONS_DIR": "/x",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "DS_ACCELERATOR": "cpu",
    }
    plan = plan_local(Job("m", ()), 2, mine)
    assert plan.job.environment == (
        ("CUDA_VISIBLE_DEVICES", "3,5"),
    )  # DeepSpeed's launcher would overwrite it
    assert plan.rendezvous.address == "127.0.0.1"


def test_ports_are_free_and_vary():
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert all(20000 <= port < 30000 for port in ports)


def test_dry_run_prints_what_would_run_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ["local", "-n", "2", "--dry-run", "finetune", "--task", "a b", "--x=$(touch canary)"]
    monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# ranks on this machine: 2"
    assert re.search(r"^\S+ -m deepspeed.launcher.launch .* launcher.rank --job [\w=-]+$", lines[1])
    assert lines[-1] == f"{sys.executable} -u -m albert.finetune --task 'a b' '--x=$(touch canary)'"
    assert list(tmp_path.iterdir()) == []


def launch(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["launcher", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


def test_a_dry_run_of_a_pretraining_needs_no_dataset_yet(capsys, monkeypatch):
    words = ["local", "-n", "2", "--dry-run", "pretrain", "--config", "demo", "data.directory=/nowhere"]
    monkeypatch.setattr(sys, "argv", ["launcher", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "albert.pretrain --config demo data.directory=/nowhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("local -n 0 pretrain --config demo", 78, "-n: 0 ranks cannot run anything; give 1 or more"),
        ("local -n x pretrain", 78, "invalid int value: 'x'"),
        ("local train", 78, "invalid choice: 'train'"),
        ("local", 78, "required: program"),
        ("", 78, "required: PLACE"),
        ("local -n 2 pretrain --config nope", 66, "nope: no such configuration file or recipe"),
        ("local -n 2 pretrain --config demo train.steps=5", 78, "train.steps: unknown key"),
        ("local -n 2 pretrain train.num_steps=5", 78, "pretrain: --config is missing; give a recipe"),
        ("local -n 7 pretrain --config demo", 78, "x world_size (7)"),
        ("local -n 2 pretrain --config demo data.directory=/nowhere", 66, "/nowhere: no manifest.json"),
        ("local -n 2 data verify shards", 78, "-n: 2 processes are for 'data build' only; leave -n out"),
        ("local -n 2 data build --workers 3", 78, "--workers: -n says the same; give one of them"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_starts(monkeypatch, capsys, arguments, code, message):
    got, errors = launch(monkeypatch, capsys, *arguments.split())
    assert got == code
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_data_preparation_starts_its_own_processes():
    assert cli.data_workers(("build", "--input", "x"), 4) == ("build", "--input", "x", "--workers", "4")
    assert cli.data_workers(("verify", "x"), 1) == ("verify", "x")


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("0", 1), ("2,5,7", 3), ("GPU-a,GPU-b", 2), ("-1", 0), ("0, 1,-1,2", 2)]
)
def test_visible_devices_give_the_number_of_ranks(visible, count):
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_a_missing_dataset_is_not_looked_for_on_every_rank():
    with pytest.raises(MissingInputError):
        check_pretrain(("--config", "demo", "data.directory=/nowhere"), 1)
    check_pretrain(("--config", "demo", "data.directory=/nowhere"), 1, with_data=False)
    check_pretrain(("--help",), 1)


def test_help_teaches_by_example():
    text = subprocess.run(
        [sys.executable, "-m", "launcher", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "python -m launcher local -n 2 pretrain --config demo" in text
    assert "75 stopped" in " ".join(text.split())
