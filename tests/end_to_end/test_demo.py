"""The demo in a reduced size: every stage runs, every artefact is there, the report says what happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from albert.config import load_run_config
from albert.errors import UnsafeError
from albert.manifest import read_manifest
from launcher.demo import STATE_NAME, DemoPlan, demo_stages, run_demo
from launcher.demo_report import read_curves

pytestmark = pytest.mark.end_to_end
_ROOT = Path(__file__).resolve().parents[2]
_STEPS = 16
_STAGES = ("text", "tokenizer", "shards", "pretrain", "resume", "finetune", "export")


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", "demo", *arguments],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "run"
    result = _demo("--output", str(output), "--steps", str(_STEPS), "--finetune-steps", "6")
    assert result.returncode == 0, result.stderr + result.stdout
    return output, result.stdout


def test_every_stage_ran_and_is_timed(finished):
    output, text = finished
    state = json.loads((output / STATE_NAME).read_bytes())
    assert tuple(state["done"]) == _STAGES
    assert state["is_finished"]
    for number in range(1, len(_STAGES) + 1):
        assert f"[{number}/{len(_STAGES)}] " in text
    for name in _STAGES:
        assert (output / "logs" / f"{name}.log").read_text().startswith("$ python -m ")


def test_pretraining_was_stopped_half_way_and_resumed(finished):
    output, _ = finished
    curves = read_curves(output / "pretrain")
    assert curves.resumed_at == [_STEPS // 2]
    assert (curves.first["step"], curves.last["step"]) == (0, _STEPS)
    assert curves.last["mlm_loss"] < curves.first["mlm_loss"] - 0.05
    log = (output / "logs" / "pretrain.log").read_text()
    assert f"stopped: step {_STEPS // 2} of {_STEPS} (train.stop_after_steps), checkpoint committed" in log


def test_the_report_holds_the_measured_figures(finished):
    output, text = finished
    curves = read_curves(output / "pretrain")
    results = json.loads((output / "finetune" / "results.json").read_bytes())
    report = (output / "report.md").read_text()
    rows = [
        (curves.first["mlm_loss"], curves.last["mlm_loss"]),
        (curves.first["sop_accuracy"], curves.last["sop_accuracy"]),
        (results["splits"]["test"]["majority_accuracy"], results["splits"]["test"]["accuracy"]),
    ]
    for before, after in rows:
        assert f"| {before:.3f} | {after:.3f} |" in report
        assert f"{before:.3f}     {after:.3f}" in text
    assert f"tensorboard --logdir {output}" in text
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_artefacts_can_be_used(finished):
    from transformers import AlbertForPreTraining

    from albert.pretrained import load_pretrained

    output, _ = finished
    exported = AlbertForPreTraining.from_pretrained(output / "huggingface")
    config, state, tokenizer = load_pretrained(output / "pretrain" / "model")
    assert exported.config.vocab_size == config.vocab_size == load_run_config("demo").model.vocab_size
    assert tokenizer is not None
    words = exported.albert.embeddings.word_embeddings.weight
    assert words.equal(state["albert.embeddings.word_embeddings.weight"])
    assert (output / "finetune" / "model" / "task.json").is_file()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = _demo("--output", str(tmp_path))
    assert result.returncode == 77
    assert result.stderr == (
        f"error: --output {tmp_path}: holds something that is no demo; name another directory\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsafeError, match="is a file; name a directory"):
        run_demo(DemoPlan(tmp_path / "file"))


def test_a_corpus_that_is_not_there(tmp_path):
    result = _demo("--output", str(tmp_path / "new"), "--corpus", "no/such.txt")
    assert (result.returncode, result.stderr) == (66, "error: --corpus no/such.txt: no such file\n")
    assert not (tmp_path / "new").exists()


def test_a_stage_that_fails_ends_the_demo_with_its_code_and_goes_on_there(tmp_path):
    corpus = tmp_path / "small.txt"
    corpus.write_text("Only one document.\nIt is too short.\n")
    arguments = ("--output", str(tmp_path / "demo"), "--corpus", str(corpus))
    result = _demo(*arguments)
    assert result.returncode == 65
    assert "small.txt: 0 documents of at least 4 sentences" in result.stderr
    assert "the demo's stage 'text' ended with exit code 65; see" in result.stderr
    assert json.loads((tmp_path / "demo" / STATE_NAME).read_bytes())["done"] == {}


def test_small_chinese_text_gets_a_model_of_its_size(tmp_path):
    """Documents too short and too few for the vocabulary of the recipe, in characters that English has not."""
    characters = [chr(0x4E00 + 7 * i) for i in range(300)]
    sentences = ["".join(random.Random(i).choices(characters, k=12)) + "。" for i in range(240)]
    corpus = tmp_path / "zh.txt"
    corpus.write_text("\n\n".join("\n".join(sentences[i : i + 4]) for i in range(0, 240, 4)))
    output = tmp_path / "demo"
    result = _demo("--corpus", str(corpus), "--output", str(output), "--steps", "4", "--finetune-steps", "3")
    assert result.returncode == 0, result.stderr + result.stdout
    size = read_manifest(output / "shards").tokenizer.vocab_size
    assert 300 < size < load_run_config("demo").model.vocab_size
    assert json.loads((output / "huggingface" / "config.json").read_bytes())["vocab_size"] == size
    for name in ("pretrain", "resume"):
        assert f" model.vocab_size={size}\n" in (output / "logs" / f"{name}.log").read_text()


def test_the_steps_of_the_recipe_are_the_default():
    stages = {stage.name: stage for stage in demo_stages(DemoPlan(Path("out"), corpus="my.txt", num_ranks=4))}
    steps = load_run_config("demo").train.num_steps
    assert f"train.num_steps={steps}" in stages["pretrain"].arguments
    assert f"train.stop_after_steps={steps // 2}" in stages["pretrain"].arguments
    assert stages["resume"].arguments == stages["pretrain"].arguments[:-1]
    assert stages["text"].arguments[-2:] == ("--input", "my.txt")
