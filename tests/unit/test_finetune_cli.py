"""The command line of fine-tuning: what it prints, and what it refuses before anything expensive starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from albert.errors import ConfigError, MissingInputError, run_command
from albert.finetune import cli
from albert.finetune.artefacts import write_submission
from albert.finetune.custom import read_task
from albert.finetune.reading import read_split
from albert.finetune.settings import settings_for
from albert.finetune.sweep import markdown_table, summarise
from albert.finetune.tasks import TASKS, find_task

_WHOLE = ["--task", "lcqmc", "--data-dir", "d", "--model", "m", "--output", "o", "--do-train", "--do-eval"]


def _run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    try:
        code = run_command(cli._main)
    except SystemExit as end:  # argparse's way to end after --help
        code = end.code
    output = capsys.readouterr()
    return code, output.out, output.err


def test_help_teaches_by_example(monkeypatch, capsys):
    code, out, _ = _run(monkeypatch, capsys, "--help")
    assert code == 0
    for part in (
        "--do-train --do-eval --do-test",
        "text <TAB> text <TAB> label",
        "exit codes: 0 done, 65 bad data",
    ):
        assert part in out


def test_the_table_of_tasks_lists_every_task_with_its_recipe(monkeypatch, capsys):
    code, out, _ = _run(monkeypatch, capsys, "--list-tasks")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(TASKS) <= set(lines)
    assert lines["cola"].split()[1:8] == ["classification", "matthews", "16", "1e-05", "512", "5336", "steps"]


def test_the_command_line_starts_without_torch():
    code = (
        "import sys, albert.finetune.cli; sys.exit(', '.join({'torch', 'deepspeed'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "missing: --task; --data-dir; --model; --output; one of --do-train, --do-eval, --do-test, --do-predict",
        ),
        (_WHOLE[:-2], "missing: one of --do-train"),
        ([*_WHOLE, "--seeds", "0"], "--seeds (0) must be at least 1"),
        ([*_WHOLE[:-1], "--seeds", "3"], "--seeds and --learning-rates compare trainings on dev"),
        ([*_WHOLE, "--task", "custom"], "--task custom and --task-file FILE.yaml belong together"),
        ([*_WHOLE, "--task", "nothing"], "--task 'nothing' is not known"),
        ([*_WHOLE, "--metric", "bleu"], "--metric 'bleu': task lcqmc has accuracy, f1, macro_f1, matthews"),
        ([*_WHOLE, "--learning-rate", "0"], "--learning-rate: input should be greater than 0, got 0.0"),
        ([*_WHOLE, "--epochs", "1", "--max-steps", "5"], "give either epochs or max_steps"),
    ],
)
def test_impossible_command_lines_end_with_one_line(monkeypatch, capsys, arguments, message):
    code, _, err = _run(monkeypatch, capsys, *arguments)
    assert code == 78
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_missing_model_and_data(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["--task", "lcqmc", "--data-dir", "d", "--output", str(tmp_path / "o"), "--do-train"]
    code, _, err = _run(monkeypatch, capsys, *arguments, "--model", str(tmp_path / "none"))
    assert (code, err) == (66, f"error: --model {tmp_path / 'none'}: no such directory\n")
    code, _, err = _run(monkeypatch, capsys, *arguments, "--model", str(tmp_path))
    assert (code, err) == (66, "error: --data-dir d: no such directory\n")
    code, _, err = _run(monkeypatch, capsys, *_WHOLE, "--output", str(tmp_path / "file"))
    assert (code, err) == (78, f"error: --output {tmp_path / 'file'}: is a file; name a directory\n")


def test_settings_come_from_the_recipe_and_the_command_line():
    settings = settings_for(find_task("cola"), {})
    assert (settings.num_steps(8551), settings.warmup_steps, settings.metric) == (5336, 320, "matthews")
    changed = settings_for(find_task("cola"), {"epochs": 2.0, "batch_size": 32})
    assert (changed.num_steps(8551), changed.steps_per_evaluation(8551)) == (534, 267)
    assert changed.schedule_config(534).warmup_steps == 53
    with pytest.raises(ConfigError, match=r"--warmup-steps \(320\) must be less than the run's 300 steps"):
        settings.schedule_config(300)


def test_batches_that_do_not_divide_are_refused():
    settings = settings_for(find_task("lcqmc"), {"batch_size": 10, "micro_batch_size": 4})
    with pytest.raises(
        ConfigError, match=r"--batch-size \(10\) is not a multiple of the 3 ranks; nearest is 12"
    ):
        settings.micro_batches(3)
    with pytest.raises(
        ConfigError, match=r"--micro-batch-size \(4\) does not divide the 5 examples of each of 2"
    ):
        settings.micro_batches(2)


_CUSTOM = """
name: reviews
kind: classification
columns: {text_a: title, text_b: 3, label: stars}
labels: [1, 2, 3]
metric: macro_f1
epochs: 2
"""


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "task.yaml").write_text(_CUSTOM.replace("text_b: 3", "text_b: body"))
    task = read_task(tmp_path / "task.yaml")
    assert (task.labels, task.metric, task.recipe.epochs) == (("1", "2", "3"), "macro_f1", 2.0)
    (tmp_path / "train.csv").write_text('stars,title,body\n3,Fine,"good, really"\n1,Bad,no\n')
    rows = [(e.text_a, e.text_b, e.label) for e in read_split(task, tmp_path, "train").examples]
    assert rows == [("Fine", "good, really", "3"), ("Bad", "no", "1")]
    (tmp_path / "task.yaml").write_text(
        _CUSTOM.replace("title", "1").replace("text_b: 3", "text_b: 2").replace("stars", "3")
    )
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.tsv").write_text("Fine\tgood\t3\n")
    assert read_split(read_task(tmp_path / "task.yaml"), tmp_path, "train").examples[0].text_b == "good"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: classification\n", "name: missing; columns"),
        (_CUSTOM + "colour: red\n", "colour: unknown key; known are name, kind, form"),
        (_CUSTOM.replace("macro_f1", "bleu"), "metric 'bleu': a classification task has accuracy, f1"),
        (_CUSTOM.replace("[1, 2, 3]", "[1]"), "labels are at least two different words"),
        ("name: x\nkind: span\n", "a span task needs form: squad"),
        ("name: x\nkind: regression\n", "a regression task needs columns"),
        (
            "name: x\nkind: span\nform: squad\noptions: {doc_strid: 5}\n",
            "doc_strid: unknown key; known are doc_stride",
        ),
        ("name: [\n", "not valid YAML"),
        (_CUSTOM + "epochs: 3\n", "not valid YAML: key 'epochs' is given twice in"),
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, text, message):
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_task(tmp_path / "task.yaml")
    for part in message.split("; columns"):
        assert part in str(caught.value)


def test_a_task_file_is_utf_8(tmp_path):
    path = tmp_path / "task.yaml"
    text = (
        _CUSTOM.replace("title", "标题").replace("[1, 2, 3]", "[好, 坏]").replace("text_b: 3", "text_b: 正文")
    )
    path.write_text(text, encoding="gbk")
    with pytest.raises(ConfigError, match=r"task\.yaml: line 4 is not UTF-8; convert the file to UTF-8"):
        read_task(path)
    path.write_text(text, encoding="utf-8-sig")
    assert read_task(path).labels == ("好", "坏")


def test_a_task_file_that_is_not_there():
    with pytest.raises(MissingInputError, match=r"--task-file no.yaml: no such file"):
        read_task(cli.Path("no.yaml"))


def test_a_sweep_is_summarised_by_learning_rate():
    runs = [
        {"learning_rate": rate, "seed": seed, "collapsed": False, "splits": {"dev": {"f1": value}}}
        for rate, values in ((1e-5, (0.5, 0.7)), (2e-5, (0.8, 0.9)))
        for seed, value in enumerate(values)
    ]
    rows = summarise(runs, "f1")
    assert [row["learning_rate"] for row in rows] == [2e-5, 1e-5]
    assert rows[1]["dev"] == {"mean": pytest.approx(0.6), "deviation": pytest.approx(0.02**0.5), "best": 0.7}
    table = markdown_table({"task": "t", "metric": "f1", "model": "m", "by_learning_rate": rows})
    assert "| 2e-05 | 2 | 0 | 0.8500 ± 0.0707 (0.9000) |" in table


def _submission(directory: Path, task: str, rows: list[dict], test_file: str) -> tuple[str, bytes]:
    path = write_submission(directory, find_task(task), rows, Path(test_file))
    assert path is not None
    return path.name, path.read_bytes()


def test_submissions_in_the_benchmarks_forms(tmp_path):
    rows = [{"id": "0", "prediction": "not_entailment"}, {"id": "2", "prediction": "entailment"}]
    assert _submission(tmp_path, "rte", rows, "test.tsv") == (
        "RTE.tsv",
        b"index\tprediction\n0\tnot_entailment\n2\tentailment\n",
    )
    rows_of = {
        "sts-b": [{"id": "0", "prediction": 3.25}],
        "tnews": [{"id": "7", "prediction": "108"}],
        "cmrc2018": [{"id": "Q1", "prediction": "北京"}],
        "ocnli": [{"id": "0", "prediction": "neutral"}],
        "wsc": [{"id": "0", "prediction": "true"}],
        "c3": [{"id": "0", "prediction": 3, "option": "丁"}, {"id": "1", "prediction": 0, "option": "甲"}],
    }
    for task, test_file, name, content in (
        ("sts-b", "test.tsv", "STS-B.tsv", "index\tprediction\n0\t3.25\n"),
        ("cmrc2018", "cmrc2018_test_2k.json", "answers.json", '{"Q1": "北京"}\n'),
        ("ocnli", "test.json", "ocnli_50k_predict.json", '{"id": 0, "label": "neutral"}\n'),
        ("tnews", "test.json", "tnews11_predict.json", '{"id": 7, "label": "108"}\n'),
        ("tnews", "test1.0.json", "tnews10_predict.json", '{"id": 7, "label": "108"}\n'),
        ("wsc", "test1.1.json", "cluewsc11_predict.json", '{"id": 0, "label": "true"}\n'),
        ("c3", "test1.1.json", "c311_predict.json", '{"id": 0, "label": 3}\n{"id": 1, "label": 0}\n'),
        ("c3", "test1.0.json", "c310_predict.json", '{"id": 0, "label": 3}\n{"id": 1, "label": 0}\n'),
    ):
        assert _submission(tmp_path, task, rows_of[task], test_file) == (name, content.encode())
    assert write_submission(tmp_path, find_task("lcqmc"), rows, Path("test.tsv")) is None


def test_deepspeed_is_imported_after_the_device_is_chosen():
    """It takes the accelerator of DS_ACCELERATOR for good when it is imported."""
    code = """
import sys
from types import SimpleNamespace
from albert import distributed
from albert.finetune import cli, preparation

def choose(device, timeout_s):
    sys.exit(f"{device}: {[name for name in ('deepspeed', 'albert.engine') if name in sys.modules]}")

preparation.prepare = lambda *arguments: None
distributed.init_world = choose
cli._run(None, None, SimpleNamespace(device="cpu", peer_timeout_s=1), SimpleNamespace(install=lambda: None))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1] == "cpu: []"
