"""The remaining commands: sizes, inspect, verify-checkpoint, to-onnx, --probe, and their errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tf_albert
import torch
from model_samples import padded, perturbed, random_sequences, tiny

from albert.convert import sizes
from albert.convert.cli import run
from albert.convert.foreign import published_mistakes, with_fields
from albert.convert.probe import candidate_fields, probe
from albert.errors import ConfigError, DataError, MissingInputError, UnsafeError
from albert.heads import (
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
)
from albert.model_config import MODEL_PRESETS, ModelConfig
from albert.pretrained import load_pretrained, save_pretrained
from albert.tokenization import load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"

PUBLISHED_COUNTS = {
    "base": (11_683_584, 11_813_810),
    "large": (17_683_968, 17_847_474),
    "xlarge": (58_724_864, 59_021_490),
    "xxlarge": (222_595_584, 223_158_450),
    "tiny_zh": (4_080_520, 4_142_594),
    "small_zh": (4_742_272, 4_813_706),
    "base_zh": (10_547_968, 10_669_322),
    "large_zh": (16_548_352, 16_702_986),
    "xlarge_zh": (57_589_248, 57_877_002),
    "xxlarge_zh": (221_459_968, 222_013_962),
    "tiny_brightmart": (4_175_152, 4_295_186),
    "base_brightmart": (10_877_440, 11_492_234),
    "large_brightmart": (17_009_664, 18_084_490),
    "xlarge_brightmart": (58_577_920, 62_803_594),
    "xxlarge_brightmart": (223_503_360, 240_322_186),
}


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_parameter_counts_of_every_preset(name):
    """The formula, the published numbers and the model itself agree."""
    count = sizes.count_parameters(MODEL_PRESETS[name])
    assert (count.body, count.total) == PUBLISHED_COUNTS[name]
    with torch.device("meta"):
        model = AlbertForPreTraining(MODEL_PRESETS[name])
    assert sum(p.numel() for p in model.albert.parameters()) == count.body
    assert sum(p.numel() for p in model.parameters()) == count.total


@pytest.mark.parametrize("layout", ["google", "brightmart"])
@pytest.mark.parametrize("share_type", ["all", "ffn", "attention", "none"])
@pytest.mark.parametrize("other", [{}, {"ln_type": "preln", "final_ln": True}, {"embedding_size": 24}])
def test_parameter_counts_of_every_combination(layout, share_type, other):
    config = tiny(layout=layout, share_type=share_type, **other)
    actual = sum(p.numel() for p in AlbertForPreTraining(config).parameters())
    assert sizes.count_parameters(config).total == actual


def test_parameter_counts_of_groups():
    config = tiny(num_hidden_layers=6, num_hidden_groups=3, inner_group_num=2)
    assert sizes.count_parameters(config).total == sum(
        p.numel() for p in AlbertForPreTraining(config).parameters()
    )


def test_sizes_reproduces_the_table_of_albert_pytorch(capsys):
    run(["sizes"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {(row[0], row[1]): (row[2], row[6]) for row in rows if row and row[0] in ("768", "128")}
    assert table == {
        ("768", "none"): ("476.5", "102,882,442"),
        ("768", "attention"): ("372.4", "76,879,498"),
        ("768", "ffn"): ("268.6", "50,918,794"),
        ("768", "all"): ("164.6", "24,915,850"),
        ("128", "none"): ("369.1", "89,458,826"),
        ("128", "attention"): ("265.1", "63,455,882"),
        ("128", "ffn"): ("161.2", "37,495,178"),
        ("128", "all"): ("57.2", "11,492,234"),
    }


def test_numbers_in_the_file_of_albert_pytorch():
    config = MODEL_PRESETS["base_brightmart"]
    assert sizes.albert_pytorch_file_floats(config) == 14_294_922
    square = config.model_copy(update={"embedding_size": 768, "share_type": "none"})
    assert sizes.albert_pytorch_file_floats(square) == 119_108_746
    assert sizes.attention_block(768) == 2_363_904
    assert sizes.feed_forward_block(768, 3072) == 4_723_968


def test_commands_that_need_no_torch_start_without_it():
    code = "import sys, albert.convert.cli as c; c.run(['sizes']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def saved(tmp_path):
    config = tiny()
    save_pretrained(tmp_path / "model", config, AlbertForPreTraining(config).state_dict(), None)
    return tmp_path / "model"


def test_inspect_tells_what_lies_there(saved, tmp_path, capsys):
    run(["inspect", str(saved)])
    out = capsys.readouterr().out
    assert "albert.encoder.attention.0.query.weight [24, 24]" in out
    assert out.splitlines()[-1] == f"32 tensors, {sizes.count_parameters(tiny()).total:,} numbers"
    run(["inspect", str(saved / "model.safetensors")])
    assert capsys.readouterr().out.splitlines()[-1] == out.splitlines()[-1]
    run(["inspect", f"{FIXTURES}/brightmart.ckpt"])
    out = capsys.readouterr().out
    assert "bert/embeddings/word_embeddings_2 f32 [8, 24]" in out
    assert "global_step i64 []" in out
    torch.save({"a": torch.zeros(2, 3)}, tmp_path / "x.bin")
    run(["inspect", str(tmp_path / "x.bin")])
    assert capsys.readouterr().out.splitlines()[1:] == ["  a [2, 3]", "1 tensors, 6 numbers"]
    with pytest.raises(MissingInputError, match="gone: does not exist"):
        run(["inspect", str(tmp_path / "gone")])


HEADED = {
    "pretraining": lambda: AlbertForPreTraining(tiny(layout="brightmart", ln_type="preln")),
    "sequence": lambda: AlbertForSequenceClassification(tiny(share_type="ffn"), 3),
    "span": lambda: AlbertForQuestionAnswering(tiny()),
}


def packed_logits(model, batch):
    if isinstance(model, AlbertForPreTraining):
        hidden, pooled = model.albert(batch)
        return model.mlm_logits(hidden), model.sop_classifier(pooled)
    output = model(batch)
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("head", ["pretraining", "sequence", "span"])
def test_onnx_gives_the_logits_of_packed_sequences(head, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra `onnx` is not installed")
    model = perturbed(HEADED[head]()).eval()
    save_pretrained(tmp_path / "model", model.config, model.state_dict(), None)
    run(["to-onnx", str(tmp_path / "model"), "--output", str(tmp_path / "out" / "model.onnx")])
    assert "written; onnxruntime's logits differ by" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    for lengths in ((5, 21, 9), (1, 2)):
        batch = random_sequences(60, lengths)
        ids, types, mask = padded(batch)
        given = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long()}
        got = [torch.from_numpy(x) for x in session.run(None, {n: x.numpy() for n, x in given.items()})]
        with torch.no_grad():
            expected = packed_logits(model, batch)
        for ours, theirs in zip(expected, got, strict=True):
            real = theirs if theirs.shape[:2] != mask.shape or theirs.shape == ours.shape else theirs[mask]
            torch.testing.assert_close(ours, real, rtol=1e-5, atol=1e-5)


def test_onnx_of_a_model_without_a_head_is_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="extra `onnx` is not installed")
    config = tiny()
    encoder = {n: x for n, x in AlbertForPreTraining(config).state_dict().items() if n.startswith("albert.")}
    save_pretrained(tmp_path / "model", config, encoder, None)
    with pytest.raises(DataError, match="has no head; exactly one is needed"):
        run(["to-onnx", str(tmp_path / "model"), "--output", str(tmp_path / "model.onnx")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_onnx_without_its_packages_says_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"to-onnx needs onnx, onnxscript, onnxruntime; install them with"):
        run(["to-onnx", str(saved), "--output", str(tmp_path / "model.onnx")])


def test_onnx_replaces_an_onnx_file_and_nothing_else(saved, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "directory.onnx").mkdir()
    for name in ("thesis.tex", "directory.onnx"):
        with pytest.raises(UnsafeError, match=rf"--output .*{name}: exists and is no \.onnx file; choose"):
            run(["to-onnx", str(saved), "--output", str(tmp_path / name)])
    assert (tmp_path / "thesis.tex").read_text() == "x"
    pytest.importorskip("onnxruntime", reason="extra `onnx` is not installed")
    (tmp_path / "model.onnx").write_text("x")
    run(["to-onnx", str(saved), "--output", str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").stat().st_size > 10_000


@pytest.mark.parametrize("command", ["to-hf", "from-hf"])
def test_a_model_is_not_converted_in_its_own_place(command, saved, tmp_path, monkeypatch):
    (saved / "task.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    (tmp_path / "link").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    for output in ("model", "link", str(saved)):
        with pytest.raises(UnsafeError, match=f"--output {output}: is the source itself; choose another"):
            run([command, "model", "--output", output])
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A little model that has learnt its text by heart, with its tokenizer and the text."""
    tmp_path = tmp_path_factory.mktemp("trained")
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    rng = np.random.default_rng(0)
    lines = [" ".join(words[(start + i) % 10] for i in range(12)) for start in rng.integers(10, size=40)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    config = ModelConfig(
        vocab_size=15,
        embedding_size=16,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=96,
        max_position_embeddings=32,
        hidden_act="relu",
        layout="brightmart",
        ln_type="preln",
    )
    from albert.convert.probe import _masked_batch

    model = AlbertForPreTraining(config)
    batch = _masked_batch(load_tokenizer(vocabulary), text, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(batch).mlm_loss_sum.div(len(batch.masked_lm_labels)).backward()
        optimizer.step()
    return model, vocabulary, text


def test_probe_finds_the_settings_that_shapes_do_not_show(trained, tmp_path, capsys):
    model, vocabulary, text = trained
    wrong = with_fields(
        model.config, {"num_attention_heads": 16, "hidden_act": "gelu_new", "ln_type": "postln"}
    )
    scores = probe(wrong, model.state_dict(), load_tokenizer(vocabulary), text)
    assert scores[0].fields == {"num_attention_heads": 12, "hidden_act": "relu", "ln_type": "preln"}
    assert scores[0].loss < scores[1].loss / 2
    assert scores[-1].loss > 20 * scores[0].loss
    assert len(scores) == 2 * 3 * 2  # heads 12 and 16; 32 and 64 do not divide 48

    from test_convert_albert_pytorch import their_state

    source = tmp_path / "source"
    source.mkdir()
    torch.save(their_state(model), source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps(wrong.model_dump(exclude={"layout"})))
    shutil.copy(vocabulary, source / "vocab.txt")
    run(["from-albert-pytorch", str(source), "--output", str(tmp_path / "out"), "--probe", str(text)])
    assert load_pretrained(tmp_path / "out")[0] == model.config
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("num_attention_heads=12  hidden_act=relu  ln_type=preln")


def test_probe_refuses_what_it_cannot_score(trained, tmp_path):
    model, vocabulary, text = trained
    tokenizer = load_tokenizer(vocabulary)
    with pytest.raises(MissingInputError, match=r"--probe .*gone: no such text file"):
        probe(model.config, model.state_dict(), tokenizer, tmp_path / "gone")
    (tmp_path / "gbk").write_text("模型", encoding="gbk")
    with pytest.raises(DataError, match=r"--probe .*gbk: byte 2 is not UTF-8; convert the file to UTF-8"):
        probe(model.config, model.state_dict(), tokenizer, tmp_path / "gbk")
    (tmp_path / "short").write_text("alpha\nbeta\n")
    with pytest.raises(DataError, match="no line of at least 8 tokens"):
        probe(model.config, model.state_dict(), tokenizer, tmp_path / "short")
    with pytest.raises(DataError, match="15 pieces, the model has vocab_size 60"):
        probe(tiny(), AlbertForPreTraining(tiny()).state_dict(), tokenizer, text)
    encoder = {n: x for n, x in model.state_dict().items() if n.startswith("albert.")}
    with pytest.raises(ConfigError, match="--probe needs the masked-language head"):
        probe(model.config, encoder, tokenizer, text)
    assert all(c["ln_type"] == "postln" for c in candidate_fields(tiny()))


@pytest.mark.parametrize(
    ("preset", "change", "note"),
    [
        (
            "xlarge",
            {"num_attention_heads": 32},
            "Google's xlarge was published with num_attention_heads 32 and 16",
        ),
        ("xxlarge_zh", {"num_attention_heads": 64}, "Chinese xxlarge has num_attention_heads 16"),
        ("base_zh", {"hidden_act": "gelu_new"}, "trained with hidden_act relu"),
        ("xlarge_brightmart", {}, "published as ln_type preln and as postln"),
        ("base", {"hidden_act": "gelu"}, "hidden_act gelu is the erf form"),
    ],
)
def test_published_mistakes_are_pointed_out(preset, change, note):
    notes = published_mistakes(MODEL_PRESETS[preset].model_copy(update=change))
    assert len(notes) == 1
    assert note in notes[0]
    assert "let --probe TEXT compare" in notes[0]


def test_right_presets_are_left_in_peace():
    names = [n for n in MODEL_PRESETS if n != "xlarge_brightmart"]
    assert [published_mistakes(MODEL_PRESETS[name]) for name in names] == [[]] * len(names)


def test_configuration_must_be_clear(tmp_path):
    arguments = ["from-tf", f"{FIXTURES}/google.ckpt", "--output", str(tmp_path / "m")]
    with pytest.raises(ConfigError, match="name the configuration with --config; files there: none"):
        run(arguments)
    with pytest.raises(MissingInputError, match="no such model configuration"):
        run([*arguments, "--config", str(tmp_path / "gone.json")])
    with pytest.raises(ConfigError, match="--config: a Hugging Face directory has its own"):
        run(["from-hf", str(tmp_path), "--output", str(tmp_path / "m"), "--config", "x"])
    config = tmp_path / "albert_config.json"
    config.write_text(json.dumps(tf_albert.config_fields("google")))
    with pytest.raises(MissingInputError, match="--probe needs the model's tokenizer"):
        run([*arguments, "--config", str(config), "--probe", str(config)])
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bogus"], 78, "invalid choice: 'bogus'"),
        (["to-hf"], 78, "the following arguments are required: MODEL, --output"),
        (["to-hf", "gone", "--output", "out"], 66, "error: gone: no config.json; give a model directory"),
        (["verify-checkpoint", "gone"], 66, "error: gone"),
    ],
)
def test_mistakes_end_with_one_line_and_their_exit_code(arguments, code, message, tmp_path):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "albert.convert", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert result.returncode == code
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as caught:
        run(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("sizes", "inspect", "from-tf", "from-hf", "from-albert-pytorch", "to-hf", "to-onnx"):
        assert f"python -m albert.convert {command}" in out
    assert "to-onnx runs/lcqmc/model " in out
