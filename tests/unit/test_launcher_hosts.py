"""Hostfiles, and what `launcher hosts` hands to DeepSpeed's runner."""

import sys

import pytest

from albert.errors import ConfigError, MissingInputError, UnsafeError
from launcher import hosts as hosts_module
from launcher.hosts import plan_hosts, plan_one_host, read_hostfile, runner_environment
from launcher.job import Job, Rendezvous
from launcher.rank import threads
from launcher.records import read_signals, write_signals


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode1 slots=2\n\nnode2.site slots=3  # more\n")
    return str(path)


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(hosts_module.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_a_hostfile_gives_hosts_in_order(hostfile):
    hosts = read_hostfile(hostfile)
    assert hosts.slots == {"node1": 2, "node2.site": 3}
    assert (hosts.num_ranks, hosts.first) == (5, "node1")
    assert hosts.world() == {"node1": [0, 1], "node2.site": [0, 1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1", "line 1: 'node1' is not of the form 'node1 slots=8'"),
        ("node1 slots=0", "is not of the form"),
        ("$(touch canary) slots=1", "is not of the form"),
        ("-oProxyCommand=x slots=1", "is not of the form"),
        ("a slots=1\na slots=2", "line 2: a is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_names_the_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(str(tmp_path / "hosts"))
    assert message in str(caught.value)


def test_a_missing_hostfile_says_how_one_looks():
    with pytest.raises(MissingInputError, match="node1 slots=8"):
        read_hostfile("/nowhere")


def test_the_runner_gets_safe_words_only(hostfile, anywhere):
    job = Job("albert.finetune", ("a b", "$(touch canary)"))
    environment = {"HF_HOME": "a b", "NCCL_DEBUG": "$(x)", "SECRET_TOKEN": "s"}
    run = plan_hosts(job, read_hostfile(hostfile), "openmpi", environment, Rendezvous("node1", 20001), "ib0")
    command = run.command()
    assert "--launcher_args=--bind-to none --mca btl_tcp_if_include ib0" in command
    assert "--master_addr=node1" in command
    assert not [word for word in command if "$(" in word or "a b" in word.split("=")]
    carried = dict(run.job.environment)
    assert carried["HF_HOME"] == "a b"
    assert carried["NCCL_DEBUG"] == "$(x)"
    assert carried["GLOO_SOCKET_IFNAME"] == "ib0"
    assert (carried["MASTER_ADDR"], carried["MASTER_PORT"]) == ("node1", "20001")
    assert "SECRET_TOKEN" not in carried
    assert Job.decode(command[-1]) == run.job


def test_variables_that_the_runner_would_write_unquoted_are_kept_from_it(anywhere):
    environment = runner_environment(
        {"NCCL_DEBUG": "$(x)", "PYTHONSTARTUP": "; x", "UCX_A": "`x`", "HOME": "/h"}
    )
    assert environment["HOME"] == "/h"
    assert not {"NCCL_DEBUG", "PYTHONSTARTUP", "UCX_A"} & set(environment)
    assert environment["DS_ENV_FILE"] == ".no_deepspeed_env"
    assert "ServerAliveInterval" in environment["PDSH_SSH_ARGS_APPEND"]


@pytest.mark.parametrize("place", ["a b", "a;b", "$(x)", "a'b"])
def test_a_directory_that_a_remote_shell_would_change_is_refused(
    hostfile, anywhere, monkeypatch, tmp_path, place
):
    (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / place)
    with pytest.raises(
        UnsafeError, match=r"the working directory .* has characters that remote shells change"
    ):
        plan_hosts(Job("m", ()), read_hostfile(hostfile), "pdsh", {}, Rendezvous("node1", 20001), None)


def test_a_missing_program_is_named(hostfile, monkeypatch):
    monkeypatch.setattr(hosts_module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="--via pdsh: pdsh is not installed here"):
        plan_hosts(Job("m", ()), read_hostfile(hostfile), "pdsh", {}, Rendezvous("node1", 20001), None)


def test_a_node_rank_beyond_the_hostfile_is_refused(hostfile):
    with pytest.raises(ConfigError, match="--node-rank 2: the hostfile has 2 hosts, numbered from 0"):
        plan_one_host(Job("m", ()), read_hostfile(hostfile), 2, {}, None)


def test_no_ssh_needs_a_number(monkeypatch, capsys, hostfile):
    from launcher import cli

    monkeypatch.setattr(sys, "argv", ["launcher", "hosts", "--hostfile", hostfile, "--no-ssh", "finetune"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 78
    assert "--no-ssh and --node-rank belong together" in capsys.readouterr().err


def test_signals_travel_in_a_file(tmp_path):
    assert read_signals(tmp_path) == []
    write_signals(tmp_path, [10, 15])
    assert read_signals(tmp_path) == [10, 15]


def test_threads_are_divided_among_the_ranks_of_a_host(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert threads({"LOCAL_SIZE": "4"}) == {"OMP_NUM_THREADS": "2"}
    assert threads({"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}) == {"OMP_NUM_THREADS": "1"}
    assert threads({}) == {"OMP_NUM_THREADS": "8"}
