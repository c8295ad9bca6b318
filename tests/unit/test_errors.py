"""Known errors end with one line and their own exit code; defects keep their traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from albert import errors

CODES = {
    errors.DataError: 65,
    errors.MissingInputError: 66,
    errors.NonFiniteError: 70,
    errors.DiskError: 74,
    errors.PreemptedError: 75,
    errors.PeerLostError: 76,
    errors.UnsafeError: 77,
    errors.ConfigError: 78,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_codes_and_lines(kind, code, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def fail() -> None:
        raise kind("a.yaml: x (3) must be 4")

    assert errors.run_command(fail) == code
    prefix = "stopped" if code == 75 else "error"
    assert capsys.readouterr().err == f"{prefix}: a.yaml: x (3) must be 4\n"


def test_other_ranks_say_who_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")

    def fail() -> None:
        raise errors.DataError("bad")

    assert errors.run_command(fail) == 65
    assert capsys.readouterr().err == "[rank 3] error: bad\n"


def test_a_full_disk_anywhere_is_74(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    assert errors.run_command(fail) == 74
    assert "/data/x: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "change its permissions or choose another place"),
        (errno.EPERM, "change its permissions or choose another place"),
        (errno.EISDIR, "choose another place"),
        (errno.ENOTDIR, "choose another place"),
        (errno.ENAMETOOLONG, "choose another place"),
    ],
)
def test_a_path_that_cannot_be_written_is_74(capsys, monkeypatch, number, advice):
    monkeypatch.delenv("RANK", raising=False)

    def fail(*path: str) -> None:
        raise OSError(number, os.strerror(number), *path)

    assert errors.run_command(lambda: fail("/data/x")) == 74
    assert capsys.readouterr().err == f"error: /data/x: {os.strerror(number)}; {advice}\n"
    with pytest.raises(OSError, match=os.strerror(number)):  # of no file: a defect, with its traceback
        errors.run_command(fail)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "albert.pretrain --config demo --bogus",
            "python -m albert.pretrain: unrecognized arguments: --bogus",
        ),
        ("albert.pretrain", "the following arguments are required: --config"),
        ("albert.finetune --learning-rate x", "argument --learning-rate: invalid float value: 'x'"),
        (
            "albert.finetune predict",
            "python -m albert.finetune predict: the following arguments are required: --model",
        ),
        ("albert.preflight", "the following arguments are required: --config"),
        ("albert.convert to-hf --bogus", "see python -m albert.convert to-hf --help"),
        (
            "data_prep build --max-seq-length x",
            "python -m data_prep build: argument --max-seq-length: invalid int",
        ),
        ("launcher local -n x pretrain", "argument -n: invalid int value: 'x'"),
        ("launcher local -n 2 pretrain --config", "argument --config: expected one argument"),
        ("launcher local finetune --output", "argument --output: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_78(command, message):
    ended = subprocess.run(
        [sys.executable, "-m", *command.split()], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 78
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_success_and_defects():
    assert errors.run_command(lambda: None) == 0

    def defect() -> None:
        raise KeyError("unexpected")

    with pytest.raises(KeyError):
        errors.run_command(defect)

    def other_io() -> None:
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        errors.run_command(other_io)


def test_a_rank_ends_with_its_code_and_all_of_its_output():
    code = "from albert.errors import end_rank; print('said', end=''); end_rank(75)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (75, "said")
