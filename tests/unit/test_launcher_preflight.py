"""What preflight compares, and how it names a host."""

import pytest

from albert.config import load_run_config
from albert.errors import ConfigError
from albert.preflight import check_interfaces, check_space, code_hash, compare_facts


def fact(host: str, **changes) -> dict:
    return {
        "host": host, "code": "aaa", "versions": "3.11 torch 2.13", "dataset": "d1", "clock": 100.0, "problems": [],
        **changes,
    }  # fmt: skip


def test_equal_hosts_have_no_problems():
    assert compare_facts([fact("a"), fact("a"), fact("b", clock=104.0)]) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"code": "bbb"},
            "b: different code (hash bbb); install the same version of this project everywhere",
        ),
        (
            {"versions": "3.12"},
            "b: different versions (3.12); install the packages of constraints.txt everywhere",
        ),
        ({"dataset": "d2"}, "b: different or stale shards (manifest d2)"),
        ({"clock": 160.0}, "b: its clock is +60 s from the others'"),
        ({"problems": ["no space"]}, "b: no space"),
        ({"problems": ["no shards"], "dataset": None}, "b: no shards"),
    ],
)
def test_a_host_that_differs_is_named_once(changes, line):
    lines = compare_facts([fact("a"), fact("a"), fact("b", **changes), fact("b", **changes), fact("a")])
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_the_code_hash_sees_contents_and_names(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert code_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2")
    second = code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, code_hash(tmp_path)}) == 3


def test_a_missing_interface_is_named_beside_those_that_are_there(tmp_path):
    for name in ("lo", "eth0", "ib0"):
        (tmp_path / name).mkdir()
    for value in ("", "eth0", "ib", "=eth0", "^docker", "eth0,ib0"):
        check_interfaces({"NCCL_SOCKET_IFNAME": value}, tmp_path)
    with pytest.raises(
        ConfigError, match="GLOO_SOCKET_IFNAME: no network interface 'ib7'; there are eth0, ib0, lo"
    ):
        check_interfaces({"GLOO_SOCKET_IFNAME": "ib7"}, tmp_path)


def test_an_output_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_run_config("demo", ["data.directory=d", f"train.output_dir={tmp_path}/file/run"])
    with pytest.raises(ConfigError, match=r"train.output_dir .*: Not a directory"):
        check_space(config)
