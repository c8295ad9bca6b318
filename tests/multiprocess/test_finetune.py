"""Fine-tuning end to end on a tiny task: it learns, keeps the best weights, and ranks do not change it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from albert.distributed import close_world, init_world
from albert.errors import ConfigError, DataError, MissingInputError
from albert.finetune.predict import predict_lines
from albert.finetune.preparation import prepare
from albert.finetune.request import Request
from albert.finetune.run import run_once
from albert.finetune.settings import settings_for
from albert.finetune.sweep import run_sweep
from albert.finetune.task_definition import Recipe, Task
from albert.finetune.tasks import find_task
from albert.pretrained import load_pretrained
from albert.stopping import StopRequest
from albert.watchdog import Watchdog
from tests.ranks import run_ranks
from tests.tiny_task import LETTERS, MODEL, write_model, write_task

pytestmark = pytest.mark.multiprocess
_ROOT = Path(__file__).resolve().parents[2]

_QUICK = {"learning_rate": 3e-3, "batch_size": 20, "epochs": 6.0, "progress": "off", "tensorboard": False}


def _finetune(request: Request) -> dict:
    task = find_task(request.task)
    settings = settings_for(task, request.overrides)
    prepared = prepare(request, task, settings)
    world = init_world("cpu", 60.0)
    try:
        watchdog = Watchdog(world, 0.0, 60.0)
        return run_once(prepared, request, settings, Path(request.output), world, StopRequest(), watchdog)
    finally:
        close_world()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finetune")
    return write_task(directory / "data"), write_model(directory / "pretrained")


def _request(inputs, output, **changes):
    data, model = inputs
    values = {"task": "lcqmc", "data_dir": str(data), "model": str(model), "output": str(output)}
    actions = {"do_train": True, "do_eval": True, "do_test": True}
    return Request(**{**values, **actions, "overrides": _QUICK, **changes})


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    return output, run_ranks(1, _finetune, _request(inputs, output))[0]


def _losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_tiny_model_learns_the_task(trained):
    _, results = trained
    for split in ("dev", "test"):
        scores = results["splits"][split]
        assert scores["majority_accuracy"] < 0.65
        assert scores["accuracy"] > 0.95
    assert results["training"]["steps"] == 120
    assert not results["training"]["collapsed"]


def test_multiple_choice_leaves_the_upload_of_clue(inputs, tmp_path):
    def entries(count: int, **more) -> list:
        questions = [{"question": "a 1", "choice": ["b", "c 2", "d"], **more, "id": n} for n in range(count)]
        return [[["a b", "c"], [question], "1-1"] for question in questions]

    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("m-train", entries(8, answer="d")), ("test1.0", entries(3))):
        (data / f"{name}.json").write_text(json.dumps(rows))
    request = Request(
        "c3", str(data), str(inputs[1]), str(tmp_path / "run"), do_train=True, do_predict=True,
        overrides={"max_steps": 1, "warmup_steps": 0, "progress": "off", "tensorboard": False, "batch_size": 8},
    )  # fmt: skip
    run_ranks(1, _finetune, request)
    lines = (tmp_path / "run" / "predictions-test.jsonl").read_text().splitlines()
    chosen = [json.loads(line)["prediction"] for line in lines]
    assert len(chosen) == 3
    expected = "".join(f'{{"id": {number}, "label": {choice}}}\n' for number, choice in enumerate(chosen))
    assert (tmp_path / "run" / "c310_predict.json").read_text() == expected


def test_the_run_leaves_a_model_results_and_predictions(trained, inputs):
    output, results = trained
    written = json.loads((output / "results.json").read_bytes())
    assert written["splits"] == results["splits"]
    assert written["labels"] == ["0", "1"]
    assert written["data"]["train"]["examples"] == 400
    config, state, tokenizer = load_pretrained(output / "model")
    assert config == MODEL
    assert state["classifier.weight"].shape == (2, 32)
    assert not any(name.startswith("predictions.") for name in state)
    assert tokenizer.read_bytes() == (inputs[1] / "vocab.txt").read_bytes()
    card = json.loads((output / "model" / "task.json").read_bytes())
    assert (card["task"], card["labels"], card["metric"]) == ("lcqmc", ["0", "1"], "accuracy")
    predictions = [json.loads(line) for line in (output / "predictions-test.jsonl").read_text().splitlines()]
    right = sum(p["prediction"] == p["label"] for p in predictions) / len(predictions)
    assert right == results["splits"]["test"]["accuracy"]


def test_the_best_weights_are_kept_not_the_last(trained):
    _, results = trained
    training = results["training"]
    best = max(training["history"], key=lambda metrics: metrics["accuracy"])
    assert training["best_step"] == best["step"]
    assert results["splits"]["dev"]["accuracy"] == training["best_score"] == best["accuracy"]


def test_a_fine_tuned_model_is_evaluated_again_without_training(trained, inputs, tmp_path):
    output, results = trained
    changes = {"model": str(output), "do_train": False, "do_eval": False, "do_predict": True}
    again = run_ranks(2, _finetune, _request(inputs, tmp_path, **changes))
    assert again[0]["splits"]["test"] == again[1]["splits"]["test"] == results["splits"]["test"]
    assert again[0]["fresh_parameters"] == []


def test_two_ranks_and_micro_batches_give_the_losses_of_one(inputs, tmp_path):
    quick = {**_QUICK, "epochs": 1.0, "log_interval_steps": 1, "max_grad_norm": 1.0}
    runs = {}
    for name, ranks, extra in (
        ("one", 1, {}),
        ("accumulated", 1, {"micro_batch_size": 5, "deepspeed": "zero2"}),
        ("two", 2, {"micro_batch_size": 5}),
        ("zero3", 2, {"deepspeed": "zero3"}),
    ):
        request = _request(inputs, tmp_path / name, overrides={**quick, **extra}, do_test=False)
        results = run_ranks(ranks, _finetune, request)
        assert len({json.dumps(result["splits"]) for result in results}) == 1
        runs[name] = (_losses(tmp_path / name), load_pretrained(tmp_path / name / "model")[1])
    losses, weights = runs["one"]
    assert len(losses) == 20
    for other_losses, other_weights in runs.values():
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_early_stopping_ends_the_run(inputs, tmp_path):
    frozen = {**_QUICK, "learning_rate": 1e-12, "early_stopping": 2, "eval_interval_steps": 2}
    results = run_ranks(1, _finetune, _request(inputs, tmp_path, overrides=frozen))[0]
    training = results["training"]
    assert (training["steps"], training["best_step"], training["stopped_early"]) == (6, 2, True)


def test_a_collapsed_run_says_so_and_names_cures(inputs, tmp_path):
    frozen = {**_QUICK, "learning_rate": 1e-12, "epochs": 0.1, "warmup_steps": 0, "dropout": 0.1}
    results = run_ranks(1, _finetune, _request(inputs, tmp_path, overrides=frozen))[0]
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    messages = [event["message"] for event in events if event["kind"] == "event"]
    assert results["training"]["collapsed"]
    assert len(messages) == 1
    for part in (
        "every dev example is answered",
        "lower --learning-rate than 1e-12",
        "--warmup-steps",
        "--dropout 0",
    ):
        assert part in messages[0]


def _prepare_error(request: Request) -> str:
    task = find_task(request.task)
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare(request, task, settings_for(task, request.overrides))
    return f"{caught.value.exit_code} {caught.value}"


def test_what_does_not_fit_together_is_refused(inputs, trained, tmp_path):
    _, model = inputs
    only_eval = {"do_train": False, "do_test": False}
    message = _prepare_error(_request(inputs, tmp_path, **only_eval))
    assert message.startswith("78 --model")
    assert "has no task's head, so it cannot answer lcqmc; add --do-train" in message
    (tmp_path / "vocab.txt").write_text((model / "vocab.txt").read_text() + "extra\n")
    message = _prepare_error(_request(inputs, tmp_path, tokenizer=str(tmp_path / "vocab.txt")))
    assert message.startswith("78 --tokenizer")
    assert "which the model was made with" in message
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    shutil.copy(tmp_path / "vocab.txt", bare / "vocab.txt")
    message = _prepare_error(_request(inputs, tmp_path, model=str(bare)))
    assert message.startswith("78")
    assert f"has {MODEL.vocab_size + 1} entries" in message
    (bare / "vocab.txt").unlink()
    with pytest.raises(
        MissingInputError, match=r"no spiece.model or vocab.txt there; name one with --tokenizer"
    ):
        prepare(
            _request(inputs, tmp_path, model=str(bare)),
            find_task("lcqmc"),
            settings_for(find_task("lcqmc"), {}),
        )
    long = {**_QUICK, "max_seq_length": 64}
    assert "--max-seq-length (64) exceeds" in _prepare_error(_request(inputs, tmp_path, overrides=long))
    other = {"task": "rte", "model": str(trained[0] / "model"), **only_eval}
    header = "index\tsentence1\tsentence2\tlabel\n"
    rows = "".join(f"{n}\t{c}\t{c}\tentailment\n" for n, c in enumerate(LETTERS))
    (tmp_path / "dev.tsv").write_text(header + rows)
    message = _prepare_error(_request(inputs, tmp_path, **other, data_dir=str(tmp_path)))
    assert "was fine-tuned on lcqmc (0, 1), so it cannot answer rte" in message
    (tmp_path / "train.tsv").write_text(header + rows)
    message = _prepare_error(_request(inputs, tmp_path, task="rte", data_dir=str(tmp_path)))
    assert message.startswith("65")
    assert "every label is 'entailment'; a classifier needs at least two classes" in message


def test_prediction_serves_json_lines(trained, inputs):
    output, _ = trained
    rows = [line.split("\t") for line in (inputs[0] / "test.tsv").read_text().splitlines()]
    lines = "".join(
        json.dumps({"id": n, "text_a": a, "text_b": b}) + "\n" for n, (a, b, _) in enumerate(rows)
    )
    command = [sys.executable, "-m", "albert.finetune", "predict", "--model", str(output)]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=_ROOT, check=False)
    assert result.returncode == 0, result.stderr
    served = [json.loads(line) for line in result.stdout.splitlines()]
    stored = [json.loads(line) for line in (output / "predictions-test.jsonl").read_text().splitlines()]
    assert [p["prediction"] for p in served] == [p["prediction"] for p in stored]
    assert [p["probabilities"]["1"] for p in served] == pytest.approx(
        [p["probabilities"]["1"] for p in stored], abs=1e-5
    )
    assert [p["id"] for p in served] == [str(n) for n in range(len(rows))]
    assert "80 examples in" in result.stderr
    bad = subprocess.run(
        command, input='{"text": 1}\n', capture_output=True, text=True, cwd=_ROOT, check=False
    )
    assert bad.returncode == 65
    assert "line 1: wanted a JSON object with text_a (KeyError: 'text_a')" in bad.stderr


def test_prediction_wants_the_texts_of_the_training_and_answers_what_came_before(trained):
    output, _ = trained
    command = [sys.executable, "-m", "albert.finetune", "predict", "--model", str(output)]
    good = b'\xef\xbb\xbf{"text_a": "a 1", "text_b": "2", "id": "\xe5\xa4\xa9"}\n\n'
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for line, message in (
        (b'{"text_a": "b 1", "text_B": "2"}', "line 3: text_b is missing, unlike in the training"),
        ('{"text_a": "天"}'.encode("gbk"), "line 3: byte 12 is not UTF-8; convert the input to UTF-8"),
    ):
        result = subprocess.run(
            command,
            input=good + line + b"\n",
            capture_output=True,
            cwd=_ROOT,
            env={**os.environ, **ascii_only},
            check=False,
        )
        assert (result.returncode, result.stderr.decode()) == (65, f"error: {message}\n")
        (answer,) = result.stdout.decode().splitlines()
        assert json.loads(answer)["id"] == "天"


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        ("classification", ['{"text_a": 5}'], "line 1: text_a is no text"),
        ("classification", ['{"text_a": ""}'], "line 1: text_a is empty"),
        ("classification", ['{"text_a": "a", "text_b": 5}'], "line 1: text_b is no text"),
        ("classification", ["[1]"], "line 1: wanted a JSON object with text_a"),
        ("tagging", ['{"words": "abc"}'], "line 1: words is no list of texts"),
        ("choice", ['{"context": "c", "question": "q", "options": ["a", 1]}'], "line 1: options is no list of texts"),
        ("classification", ['{"text_a": "a", "text_b": "b"}', '{"text_a": "a"}'],
         "line 2: text_b is missing, unlike before"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_answered_are_refused(kind, lines, message):
    with pytest.raises(DataError) as caught:
        list(predict_lines(_Silent(kind), lines))
    assert message in str(caught.value)


class _Silent:
    """Answers with the names of the examples."""

    def __init__(self, kind: str, is_pair: bool | None = None) -> None:
        self.task = Task("t", kind, "", "accuracy", Recipe(1e-5, 1, epochs=1), {})
        self.card = SimpleNamespace(is_pair=is_pair)

    def predict(self, examples):
        return [{"id": example.guid} for example in examples]


_PAIR, _SINGLE = '{"text_a": "a", "text_b": "b"}', '{"text_a": "a"}'


@pytest.mark.parametrize(
    ("is_pair", "good", "bad", "message"),
    [
        (True, _PAIR, _SINGLE, "text_b is missing, unlike in the training"),
        (False, _SINGLE, _PAIR, "text_b is given, unlike in the training"),
    ],
)
@pytest.mark.parametrize("number", [1, 2, 512, 513, 1025])
def test_the_lines_before_a_bad_one_are_answered(is_pair, good, bad, message, number):
    answers = predict_lines(_Silent("classification", is_pair), [good] * (number - 1) + [bad, good])
    answered = []
    with pytest.raises(DataError, match=f"^line {number}: {message}$"):
        answered.extend(answers)
    assert [answer["id"] for answer in answered] == [str(n) for n in range(1, number)]


@pytest.mark.parametrize("count", [0, 1, 512, 513])
def test_every_line_is_answered(count):
    assert len(list(predict_lines(_Silent("classification", True), [_PAIR] * count))) == count


def _sweep(request: Request) -> dict:
    task = find_task(request.task)
    settings = settings_for(task, request.overrides)
    prepared = prepare(request, task, settings)
    world = init_world("cpu", 60.0)
    try:
        return run_sweep(prepared, request, settings, world, StopRequest(), Watchdog(world, 0.0, 60.0))
    finally:
        close_world()


def test_a_sweep_trains_every_seed_and_rate(inputs, tmp_path):
    overrides = {**_QUICK, "epochs": 2.0}
    request = _request(
        inputs, tmp_path, overrides=overrides, num_seeds=2, learning_rates=(3e-3, 1e-9), do_test=False
    )
    summary = run_ranks(1, _sweep, request)[0]
    assert [(run["learning_rate"], run["seed"]) for run in summary["runs"]] == [
        (3e-3, 0), (3e-3, 1), (1e-9, 0), (1e-9, 1),
    ]  # fmt: skip
    assert summary["by_learning_rate"][0]["learning_rate"] == 3e-3
    assert json.loads((tmp_path / "sweep.json").read_bytes()) == summary
    assert (tmp_path / "lr-0.003" / "seed-1" / "model" / "task.json").is_file()
    assert "| 1e-09 | 2 | 2 |" in (tmp_path / "sweep.md").read_text()
