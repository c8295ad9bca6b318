"""What preflight compares, and how it names a host."""

import pytest

from albert.config import load_run_config
from albert.errors import ConfigError
from albert.preflight import check_space
from albert.preflight_facts import (
    bad_hosts,
    check_interfaces,
    code_hash,
    host_facts,
    problem_lines,
    promised_bytes_per_s,
    rank_problems,
)
from tests.synthetic import make_dataset


def fact(host: str, **changes) -> dict:
    return {
        "host": host, "code": "aaa", "versions": "3.11 torch 2.13", "dataset": "d1", "clock": 100.0, "problems": [],
        "output_dir": "run", "sees_first": True, **changes,
    }  # fmt: skip


def compare_facts(facts: list[dict]) -> list[str]:
    return problem_lines(facts, rank_problems(facts))


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
        ({"sees_first": False}, "b: train.output_dir (run): not shared with the other hosts"),
        ({"problems": ["no space"]}, "b: no space"),
        ({"problems": ["no shards"], "dataset": None}, "b: no shards"),
    ],
)
def test_a_host_that_differs_is_named_once(changes, line):
    lines = compare_facts([fact("a"), fact("a"), fact("b", **changes), fact("b", **changes), fact("a")])
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.parametrize(
    ("facts", "lines", "bad"),
    [
        # Most hosts are right, also where the first one differs from them.
        (
            [fact("a", code="old"), fact("b"), fact("c")],
            ["a: different code (hash old); install the same version of this project everywhere; b has aaa"],
            ["a"],
        ),
        (
            [fact("a"), fact("b", sees_first=False), fact("c", sees_first=False)],
            ["a: train.output_dir (run): not shared with the other hosts; use a shared file system"],
            ["a"],
        ),
        # Half of two: the second one.
        ([fact("a"), fact("b", sees_first=False)], None, ["b"]),
        # One rank of a host is enough; a lone host can be bad.
        ([fact("a"), fact("a", problems=["cuda:1: in use"])], ["a: cuda:1: in use"], ["a"]),
        # What all ranks say is nobody's fault.
        ([fact("a", problems=["no shards"]), fact("b", problems=["no shards"])], None, []),
        ([fact("a"), fact("b")], [], []),
    ],
)
def test_bad_hosts_are_those_that_differ_from_most(facts, lines, bad):
    assert bad_hosts(facts, rank_problems(facts)) == bad
    assert lines in (None, compare_facts(facts))


def test_the_promised_bandwidth_is_that_of_the_network_in_use(tmp_path):
    for name, speed in (("eth0", "10000"), ("eth1", "25000"), ("down", "-1")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(speed)
    routes = tmp_path / "route"
    assert promised_bytes_per_s({}, tmp_path, routes) is None
    routes.write_text("Iface\tDestination\neth0\t00000000\n")
    assert promised_bytes_per_s({}, tmp_path, routes) == ("eth0", 1.25e9)
    assert promised_bytes_per_s({"GLOO_SOCKET_IFNAME": "eth1"}, tmp_path, routes) == ("eth1", 3.125e9)
    assert promised_bytes_per_s({"GLOO_SOCKET_IFNAME": "down"}, tmp_path, routes) is None
    for port in "12":
        place = tmp_path / "infiniband/mlx5_0/ports" / port
        place.mkdir(parents=True)
        (place / "rate").write_text("200 Gb/sec (4X HDR)\n")
    assert promised_bytes_per_s({}, tmp_path, routes) == ("InfiniBand", 50e9)


def test_a_tokenizer_that_is_not_the_datasets_is_named(tmp_path):
    make_dataset(tmp_path / "data")
    config = load_run_config("demo", [f"data.directory={tmp_path}/data", f"train.output_dir={tmp_path}/run"])
    assert host_facts(config)["problems"] == []
    (tokenizer,) = (tmp_path / "data/tokenizer").iterdir()
    tokenizer.write_bytes(b"other")
    (problem,) = host_facts(config)["problems"]
    assert "is not the tokenizer that the manifest names; copy the dataset again" in problem


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
