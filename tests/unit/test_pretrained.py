"""Model directories: strict, atomic, bitwise."""

import itertools
import json

import pytest
import safetensors.torch
import torch
from model_samples import perturbed, pretrain_batch, tiny

from albert.errors import ConfigError, DataError, MissingInputError, UnsafeError
from albert.heads import (
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)
from albert.pretrained import load_pretrained, save_pretrained
from albert.weights import build_model, load_weights


@pytest.fixture
def model():
    return perturbed(AlbertForPreTraining(tiny()))


@pytest.fixture
def saved(model, tmp_path):
    save_pretrained(tmp_path / "model", model.config, model.state_dict(), None)
    return tmp_path / "model"


def rewrite(directory, change):
    """Change the stored tensors behind the reader's back."""
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


SHARING = [
    {"layout": layout, "ln_type": ln_type, "share_type": share_type, "final_ln": ln_type == "preln"}
    for layout, ln_type, share_type in itertools.product(
        ("google", "brightmart"), ("postln", "preln"), ("all", "ffn", "attention", "none")
    )
]


@pytest.mark.parametrize("options", SHARING, ids=lambda o: "-".join(map(str, o.values())))
def test_save_load_and_train_on_is_bitwise(options, tmp_path):
    """Every combination: two steps = one step, save, load, one step."""
    config = tiny(**options)
    batch = pretrain_batch(config.vocab_size)

    def step(model):
        output = model(batch)
        (output.mlm_loss_sum + output.sop_loss_sum).backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        model.zero_grad()

    straight = AlbertForPreTraining(config)
    step(straight)
    save_pretrained(tmp_path / "model", config, straight.state_dict(), None)
    step(straight)
    loaded_config, state, _ = load_pretrained(tmp_path / "model")
    assert loaded_config == config
    resumed = build_model(loaded_config, state, "model").train()
    step(resumed)
    for name, parameter in straight.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    "model",
    [
        AlbertForSequenceClassification(tiny(), 4),
        AlbertForTokenClassification(tiny(), 7),
        AlbertForQuestionAnswering(tiny()),
        AlbertForMultipleChoice(tiny(), 3),
    ],
    ids=lambda m: type(m).__name__,
)
def test_fine_tuned_models_come_back_as_what_they_were(model, tmp_path):
    save_pretrained(tmp_path / "m", model.config, model.state_dict(), None)
    config, state, _ = load_pretrained(tmp_path / "m")
    again = build_model(config, state, "m")
    assert type(again) is type(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())


def test_the_tied_decoder_is_stored_once_and_in_fp32(saved, model):
    with safetensors.safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    assert names == set(model.state_dict())
    assert kinds == {"F32"}


def test_half_precision_weights_are_written_as_fp32(model, tmp_path):
    half = {n: x.bfloat16() for n, x in model.state_dict().items()}
    save_pretrained(tmp_path / "m", model.config, half, None)
    _, state, _ = load_pretrained(tmp_path / "m")
    assert all(x.dtype == torch.float32 and torch.equal(x, half[n].float()) for n, x in state.items())


def test_missing_unexpected_and_misshapen_tensors_are_all_named(saved):
    def damage(tensors):
        del tensors["albert.pooler.bias"]
        tensors["albert.encoder.attention.9.query.weight"] = torch.zeros(2)
        tensors["predictions.dense.weight"] = torch.zeros(3, 4)

    rewrite(saved, damage)
    with pytest.raises(DataError) as caught:
        load_pretrained(saved)
    message = str(caught.value)
    assert "missing: albert.pooler.bias" in message
    assert "unexpected: albert.encoder.attention.9.query.weight" in message
    assert "wrong shape: predictions.dense.weight is [3, 4] instead of [8, 24]" in message


def test_a_renamed_tensor_is_missing_and_unexpected(saved):
    def rename(tensors):
        tensors["albert.encoder.attention.0.qery.weight"] = tensors.pop(
            "albert.encoder.attention.0.query.weight"
        )

    rewrite(saved, rename)
    with pytest.raises(DataError, match=r"missing: .*\.query\.weight; unexpected: .*\.qery\.weight"):
        load_pretrained(saved)


@pytest.mark.parametrize("kept", [7, 200, -4])
def test_a_truncated_file_is_refused(saved, kept):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"model\.safetensors: damaged or truncated"):
        load_pretrained(saved)


def test_a_configuration_of_another_model_is_refused(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 60', '"vocab_size": 61'))
    with pytest.raises(DataError, match=r"word_embeddings\.weight is \[60, 8\] instead of \[61, 8\]"):
        load_pretrained(saved)


def test_nothing_to_load(tmp_path, saved):
    with pytest.raises(MissingInputError, match=r"nowhere: no config\.json; give a model directory"):
        load_pretrained(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"convert them with `python -m albert\.convert`"):
        load_pretrained(saved)


def test_saving_replaces_a_model_but_nothing_else(saved, model, tmp_path):
    changed = {n: x + 1 for n, x in model.state_dict().items()}
    save_pretrained(saved, model.config, changed, None)
    _, state, _ = load_pretrained(saved)
    assert all(torch.equal(state[n], x) for n, x in changed.items())
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(UnsafeError, match="precious: exists and is not a model directory"):
        save_pretrained(precious, model.config, model.state_dict(), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


@pytest.mark.parametrize("name", [".git/HEAD", "tokenizer.json/x", "notes.txt", "pytorch_model.bin"])
def test_a_directory_with_a_configuration_is_replaced_only_if_all_of_it_is_a_models(saved, model, name):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("x")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with pytest.raises(UnsafeError, match=f"is not a model directory, it holds {name.split('/')[0]}; choose"):
        save_pretrained(saved, model.config, model.state_dict(), None)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_a_file_or_a_lone_tokenizer_is_not_replaced(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnsafeError, match="file: exists and is not a directory"):
        save_pretrained(tmp_path / "file", model.config, model.state_dict(), None)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("x")
    with pytest.raises(UnsafeError, match=r"words: exists and is not a model directory, no config\.json"):
        save_pretrained(tmp_path / "words", model.config, model.state_dict(), None)
    assert (tmp_path / "file").read_text() == (tmp_path / "words" / "vocab.txt").read_text() == "x"


def test_a_failed_save_leaves_the_old_model_and_no_rubbish(saved, model, tmp_path):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    incomplete = dict(list(model.state_dict().items())[1:])
    with pytest.raises(DataError, match=r"missing: albert\.embeddings\.word_embeddings\.weight"):
        save_pretrained(saved, model.config, incomplete, None)
    with pytest.raises(MissingInputError, match="no such tokenizer"):
        save_pretrained(saved, model.config, model.state_dict(), tmp_path / "gone")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tokenizer_is_copied_under_its_standard_name(model, tmp_path):
    (tmp_path / "zh.txt").write_text("[PAD]\n[UNK]\n")
    save_pretrained(tmp_path / "m", model.config, model.state_dict(), tmp_path / "zh.txt")
    _, _, tokenizer = load_pretrained(tmp_path / "m")
    assert tokenizer == tmp_path / "m" / "vocab.txt"
    assert tokenizer.read_text() == "[PAD]\n[UNK]\n"


def test_weights_of_the_encoder_fill_any_head_and_the_rest_stays_fresh(model):
    target = AlbertForSequenceClassification(model.config, 3, seed=5)
    classifier = target.classifier.weight.clone()
    fresh = load_weights(target, model.state_dict(), "model")
    assert fresh == ["classifier.weight", "classifier.bias"]
    assert torch.equal(target.classifier.weight, classifier)
    for name, tensor in model.state_dict().items():
        if name.startswith("albert."):
            assert torch.equal(target.state_dict()[name], tensor)


def test_an_encoder_with_a_hole_fills_nothing(model):
    state = model.state_dict()
    del state["albert.encoder.feed_forward.0.output.bias"]
    target = AlbertForSequenceClassification(model.config, 3, seed=5)
    before = {n: x.clone() for n, x in target.state_dict().items()}
    with pytest.raises(DataError, match=r"missing: albert\.encoder\.feed_forward\.0\.output\.bias"):
        load_weights(target, state, "model")
    assert all(torch.equal(x, target.state_dict()[n]) for n, x in before.items())


def test_a_model_without_a_head_cannot_be_built(model):
    encoder = {n: x for n, x in model.state_dict().items() if n.startswith("albert.")}
    with pytest.raises(DataError, match="encoder: has no head; exactly one is needed of predictions"):
        build_model(model.config, encoder, "encoder")
    half = encoder | {n: x for n, x in model.state_dict().items() if n.startswith("predictions.")}
    with pytest.raises(DataError, match=r"lacks sop_classifier\.weight, sop_classifier\.bias"):
        build_model(model.config, half, "half")


def test_foreign_configurations(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_pretrained(tmp_path)
    path.write_text('{"name": "模型"}', encoding="gbk")
    with pytest.raises(ConfigError, match=r"config\.json: line 1 is not UTF-8; convert the file to UTF-8"):
        load_pretrained(tmp_path)
    path.write_text(json.dumps({"hidden_size": 10, "num_attention_heads": 3}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="not a multiple of num_attention_heads"):
        load_pretrained(tmp_path)
