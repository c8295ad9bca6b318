"""Probes beside a pretraining: they give scores, and whatever happens to them harms nobody."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from albert import pretrain
from albert.config import ProbeConfig, load_run_config
from albert.errors import ConfigError, MissingInputError, run_command
from albert.probes import Probes, check_probe
from tests.ranks import Ranks
from tests.synthetic import TINY_MODEL, make_dataset
from tests.tiny_task import write_model, write_task

pytestmark = pytest.mark.multiprocess
_PATIENCE_S = 60.0


class _Log:
    def __init__(self) -> None:
        self.records: list[tuple[str, int, dict[str, float]]] = []
        self.events: list[tuple[int, str]] = []

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.records.append((kind, step, values))

    def event(self, step: int, message: str) -> None:
        self.events.append((step, message))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("probes")
    return write_task(directory / "data"), write_model(directory / "model")


def _config(data: Path, **changes) -> ProbeConfig:
    values = {
        "interval_steps": 10,
        "task": "lcqmc",
        "data": str(data),
        "num_steps": 120,
        "learning_rate": 3e-3,
    }
    return ProbeConfig(**{**values, "batch_size": 20, **changes})


def _wait(is_done, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _poll_until_silent(probes: Probes) -> None:
    def is_done() -> bool:
        probes.poll()
        return probes._process is None

    _wait(is_done, "the probe does not end")


def test_a_probe_gives_the_scores_of_its_checkpoint(inputs, tmp_path):
    data, model = inputs
    log = _Log()
    probes = Probes(_config(data), tmp_path, log)
    probes.begin(7, model)
    assert probes._process is None
    probes.begin(12, model)
    pid = probes._process.pid
    assert os.getsid(pid) == pid
    _wait(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19, "the probe keeps its priority")
    probes.begin(15, model)
    probes.begin(20, model)
    assert log.events == [(20, "probe skipped: that of step 12 still runs")]
    _poll_until_silent(probes)
    ((kind, step, values),) = log.records
    assert (kind, step) == ("probe", 12)
    assert values["accuracy"] > 0.9 > values["majority_accuracy"]
    assert sorted(path.name for path in (tmp_path / "probes" / "step-00000012").iterdir()) == [
        "config.yaml", "lock", "log.txt", "metrics.jsonl", "predictions-dev.jsonl", "results.json", "review-dev.md",
    ]  # fmt: skip
    again = Probes(_config(data), tmp_path, log)
    again.begin(14, model)
    assert again._process is None


def test_a_probe_that_fails_is_an_event(inputs, tmp_path):
    log = _Log()
    probes = Probes(_config(tmp_path / "nowhere"), tmp_path, log)
    probes.begin(10, inputs[1])
    _poll_until_silent(probes)
    message = f"probe failed: exit code 66: error: --data-dir {tmp_path / 'nowhere'}: no such directory"
    assert (log.records, log.events) == ([], [(10, message)])
    (tmp_path / "probes").rename(tmp_path / "moved")
    (tmp_path / "probes").write_text("a file")
    probes.begin(20, inputs[1])
    assert log.events[1][1].startswith("probe not started: ")


def test_closing_ends_a_probe_and_lets_none_begin(inputs, tmp_path):
    log = _Log()
    probes = Probes(_config(inputs[0]), tmp_path, log)
    probes.begin(10, inputs[1])
    pid = probes._process.pid
    probes.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    probes.begin(20, inputs[1])
    probes.close()
    assert log.events == [(10, "probe ended with the training, before it had a score")]


def _begin_and_wait(pipe, config: ProbeConfig, model: Path, directory: Path) -> None:
    probes = Probes(config, directory, _Log())
    probes.begin(10, model)
    pipe.send(probes._process.pid)
    time.sleep(_PATIENCE_S)


def test_a_probe_dies_with_a_training_that_is_killed(inputs, tmp_path):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, _config(inputs[0], num_steps=100_000), inputs[1], tmp_path)
    training = context.Process(target=_begin_and_wait, args=arguments)
    training.start()
    pid = receiver.recv()
    _wait(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19, "the probe does not begin")
    time.sleep(0.2)  # the next thing it does is to bind itself to its parent
    os.kill(training.pid, signal.SIGKILL)
    training.join()
    _wait(lambda: not Path(f"/proc/{pid}/cmdline").is_file() or not Path(f"/proc/{pid}/cmdline").read_bytes(),
          "the probe outlives its training")  # fmt: skip


def _pretrain(overrides: list[str]) -> int:
    sys.argv = ["pretrain", "--config", "demo", *overrides]
    return run_command(pretrain._main)


def _start(inputs, directory: Path, ranks: int, *overrides: str) -> Ranks:
    """A pretraining whose second checkpoint is the first one that is probed."""
    make_dataset(directory / "shards")
    model = [f"model.{key}={value}" for key, value in TINY_MODEL.items()]
    common = [
        *model, f"data.directory={directory}/shards", f"train.output_dir={directory}/run", "train.num_steps=11",
        "train.global_batch_size=4", "train.micro_batch_size=2", "schedule.warmup_steps=1", "eval.interval_steps=0",
        "checkpoint.interval_steps=3", "checkpoint.asynchronous=false", "log.interval_steps=1",
        "log.tensorboard=false", "deepspeed.config=zero0", "probe.interval_steps=5", "probe.task=lcqmc",
        f"probe.data={inputs[0]}",
    ]  # fmt: skip
    return Ranks(ranks, _pretrain, [*common, *overrides])


def _lines(directory: Path) -> list[dict]:
    path = directory / "run" / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _told(directory: Path) -> list[str]:
    return [line["message"] for line in _lines(directory) if "probe" in line.get("message", "")]


_ENDED = "probe ended with the training, before it had a score"


def _awaited(step: int) -> str:
    return f"the training is done; waiting for the probe of step {step}, a signal ends it"


def test_a_pretraining_that_is_done_waits_for_the_probe_of_its_last_checkpoint(inputs, tmp_path):
    ranks = _start(inputs, tmp_path, 2, "probe.num_steps=2", "train.hang_timeout_s=3")
    assert ranks.results() == [0, 0]
    told = _told(tmp_path)
    assert told[-1] == _awaited(11)
    assert set(told) <= {_awaited(6), _awaited(11)}
    probed = [
        (line["step"], 0 < line["accuracy"] < 1) for line in _lines(tmp_path) if line["kind"] == "probe"
    ]
    assert probed == [(6, True), (11, True)]


def test_a_signal_ends_the_wait_for_a_probe(inputs, tmp_path):
    ranks = _start(inputs, tmp_path, 2, "probe.num_steps=1000000")
    _wait(lambda: _awaited(6) in _told(tmp_path), "the training does not wait")
    assert (tmp_path / "run" / "model").is_dir()
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.results(timeout_s=20) == [0, 0]
    assert _told(tmp_path) == [_awaited(6), _ENDED]


def test_a_pretraining_that_is_stopped_does_not_wait(inputs, tmp_path):
    ranks = _start(inputs, tmp_path, 1, "probe.num_steps=1000000", "train.num_steps=1000000")
    _wait((tmp_path / "run" / "probes").is_dir, "no probe")
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.results(timeout_s=20) == [75]
    assert _told(tmp_path)[-1] == _ENDED


def test_a_probe_that_could_never_run_is_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"probe.interval_steps \(5\) needs probe.task and probe.data"):
        load_run_config("demo", ["probe.interval_steps=5"])
    with pytest.raises(ConfigError, match=r"probe.task: --task 'nothing' is not known"):
        check_probe(_config(tmp_path, task="nothing"))
    with pytest.raises(MissingInputError, match=r"probe.data: .*: no train file of lcqmc"):
        check_probe(_config(tmp_path))
    check_probe(_config(tmp_path, interval_steps=0))
    check_probe(_config(inputs[0]))
