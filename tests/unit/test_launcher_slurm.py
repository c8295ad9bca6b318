"""Batch scripts: what goes in arrives literally or is refused, and the templates are sound."""

import random
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from albert.errors import ConfigError, MissingInputError, UnsafeError
from launcher import cli
from launcher.allocation import Allocation, read_allocation
from launcher.batch_script import (
    checked_job_name,
    quoted,
    read_template,
    render,
    setting_lines,
    template_names,
    template_options,
)
from launcher.cluster import ClusterConfig, read_cluster
from launcher.job import Job
from launcher.slurm import Submission
from launcher.slurm_job import requeue_refusal
from launcher.slurm_ranks import SlurmSettings, srun_command

ROOT = Path(__file__).parents[2]
HOSTILE = string.ascii_letters + string.digits + " '\"`$(){}[];&|<>*?!#~\\-=,.:/%@^é漢"


def submission(*arguments: str, program: str = "pretrain", **fields) -> Submission:
    templates = {"pretrain": "pretrain", "finetune": "finetune", "data": "data_prep"}
    return Submission(
        program, arguments, fields.pop("cluster", ClusterConfig()), templates[program], **fields
    )


def test_templates_ship_and_are_scripts_in_their_own_right():
    assert template_names() == ["data_prep", "finetune", "preflight", "pretrain", "pretrain_xlarge"]
    for name in template_names():
        text = read_template(name)
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        options = template_options(text)
        assert {"open-mode", "signal", "nodes", "ntasks-per-node"} <= set(options)
        assert ("requeue" in options) == (name != "preflight")
        assert 'arguments=("$@")' in text or 'arguments=(--config xlarge "$@")' in text


def test_rendering_replaces_options_and_settings_only():
    script = submission("--config", "xlarge", nodes=4, ranks_per_node=2, job_name="my.job").script()
    options = template_options(script)
    assert (options["nodes"], options["ntasks-per-node"], options["job-name"]) == ("4", "2", "my.job")
    assert options["requeue"] is None
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=my.job\n")
    assert 'exec "$python" -m launcher slurm job "${job_options[@]}" pretrain "${arguments[@]}"' in script
    assert "arguments=(--config xlarge)" in script
    assert ">>> settings" not in script
    assert script.index("#SBATCH --output") < script.index("exec ")


def test_the_cluster_file_reaches_the_script():
    cluster = read_cluster(str(ROOT / "slurm/cluster.example.yaml"))
    script = submission("--config", "base", cluster=cluster, after="12:13").script()
    options = template_options(script)
    assert options["partition"] == "gpu"
    assert options["exclusive"] is None
    assert options["signal"] == "B:USR1@180"
    assert options["dependency"] == "afterok:12:13"
    assert options["kill-on-invalid-dep"] == "yes"
    for line in (
        "module load cuda/12.8 || exit 78",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export TMPDIR=/scratch",
    ):
        assert f"\n{line}\n" in script
    assert "job_options=(--srun-option=--cpu-bind=cores --mpi=pmi2)" in script


@pytest.mark.parametrize(
    ("program", "gpus", "ranks", "tasks", "asked"),
    [
        ("pretrain", None, None, "8", "8"),
        ("pretrain", 4, None, "4", "4"),
        ("pretrain", 8, 2, "2", "2"),
        ("pretrain", 0, None, "8", None),
        ("pretrain", 0, 3, "3", None),
        ("finetune", 8, None, "1", "1"),
        ("finetune", 8, 4, "4", "4"),
        ("data", 8, None, "64", None),
        ("data", 8, 16, "16", None),
    ],
)
def test_each_rank_gets_one_gpu_and_data_preparation_none(program, gpus, ranks, tasks, asked):
    cluster = ClusterConfig(gpus_per_node=gpus, cpus_per_task=6)
    options = template_options(
        submission("build", program=program, cluster=cluster, ranks_per_node=ranks).script()
    )
    assert (options["ntasks-per-node"], options.get("gpus-per-node")) == (tasks, asked)
    assert options["cpus-per-task"] == ("1" if program == "data" else "6")


def test_a_template_may_bring_arguments_of_its_own():
    given = Submission("pretrain", ("data.directory=d",), ClusterConfig(time="48:00:00"), "pretrain_xlarge")
    assert given.words() == ("--config", "xlarge", "data.directory=d")
    script = given.script()
    assert "\narguments=(--config xlarge data.directory=d)\n" in script
    assert template_options(script)["time"] == "48:00:00"
    check = Submission("preflight", ("--config", "base"), ClusterConfig(time="48:00:00"), "preflight")
    assert check.words() == ("--config", "base")
    assert template_options(check.script())["time"] == "00:10:00"


def test_options_of_sbatch_come_last_and_are_plain():
    cluster = ClusterConfig(time="24:00:00", sbatch_options=("--exclusive", "--switches=1"))
    script = submission(cluster=cluster, sbatch_options=("--time=02:00:00", "--mail-type=END")).script()
    options = template_options(script)
    assert (options["time"], options["switches"], options["mail-type"]) == ("02:00:00", "1", "END")
    assert options["exclusive"] is None
    for option in ("time=1", "--time=$(x)", "--a b", "--comment=a\n#SBATCH --uid=0"):
        with pytest.raises(UnsafeError, match="not of the form --NAME or --NAME=VALUE"):
            submission(sbatch_options=(option,)).script()


def test_an_array_is_two_jobs_and_the_last_one_makes_the_manifest():
    words = ("build", "--input", "a.txt", "--output", "d")
    array, last = submission(*words, program="data", array="64%8", after="7", ranks_per_node=4).jobs()
    options = template_options(array.script())
    assert (options["array"], options["dependency"]) == ("0-63%8", "afterok:7")
    assert options["output"] == "slurm-logs/%x-%A_%a.log"
    assert (options["nodes"], options["ntasks-per-node"]) == ("1", "4")
    options = template_options(last.script())
    assert not {"array", "dependency"} & set(options)
    assert (options["job-name"], last.arguments) == ("albert-data-manifest", words)
    assert submission(program="pretrain", nodes=4).jobs() == [submission(program="pretrain", nodes=4)]


@pytest.mark.parametrize(
    ("program", "words", "fields", "message"),
    [
        ("pretrain", "--config demo", {"array": "4"}, "--array: only 'data build' without --mpi"),
        ("data", "audit d", {"array": "4"}, "--array: only 'data build' without --mpi"),
        ("data", "build --mpi", {"array": "4"}, "--array: only 'data build' without --mpi"),
        ("data", "build", {"array": "0"}, "--array '0': give a number of tasks such as 64"),
        ("data", "build", {"array": "0-7"}, "--array '0-7': give a number of tasks such as 64"),
        ("data", "build", {"array": "4", "nodes": 2}, "each task of a job array has one node"),
        ("data", "build", {"nodes": 2}, "several nodes with 'build --mpi' or --array only"),
    ],
)
def test_what_cannot_be_divided_is_refused(program, words, fields, message):
    with pytest.raises(ConfigError) as caught:
        submission(*words.split(), program=program, **fields).jobs()
    assert message in str(caught.value)


def hostile_words(number: int) -> list[str]:
    generator = random.Random(number)
    length = generator.randint(0, 24)
    word = "".join(generator.choice(HOSTILE) for _ in range(length))
    return [generator.choice(["$(touch canary)", "`touch canary`", "'; touch canary; '", "", "-x"]) + word]


def test_ten_thousand_hostile_paths_arrive_literally_and_never_run(tmp_path):
    """Bash itself reads the settings and prints what it understood."""
    words = [word for number in range(10_000) for word in hostile_words(number)]
    cluster = ClusterConfig(
        environment={"HF_HOME": words[1]}, scratch=words[2], srun_options=tuple(words[3:5])
    )
    lines = setting_lines(cluster, words[0], words)
    program = "\n".join([*lines, 'printf \'%s\\0\' "$python" "$HF_HOME" "$TMPDIR" "${arguments[@]}"'])
    result = subprocess.run(
        ["bash", "-"], input=program.encode(), cwd=tmp_path, capture_output=True, check=True
    )
    assert result.stdout.decode().split("\0")[:-1] == [words[0], words[1], words[2], *words]
    assert list(tmp_path.iterdir()) == []


def test_ten_thousand_hostile_job_names_are_plain_or_refused():
    generator = random.Random(5)
    accepted = 0
    for _ in range(10_000):
        name = "".join(generator.choice(HOSTILE) for _ in range(generator.randint(0, 4)))
        try:
            accepted += checked_job_name(name) == name
        except UnsafeError:
            continue
        assert set(name) <= set(string.ascii_letters + string.digits + "._-")
        assert not name.startswith("-")
    assert 0 < accepted < 10_000


def test_a_script_with_hostile_arguments_passes_bash_and_shellcheck():
    words = [word for number in range(200) for word in hostile_words(number)]
    script = submission(*words, cluster=read_cluster(str(ROOT / "slurm/cluster.example.yaml"))).script()
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", "-"], input=script.encode(), capture_output=True, check=False)
    assert result.returncode == 0, result.stdout.decode()


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "a\rb", "\x1b[31m", "\x7f", "\x00", "\udcff"])
def test_control_characters_are_refused(text):
    with pytest.raises(UnsafeError, match="holds control characters, which a batch script does not carry"):
        quoted(text)


@pytest.mark.parametrize("value", ["a b", "a'b", "$(x)", "a;b", "#", "a\nb", "", "x" * 201])
def test_options_of_sbatch_are_plain_words(value):
    with pytest.raises(ConfigError, match="cluster"):
        ClusterConfigFile({"partition": value})


def ClusterConfigFile(fields: dict) -> ClusterConfig:  # noqa: N802
    import tempfile

    import yaml

    with tempfile.NamedTemporaryFile("w", suffix="cluster.yaml") as file:
        yaml.safe_dump(fields, file)
        file.flush()
        return read_cluster(file.name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partitions": "a"}, "partitions: unknown key; valid here: partition, account"),
        ({"gpus_per_node": -1}, "gpus_per_node: input should be greater than or equal to 0, got -1"),
        ({"environment": {"a b": "c"}}, "environment.a b"),
        ({"mpi": "x"}, "mpi: input should be 'pmi2', 'pmix' or 'none', got 'x'"),
    ],
)
def test_mistakes_of_a_cluster_file_name_file_and_key(fields, message):
    with pytest.raises(ConfigError) as caught:
        ClusterConfigFile(fields)
    assert message in str(caught.value)
    assert "cluster.yaml: " in str(caught.value)


def test_a_missing_cluster_file_or_template_is_named():
    with pytest.raises(MissingInputError, match=r"copy slurm/cluster.example.yaml and edit it"):
        read_cluster("/nowhere.yaml")
    with pytest.raises(MissingInputError, match=r"templates are data_prep, finetune, preflight, pretrain"):
        read_template("nowhere")
    with pytest.raises(ConfigError, match="not a template"):
        read_template(__file__.replace("test_launcher_slurm", "test_imports"))


def test_an_option_that_is_no_word_is_unsafe():
    with pytest.raises(UnsafeError, match="--comment"):
        render(read_template("pretrain"), {"comment": "a b"}, [])


@pytest.mark.parametrize("after", ["x", "12,13", "12:", "$(x)"])
def test_after_takes_job_ids_only(after):
    with pytest.raises(ConfigError, match="not job ids"):
        submission(after=after).script()


def entries(*pairs: tuple[int, int], signals: tuple[int, ...] = (10,)) -> list[dict]:
    return [{"exit_code": code, "step": step, "signals": list(signals)} for code, step in pairs]


@pytest.mark.parametrize(
    ("history", "refusal"),
    [
        (entries((0, 60)), "done"),
        (entries((75, 10)), None),
        (entries((76, -1)), None),
        (entries((65, 10)), "starting again would not help"),
        (entries((78, -1)), "starting again would not help"),
        (entries((75, 10), signals=()), "the run was told to stop at this step"),
        (entries((76, 10), (76, 10), (76, 10)), None),
        (entries((76, 10), (76, 10), (76, 10), (76, 10)), "no new checkpoint since step 10 in 3 restarts"),
        (entries((76, 10), (76, 10), (76, 10), (76, 20)), None),
        (entries((75, -1), (75, -1), (75, -1), (75, -1)), "no new checkpoint since step -1 in 3 restarts"),
        ([{**entries((78, -1))[0], "excluded": ["n1"]}], None),
        ([{**entries((78, 5))[0], "excluded": ["n1"]}] * 4, "no new checkpoint since step 5 in 3 restarts"),
        (entries((75, 5), (75, 10), (75, 15), (75, 20), (75, 25)), None),
    ],
)
def test_a_job_is_requeued_while_it_makes_progress(history, refusal):
    assert requeue_refusal(history) == refusal


def test_srun_in_a_container_uses_its_python_and_passes_the_environment():
    assert SlurmSettings().python == sys.executable
    assert SlurmSettings(srun_options=("--cpu-bind=cores",)).python == sys.executable
    assert SlurmSettings(srun_options=("--container-image=a.sqsh",)).python == "python3"
    assert SlurmSettings(rank_prefix=("apptainer", "exec", "a.sif")).python == "python3"
    assert SlurmSettings(srun_options=("-l",)).srun("--ntasks=1") == [
        "srun",
        "--export=ALL",
        "--ntasks=1",
        "-l",
    ]


def test_outside_a_batch_job_the_inside_command_says_so():
    with pytest.raises(ConfigError, match="SLURM_JOB_ID, SLURM_JOB_NODELIST, SLURM_NTASKS not set"):
        read_allocation({})


def test_srun_starts_one_task_per_rank_and_kills_none():
    allocation = Allocation(7, "a", 2, ("n1", "n2"), 16, 4)
    settings = SlurmSettings(srun_options=("--cpu-bind=cores",), rank_prefix=("apptainer", "exec", "a b.sif"))
    command = srun_command(Job("albert.pretrain", ("x",)), allocation, settings)
    options = ["--export=ALL", "--ntasks=16", "--cpus-per-task=4", "--kill-on-bad-exit=0", "--wait=0"]
    assert command[:6] == ["srun", *options]
    assert command[6:10] == ["--cpu-bind=cores", "apptainer", "exec", "a b.sif"]
    assert command[10:13] == ["python3", "-m", "launcher.rank"]
    again = Allocation(7, "a", 3, ("n1", "n2"), 16, 4)
    assert allocation.rendezvous.address == "n1"
    assert allocation.rendezvous.port != again.rendezvous.port


def test_dry_run_prints_the_script(monkeypatch, capsys):
    words = ["launcher", "slurm", "--dry-run", "--nodes", "2", "finetune", "--task", "a b", "--", "-n"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert f"arguments=({shlex.join(words[6:])})" in capsys.readouterr().out
