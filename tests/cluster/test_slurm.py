"""Jobs on a real Slurm with two nodes: the templates, requeue and resume, lost ranks and nodes."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machines import wait_until
from slurm_cluster import SlurmCluster, tail

ROOT = Path(__file__).parents[2]
MODEL = shlex.split(
    "model.vocab_size=600 model.embedding_size=16 model.hidden_size=32 model.num_hidden_layers=2 "
    "model.num_attention_heads=2 model.intermediate_size=64 model.hidden_dropout_prob=0.1"
)
TRAIN = shlex.split(
    "train.global_batch_size=16 train.micro_batch_size=4 schedule.warmup_steps=4 eval.interval_steps=0 "
    "log.interval_steps=1 log.progress=off log.tensorboard=false train.peer_timeout_s=60"
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


class Site:
    """A directory from which jobs are submitted, as a user does."""

    def __init__(self, cluster: SlurmCluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        (directory / "cluster.yaml").write_text(
            "partition: main\ngpus_per_node: 0\ncpus_per_task: 1\ntime: '5'\nsignal_before_end_s: 30\n"
            "environment: {OMP_NUM_THREADS: '1', DS_ACCELERATOR: cpu}\n"
        )

    def launch(self, *words: str) -> str:
        command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "launcher", *words]
        return self.cluster.machines.run("ctl", *command, cwd=self.directory)

    def submit(self, *words: str, preflight: bool = False) -> int:
        options = ["--cluster", "cluster.yaml", *([] if preflight else ["--no-preflight"])]
        return int(self.launch("slurm", *options, *words).splitlines()[-1])

    def log(self, job_id: int, lines: int = 60) -> str:
        return tail(next(self.directory.glob(f"slurm-logs/*-{job_id}.log")), lines)

    def history(self, job_id: int) -> list[dict]:
        """One entry for each allocation of a job that has ended."""
        paths = self.directory.glob(f"slurm-logs/*-{job_id}/history.jsonl")
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]

    def wait_done(self, job_id: int, timeout_s: float = 150) -> dict[str, str]:
        fields = self.cluster.wait_for_state(
            job_id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout_s=timeout_s
        )
        assert fields["JobState"] == "COMPLETED", self.log(job_id)
        return fields

    def wait_for_step(self, run: str, step: int, timeout_s: float = 180) -> None:
        try:
            wait_until(
                lambda: max(steps(self.directory / run), default=0) >= step, timeout_s, f"no step {step}"
            )
        except AssertionError as error:
            logs = sorted(self.directory.glob("slurm-logs/*.log"))
            raise AssertionError("\n".join([f"{run}: {error}", *map(tail, logs)])) from None


def steps(run: Path) -> dict[int, float]:
    """Loss of every step that was logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def trained_steps(run: Path) -> list[int]:
    """Steps in the order in which they were done, repeated ones repeatedly."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "train"]


@pytest.fixture
def site(slurm, tmp_path) -> Site:
    return Site(slurm, tmp_path)


@pytest.fixture(scope="session")
def shards(slurm, text, tokenizer, tmp_path_factory) -> Path:
    """A dataset built by an MPI job from the template, submitted by hand."""
    directory = tmp_path_factory.mktemp("shards")
    (directory / "slurm-logs").mkdir()
    build = ["build", "--mpi", "--input", text, "--tokenizer", tokenizer, "--output", directory / "data"]
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=2", "--time=5"]
    settings = ["--max-seq-length", "32", "--eval-fraction", "0.1"]
    slurm.machines.variables["PYTHONPATH"] = str(ROOT)
    template = slurm_template(directory, "data_prep", "--srun-option=--slurmd-debug=debug2")
    answer = slurm.machines.run("ctl", "sbatch", *options, template, *build, *settings, cwd=directory)
    site = Site(slurm, directory)
    site.wait_done(int(answer))
    return directory / "data"


def slurm_template(directory: Path, name: str, *options: str) -> Path:
    """A template as somebody edits it by hand: only the interpreter and options of the job are changed."""
    text = (ROOT / f"slurm/{name}.sbatch").read_text()
    text = re.sub(r"^python=python3$", f"python={sys.executable}", text, flags=re.MULTILINE)
    path = directory / f"{name}.sbatch"
    path.write_text(text.replace("\njob_options=()\n", f"\njob_options=({' '.join(options)})\n"))
    return path


def pretrain(run: str, shards: Path, num_steps: int = 60) -> list[str]:
    paths = [f"data.directory={shards}", f"train.output_dir={run}", f"train.num_steps={num_steps}"]
    return ["--config", "demo", *paths, *MODEL, *TRAIN, "checkpoint.interval_steps=1000"]


@pytest.fixture(scope="session")
def straight(slurm, shards, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    site = Site(slurm, tmp_path_factory.mktemp("straight"))
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *pretrain("run", shards))
    site.wait_done(job)
    return site.directory / "run"


def assert_same_run(run: Path, straight: Path) -> None:
    """Bitwise: every loss that was logged, and the final weights."""
    assert steps(run) == steps(straight)
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (straight / name).read_bytes()


def finetune_data(directory: Path) -> Path:
    directory.mkdir()
    rows = [
        f"the {word} is {state}\tthe {other} is {state}\t{int(word == other)}"
        for word, other, state in _pairs()
    ]
    for split in ("train", "dev"):
        (directory / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return directory


def _pairs() -> list[tuple[str, str, str]]:
    words, states = ("file", "path", "logger", "parser"), ("open", "closed", "new")
    return [(word, other, state) for word in words for other in words for state in states]


def test_mpi_ranks_say_where_they_are_in_short_requests(shards):
    """Slurm's pmi2 reads 1024 bytes of a request, with a key and its value; the log has the values in its answers."""
    (log,) = shards.parent.glob("slurm-logs/*.log")
    text = log.read_text()
    assert text.count("cmd=barrier_out") >= 4  # it is the log in which they would be
    values = re.findall(r"cmd=get_result rc=0 value=(\S+)", text)
    assert len(values) >= 4
    assert max(map(len, values)) < 100


def test_data_pretrain_requeue_resume_finetune_as_one_chain(site, text, tokenizer, straight):
    build = ["build", "--mpi", "--input", str(text), "--tokenizer", str(tokenizer), "--output", "data"]
    build += ["--max-seq-length", "32", "--eval-fraction", "0.1"]
    two = ["--nodes", "2", "--ranks-per-node"]
    data = site.submit(*two, "2", "--hold", "data", *build)
    words = [*two, "1", "--after", str(data), "pretrain", *pretrain("run", Path("data"))]
    pretraining = site.submit(*words, preflight=True)
    pairs = finetune_data(site.directory / "pairs")
    tuned = shlex.split(
        f"--task lcqmc --data-dir {pairs} --model run/model --output tuned --do-train --do-eval "
        "--max-steps 4 --batch-size 8 --max-seq-length 32 --device cpu --progress off"
    )
    fine_tuning = site.submit("--after", str(pretraining), "finetune", *tuned)
    waiting = site.launch("slurm", "status").splitlines()
    assert [line.split()[:3] for line in sorted(waiting[1:])] == [
        [str(data), "albert-data", "PENDING"],
        [str(pretraining), "albert-pretrain", "PENDING"],
        [str(fine_tuning), "albert-finetune", "PENDING"],
    ]
    site.cluster.machines.run("ctl", "scontrol", "release", str(data))
    site.wait_for_step("run", 10)
    site.cluster.machines.run("ctl", "scontrol", "requeue", str(pretraining))
    for job in (data, pretraining, fine_tuning):
        site.wait_done(job)
    assert [entry["exit_code"] for entry in site.history(pretraining)] == [75, 0]
    assert_same_run(site.directory / "run", straight)
    for line in ("2 ranks on node1, node2: ", "all-reduce of 16 MiB: ", "all checks passed in "):
        assert site.log(pretraining, 1000).count(f"preflight: {line}") == 2  # in both allocations
    assert json.loads((site.directory / "tuned/results.json").read_text())
    row = site.launch("slurm", "status", str(pretraining)).splitlines()[1].split()
    assert row[:4] == [str(pretraining), "albert-pretrain", "COMPLETED", "60"]
    assert row[6] == "1"
    restarts = sorted(site.directory.glob(f"slurm-logs/albert-pretrain-{pretraining}/restart-*/rank-1.log"))
    assert len(restarts) == 2


def test_a_job_array_makes_the_bytes_of_a_single_build(site, text, tokenizer):
    inputs = [site.directory / f"text-{number}.txt" for number in range(3)]
    for number, path in enumerate(inputs):
        path.write_text(f"{number} " + text.read_text() * (1 + (1 << 20) // text.stat().st_size))
    words = ["build", "--tokenizer", str(tokenizer), "--max-seq-length", "32", "--input", *map(str, inputs)]
    last = site.submit("--array", "2", "--ranks-per-node", "1", "data", *words, "--output", "array")
    whole = [
        sys.executable,
        "-m",
        "data_prep",
        *words,
        "--output",
        site.directory / "whole",
        "--workers",
        "1",
    ]
    subprocess.run(whole, cwd=ROOT, check=True, capture_output=True)
    site.wait_done(last)
    (array,) = site.directory.glob("slurm-logs/albert-data-[0-9]*/job.json")
    number = json.loads(array.read_text())["job_id"]
    logs = [site.directory / f"slurm-logs/albert-data-{number}_{task}.log" for task in range(2)]
    for task, log in enumerate(logs):
        assert f"array: part {task}/2 is done" in log.read_text()
    files = [path for path in (site.directory / "whole").rglob("*") if path.is_file()]
    assert len(list((site.directory / "whole").glob("train-*.tar"))) >= 3
    for path in files:
        assert (
            path.read_bytes()
            == (site.directory / "array" / path.relative_to(site.directory / "whole")).read_bytes()
        )
    assert not (site.directory / "array/.build").exists()
    rows = [line.split()[:3] for line in site.launch("slurm", "status").splitlines()[1:]]
    assert sorted(rows) == [
        [str(number), "albert-data", "COMPLETED"],
        [str(last), "albert-data-manifest", "COMPLETED"],
    ]


@pytest.fixture
def bad_node2(site, request):
    """node2 has other code, which all ranks find together, or lacks an interface, which it finds alone."""
    run, code = site.cluster.machines.run, ROOT / "albert/flops.py"
    if request.param == "code":
        other = site.directory / "flops.py"
        other.write_text(code.read_text() + "\n")
        run("node2", "mount", "--bind", other, code)
        yield "different code (hash "
        run("node2", "umount", code, check=False)
        return
    for name in ("node1", "node3"):
        run(name, "ip", "link", "add", "ib0", "type", "bridge")
    settings = site.directory / "cluster.yaml"
    settings.write_text(settings.read_text().replace("{OMP", "{NCCL_SOCKET_IFNAME: ib0, OMP"))
    yield "NCCL_SOCKET_IFNAME: no network interface 'ib0'; there are eth0, lo"
    for name in ("node1", "node3"):
        run(name, "ip", "link", "del", "ib0", check=False)


@pytest.mark.slow
@pytest.mark.parametrize("bad_node2", ["code", "interface"], indirect=True)
def test_a_bad_node_is_named_and_left_out_when_the_job_is_requeued(site, shards, straight, bad_node2):
    words = ["--nodes", "2", "--ranks-per-node", "1", "pretrain", *pretrain("run", shards)]
    job = site.submit(*words, preflight=True)
    fields = site.wait_done(job, 300)
    first, second = site.history(job)
    assert (first["exit_code"], first["excluded"]) == (78, ["node2"])
    assert first["cause"].startswith(f"preflight: node2: {bad_node2}")
    assert f"launcher: {first['cause']}\nlauncher: requeued without node2\n" in site.log(job, 1000)
    assert (fields["ExcNodeList"], fields["Restarts"]) == ("node2", "1")
    assert (second["exit_code"], second["hosts"]) == (0, ["node1", "node3"])
    assert steps(site.directory / "run") == steps(straight)


@pytest.mark.slow
def test_the_warning_before_the_time_limit_commits_and_requeues(site, shards, straight):
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *pretrain("run", shards))
    site.wait_for_step("run", 8)
    site.cluster.machines.run("ctl", "scancel", "--signal=USR1", "--batch", str(job))
    site.wait_done(job)
    first, second = site.history(job)
    assert (first["exit_code"], second["exit_code"]) == (75, 0)
    assert first["step"] >= 8
    assert "resumed on 2 ranks" in (site.directory / "run/metrics.jsonl").read_text()
    assert_same_run(site.directory / "run", straight)
    assert "launcher: requeued; goes on from the last committed checkpoint" in site.log(job)


def test_a_killed_rank_is_named_and_the_job_goes_on(site, shards, straight):
    words = pretrain("run", shards)
    words[words.index("checkpoint.interval_steps=1000")] = "checkpoint.interval_steps=5"
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *words)
    site.wait_for_step("run", 8)
    record = next(site.directory.glob(f"slurm-logs/*-{job}/restart-0/rank-1.started.json"))
    site.cluster.machines.run("node2", "kill", "-9", str(json.loads(record.read_text())["child"]))
    began_at = time.monotonic()
    wait_until(
        lambda: list(site.directory.glob(f"slurm-logs/*-{job}/history.jsonl")), 60, "no end was recorded"
    )
    assert time.monotonic() - began_at < 60
    site.wait_done(job)
    first = site.history(job)[0]
    assert first["exit_code"] == 76
    assert first["cause"].startswith("rank 1 on node2 was killed by SIGKILL")
    assert first["step"] >= 5
    assert steps(site.directory / "run") == steps(straight)


def reach_the_time_limit(site: Site, job: int) -> None:
    """Bring the end of the allocation so near that Slurm sends its warning, 30 s before."""
    hours, minutes, seconds = map(int, site.cluster.job(job)["RunTime"].split(":"))
    limit = (60 * (60 * hours + minutes) + seconds + 35) // 60 + 1
    site.cluster.machines.run("ctl", "scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


MIXED = [
    lambda site, job: site.cluster.machines.run("ctl", "scontrol", "requeue", str(job)),
    lambda site, job: site.cluster.machines.run("ctl", "scancel", "--signal=USR1", "--batch", str(job)),
    lambda site, job: site.cluster.machines.run("ctl", "scancel", "--signal=TERM", f"{job}.0"),
    reach_the_time_limit,
]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_requeues_in_a_row_repeat_and_lose_nothing(site, shards):
    two = ["--nodes", "2", "--ranks-per-node", "1"]
    job = site.submit(*two, "pretrain", *pretrain("run", shards, 1_000_000))
    committed = 0
    for number in range(10):
        site.wait_for_step("run", committed + 3)
        MIXED[number % len(MIXED)](site, job)
        wait_until(
            lambda done=number: len(site.history(job)) > done, 150, f"requeue {number} was not recorded"
        )
        committed = site.history(job)[-1]["step"]
        site.cluster.machines.run("ctl", "scontrol", "update", f"JobId={job}", "TimeLimit=10")
    site.wait_for_step("run", committed + 3)
    site.cluster.machines.run("ctl", "scancel", str(job))
    site.cluster.wait_for_state(job, "CANCELLED")
    history = site.history(job)
    assert [(entry["exit_code"], entry["cause"]) for entry in history] == [(75, None)] * 11
    last = history[-1]["step"]
    assert trained_steps(site.directory / "run") == list(
        range(1, last + 1)
    )  # none was done twice, none left out
    words = [*pretrain("straight", shards, 1_000_000), f"train.stop_after_steps={last}"]
    straight = site.submit(*two, "pretrain", *words)
    site.cluster.wait_for_state(straight, "FAILED", timeout_s=400)
    assert [entry["exit_code"] for entry in site.history(straight)] == [75]
    assert steps(site.directory / "run") == steps(site.directory / "straight")
    for path in (site.directory / f"straight/checkpoints/step-{last:08d}").glob("*.safetensors"):
        assert (
            path.read_bytes()
            == (site.directory / "run/checkpoints" / path.parent.name / path.name).read_bytes()
        )


@pytest.mark.slow
def test_a_real_time_limit_is_survived(site, shards, straight):
    text = (site.directory / "cluster.yaml").read_text()
    (site.directory / "cluster.yaml").write_text(text.replace("time: '5'", "time: '1'"))
    words = [*pretrain("run", shards, 3000), "schedule.warmup_steps=4"]
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *words)
    wait_until(
        lambda: list(site.directory.glob(f"slurm-logs/*-{job}/history.jsonl")), 120, "no time limit came"
    )
    first = site.history(job)[0]
    assert first["exit_code"] == 75
    assert int(signal.SIGUSR1) in first["signals"]
    site.wait_for_step("run", first["step"] + 1)
    site.cluster.machines.run("ctl", "scancel", str(job))
    site.cluster.wait_for_state(job, "CANCELLED")
    trained = trained_steps(site.directory / "run")
    assert trained == list(range(1, len(trained) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["power", "cable"])
def test_a_lost_node_requeues_the_job_and_the_run_goes_on(site, shards, straight, fault):
    words = pretrain("run", shards)
    words[words.index("checkpoint.interval_steps=1000")] = "checkpoint.interval_steps=5"
    words[words.index("train.peer_timeout_s=60")] = "train.peer_timeout_s=20"
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *words)
    site.wait_for_step("run", 8)
    began_at = time.monotonic()
    machines = site.cluster.machines
    machines.power_off("node2") if fault == "power" else machines.unplug("node2")
    wait_until(
        lambda: site.cluster.job(job)["JobState"] in ("PENDING", "COMPLETING"),
        90,
        "the job was not requeued",
        0.5,
    )
    assert time.monotonic() - began_at < 60
    if fault == "power":
        machines.boot("node2")
        site.cluster.start_node("node2")
    else:
        machines.plug("node2")
    site.cluster.wait_for_nodes()
    site.wait_done(job, 240)
    # Slurm says so, or the other rank was faster.
    causes = ("NODE FAILURE", "are allowed (train.hang_timeout_s)", "another rank died")
    assert any(cause in site.log(job, 1000) for cause in causes)
    assert steps(site.directory / "run") == steps(straight)


@pytest.mark.slow
def test_a_killed_slurmd_requeues_the_job_and_the_run_goes_on(site, shards):
    """Its ranks stay alive, unseen by Slurm, until they lose those that Slurm ended."""
    words = pretrain("run", shards, 1_000_000)
    words[words.index("checkpoint.interval_steps=1000")] = "checkpoint.interval_steps=20"
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *words)
    site.wait_for_step("run", 30)
    (host,) = re.findall(r"2 ranks on node\d, (node\d)", site.log(job, 1000))
    site.cluster.machines.run(host, "bash", "-c", "kill -9 $(cat /run/slurmd.pid)")
    began_at = time.monotonic()
    wait_until(lambda: site.cluster.job(job)["Restarts"] == "1", 90, "the job was not requeued", 0.5)
    assert time.monotonic() - began_at < 60
    assert "NODE FAILURE" in site.log(job, 1000)
    site.cluster.start_node(host)
    site.cluster.wait_for_nodes()
    metrics = site.directory / "run/metrics.jsonl"
    wait_until(lambda: "resumed on 2 ranks" in metrics.read_text(), 120, "the run was not resumed", 0.5)
    site.wait_for_step("run", max(steps(site.directory / "run")) + 10)
    site.cluster.machines.run("ctl", "scancel", str(job))
    site.cluster.wait_for_state(job, "CANCELLED")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = {(record["step"], record["loss"]) for record in records if record["kind"] == "train"}
    assert sorted(step for step, _ in losses) == list(
        range(1, len(losses) + 1)
    )  # repeated steps are the same


def test_a_cancelled_job_commits_and_does_not_come_back(site, shards):
    job = site.submit("--nodes", "2", "--ranks-per-node", "1", "pretrain", *pretrain("run", shards, 5000))
    site.wait_for_step("run", 5)
    site.cluster.machines.run("ctl", "scancel", str(job))
    site.cluster.wait_for_state(job, "CANCELLED")
    assert (site.directory / "run/checkpoints/latest").exists()
    time.sleep(2)
    assert site.cluster.job(job)["JobState"] == "CANCELLED"


def test_mistakes_are_found_before_submitting(site, shards):
    (site.directory / "cluster.yaml").write_text("partition: nowhere\ngpus_per_node: 0\n")
    with pytest.raises(AssertionError, match=r"error: sbatch refused: .*[Ii]nvalid partition"):
        site.submit("--ranks-per-node", "1", "pretrain", *pretrain("run", shards))
    (site.directory / "cluster.yaml").write_text("gpus_per_node: 0\n")
    with pytest.raises(AssertionError, match=r"x world_size \(3\)"):
        site.submit("--nodes", "3", "--ranks-per-node", "1", "pretrain", *pretrain("run", shards))


def test_hostile_arguments_reach_the_program_literally(site):
    words = [
        "--task",
        "a b",
        "--x=$(touch canary)",
        "`touch canary`",
        "; touch canary",
        "'",
        '"',
        "\\",
        "é漢",
        "*",
    ]
    job = site.submit("finetune", *words)
    site.cluster.wait_for_state(job, "FAILED")
    assert "unrecognized arguments: " + " ".join(words[2:]) in site.log(job)
    assert not list(site.directory.rglob("canary"))
