"""Inside a Slurm job: what an allocation means, what data preparation starts, and which nodes are bad."""

import json

import pytest

from albert.errors import ConfigError
from launcher import requeue
from launcher.allocation import Allocation, read_allocation, run_slurm_command
from launcher.outcome import RankEnd
from launcher.requeue import excluded_nodes
from launcher.slurm_data import data_command, mpi_variables, run_data
from launcher.slurm_preflight import bad_nodes, preflight_arguments
from launcher.slurm_ranks import LOG_ROOT, SlurmSettings, last_error
from launcher.slurm_status import status_lines

TWO_NODES = Allocation(7, "a", 0, ("n1", "n2"), 4, 2)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> dict[str, str]:
    """Variables of a batch job with two nodes, and a scontrol that knows their names."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1; echo n2\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "16"}


def array(task: int, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    values = {"JOB_ID": 9, "TASK_ID": task, "TASK_MIN": first, "TASK_MAX": last, "TASK_COUNT": count}
    return {f"SLURM_ARRAY_{name}": str(value) for name, value in {**values, "TASK_STEP": step}.items()}


def test_an_allocation_is_read_from_the_environment(slurm):
    whole = {**slurm, "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "8", "SLURM_RESTART_COUNT": "2"}
    assert read_allocation(whole) == Allocation(12, "x", 2, ("n1", "n2"), 8, 4)
    per_node = read_allocation({**slurm, "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3"})
    assert (per_node.num_tasks, per_node.cpus_per_task, per_node.log_name) == (4, 3, "job-12")
    with pytest.raises(ConfigError, match="SLURM_NTASKS not set"):
        read_allocation(slurm)


def test_tasks_of_an_array_are_parts_and_share_a_log_directory(slurm):
    common = {**slurm, "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "d"}
    third = read_allocation({**common, **array(5, 3, 10, 8)})
    assert (third.part, third.log_name, third.job_id) == ((2, 8), "d-9", 12)
    assert read_allocation({**common, **array(4, 0, 6, 4, step=2)}).part == (2, 4)
    with pytest.raises(ConfigError, match="--array: has gaps; give a whole range"):
        read_allocation({**common, **array(7, 1, 7, 2)})


@pytest.mark.parametrize(
    ("arguments", "part", "options", "words"),
    [
        (("build", "--mpi"), None, "--ntasks=4 --cpus-per-task=2 --kill-on-bad-exit=1 --mpi=pmix", "build --mpi"),
        (("build",), None, "--ntasks=1 --cpus-per-task=4 --kill-on-bad-exit=1 --nodes=1 --mpi=none",
         "build --workers 2"),
        (("build", "--workers=3"), None, "--ntasks=1 --cpus-per-task=4 --kill-on-bad-exit=1 --nodes=1 --mpi=none",
         "build --workers=3"),
        (("audit", "d"), None, "--ntasks=1 --cpus-per-task=4 --kill-on-bad-exit=1 --nodes=1 --mpi=none", "audit d"),
        (("build",), (3, 8), "--ntasks=1 --cpus-per-task=4 --kill-on-bad-exit=1 --nodes=1 --mpi=none",
         "build --workers 2 --part 3/8"),
    ],
)  # fmt: skip
def test_data_preparation_gets_ranks_workers_or_a_part(arguments, part, options, words):
    allocation = Allocation(7, "a", 0, ("n1", "n2"), 4, 2, part=part)
    command = data_command(arguments, allocation, SlurmSettings(mpi="pmix"))
    assert command[:2] == ["srun", "--export=ALL"]
    place = command.index("-m")
    assert " ".join(command[2 : place - 2]) == options
    assert command[place + 1 :] == ["data_prep", *words.split()]


def test_mpi_ranks_find_each_other_over_tcp_unless_the_job_says_otherwise():
    assert mpi_variables("pmi2", {}) == {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    own = {"FI_PROVIDER": "verbs", "GLOO_SOCKET_IFNAME": "ib0"}
    assert mpi_variables("pmi2", own) == {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_TCP_IFACE": "ib0"}
    assert mpi_variables("pmix", {}) == {}


@pytest.mark.parametrize("arguments", [("audit", "d"), ("build", "--mpi")])
def test_an_array_of_something_else_is_refused(arguments):
    with pytest.raises(ConfigError, match="--array: only 'data build' without --mpi is done in parts"):
        data_command(arguments, Allocation(7, "a", 0, ("n1",), 1, 1, part=(0, 2)), SlurmSettings())


@pytest.mark.parametrize(
    ("codes", "starts", "code"), [("15 0", 2, 0), ("65 0", 1, 65), ("137 137 137 0", 3, 137), ("0", 1, 0)]
)
def test_a_build_that_ends_without_a_verdict_is_started_again(tmp_path, monkeypatch, codes, starts, code):
    """A program in the place of srun ends with one code after the other."""
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    (tmp_path / "srun").write_text(
        f"#!/bin/sh\ncd '{tmp_path}'\necho x >> starts\ncode=$(head -n1 codes)\nsed -i 1d codes\nexit $code\n"
    )
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert run_data(("build", "--mpi"), TWO_NODES, SlurmSettings()) == code
    assert (tmp_path / "starts").read_text().count("x") == starts


def ends(*codes: int | None) -> list[RankEnd]:
    """Ranks with these exit codes; -9 is a rank that the launcher killed, None one without a record."""
    return [
        RankEnd(rank, "h", code, float(rank), (9,) if code == -9 else ())
        for rank, code in enumerate(codes)
        if code is not None
    ]


@pytest.mark.parametrize(
    ("report", "codes", "bad"),
    [
        ({"bad_hosts": ["n2"], "problems": []}, (78, 78, 78, 78), ["n2"]),
        ({"bad_hosts": [], "problems": []}, (78, 78, 78, 78), []),
        # A rank on n2 found its device missing, the others waited for it in vain, or were killed.
        (None, (76, 76, 78, 76), ["n2"]),
        (None, (76, -9, 78, 78), ["n2"]),
        (None, (1, 76, 78, 76), ["n1", "n2"]),
        # Ranks of n1 never ended, or never began, while n2 waited for them.
        (None, (-9, -9, 76, 76), ["n1"]),
        (None, (None, None, 76, 76), ["n1"]),
        # Everybody has the same problem, or nobody could start: no node is at fault.
        (None, (78, 78, 78, 78), []),
        (None, (None, None, None, None), []),
        (None, (76, 76, 76, 76), []),
    ],
)
def test_bad_nodes_are_named_by_what_their_ranks_did(report, codes, bad):
    assert bad_nodes(report, ends(*codes), TWO_NODES) == bad


def test_ranks_are_placed_on_nodes_in_blocks():
    assert [TWO_NODES.node_of(rank) for rank in range(4)] == ["n1", "n1", "n2", "n2"]


@pytest.mark.parametrize(
    ("program", "words", "is_checked"),
    [
        ("pretrain", "--config xlarge data.directory=d", True),
        ("pretrain", "data.directory=d --config=xlarge", True),
        ("pretrain", "--config xlarge --show", False),
        ("pretrain", "--help", False),
        ("pretrain", "", False),
        ("finetune", "--config xlarge", False),
    ],
)
def test_what_preflight_understands_is_checked(program, words, is_checked):
    arguments = tuple(words.split())
    assert preflight_arguments(program, arguments) == (arguments if is_checked else None)


def test_nodes_are_added_to_those_that_are_left_out_already():
    assert excluded_nodes({"ExcNodeList": "(null)"}, ["n2"]) == "n2"
    assert excluded_nodes({"ExcNodeList": "n[4-7],x1"}, ["n2", "n3"]) == "n[4-7],x1,n2,n3"


def test_a_controller_that_is_restarted_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(requeue, "PAUSES_S", (0.0, 0.0))
    answers = iter([ConfigError("scontrol refused: Unable to contact slurm controller"), "done"])

    def command() -> str:
        answer = next(answers)
        if isinstance(answer, ConfigError):
            raise answer
        return answer

    assert requeue.patiently(command) == "done"
    assert (
        "launcher: scontrol refused: Unable to contact slurm controller; tried again"
        in capsys.readouterr().out
    )
    answers = iter([ConfigError("no")] * 3)
    with pytest.raises(ConfigError, match="no"):
        requeue.patiently(command)


def test_variables_of_another_job_do_not_reach_sbatch(tmp_path, monkeypatch):
    """A program in the place of sbatch prints what it got."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_CONF", "HOME_OF_MINE"):
        monkeypatch.setenv(name, "x")
    said = run_slurm_command("sbatch", strip=("SLURM_JOB", "SLURM_CPU")).splitlines()
    assert {"SLURM_CONF=x", "HOME_OF_MINE=x"} <= set(said)
    assert not {"SLURM_JOB_ID=x", "SLURM_CPUS_PER_TASK=x"} & set(said)


def test_the_cause_is_the_last_error_of_the_rank_that_failed_first(tmp_path):
    (tmp_path / "rank-1.log").write_text("step 1\n[rank 1] error: b: damaged\n[rank 1] bye\n")
    (tmp_path / "rank-2.log").write_text("error: later\n")
    assert last_error(tmp_path, ends(76, 65, 65)) == "b: damaged"
    assert last_error(tmp_path, ends(76, 76)) is None
    assert last_error(tmp_path, ends(1)) is None  # it left no log


@pytest.mark.parametrize(
    ("squeue", "last"),
    [
        ("echo 1:00", "12   a     RUNNING  -     -     1:00  0         None"),
        (
            "echo squeue: error: Unable to contact slurm controller >&2; exit 1",
            "states and times may be missing: squeue refused: Unable to contact slurm controller",
        ),
        (
            "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1",
            "12   a     RUNNING  -     -     -     0         None",
        ),
    ],
)
def test_what_squeue_refuses_is_said(tmp_path, monkeypatch, squeue, last):
    for name, script in (("scontrol", "echo JobState=RUNNING Restarts=0 Reason=None"), ("squeue", squeue)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / LOG_ROOT / "a-12"
    directory.mkdir(parents=True)
    job = {"job_id": 12, "program": "data", "arguments": []}
    (directory / "job.json").write_text(json.dumps(job))
    lines = status_lines([])
    assert lines[-1] == last
    assert lines[1].startswith("12   a     RUNNING")
