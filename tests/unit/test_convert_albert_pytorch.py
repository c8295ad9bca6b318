"""albert_pytorch's state dicts: both layouts, every sharing, its projection re-tied."""

import json
import re

import pytest
import torch
from model_samples import padded, perturbed, random_sequences, tiny
from plain_albert import PlainAlbert

from albert.convert.albert_pytorch import read_albert_pytorch
from albert.convert.cli import run
from albert.convert.foreign import our_name
from albert.errors import ConfigError, DataError
from albert.heads import AlbertForPreTraining, AlbertForQuestionAnswering, AlbertForSequenceClassification
from albert.pretrained import load_pretrained
from albert.weights import build_model


def their_name(name: str, config) -> str:
    """The name that albert_pytorch gives to one of our parameters."""
    name = re.sub(r"^albert\.(embeddings|encoder\.embedding_hidden)", r"bert.\1", name)
    name = name.replace("albert.pooler", "bert.pooler.dense").replace("span_classifier", "qa_outputs")
    name = re.sub(r"^predictions\.(dense|LayerNorm)", r"cls.predictions.transform.\1", name)
    name = name.replace("predictions.bias", "cls.predictions.bias") if name == "predictions.bias" else name
    name = name.replace("sop_classifier", "cls.seq_relationship")
    match = re.fullmatch(r"albert\.encoder\.(attention|feed_forward)\.(\d+)\.(\w+)\.(\w+)", name)
    if not match:
        return name
    block, index, part, kind = match.groups()
    if config.layout == "google":
        group, inner = divmod(int(index), config.inner_group_num)
        parts = {
            ("attention", "dense"): "attention.output.dense",
            ("attention", "LayerNorm"): "LayerNorm",
            ("feed_forward", "intermediate"): "ffn.intermediate.dense",
            ("feed_forward", "output"): "ffn.intermediate.output.dense",
            ("feed_forward", "LayerNorm"): "LayerNorm_1",
        }
        own = parts.get((block, part), f"attention.self.{part}")
        return f"bert.encoder.transformer.group.{group}.inner_group.{inner}.{own}.{kind}"
    is_listed = (config.share_type, block) in (("attention", "feed_forward"), ("ffn", "attention"))
    number = f".{index}" if is_listed else ""
    layer = f"layer.{index}" if config.share_type == "none" else "layer_shared"
    parts = {
        ("attention", "dense"): f"attention{number}.output.dense",
        ("attention", "LayerNorm"): f"attention{number}.output.LayerNorm",
        ("feed_forward", "intermediate"): f"intermediate{number}.dense",
        ("feed_forward", "output"): f"output{number}.dense",
        ("feed_forward", "LayerNorm"): f"output{number}.LayerNorm",
    }
    own = parts.get((block, part), f"attention{number}.self.{part}")
    return f"bert.encoder.{layer}.{own}.{kind}"


def their_state(model) -> dict[str, torch.Tensor]:
    state = {their_name(n, model.config): x.clone() for n, x in model.state_dict().items()}
    if "cls.predictions.bias" in state:
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    if "cls.predictions.bias" in state and "bert.embeddings.word_embeddings_2.weight" in state:
        state["cls.predictions.project_layer.weight"] = torch.randn(8, 24)  # random, as it leaves it
    return state


CASES = {
    "google": tiny(num_hidden_groups=2, inner_group_num=2),
    **{share: tiny(layout="brightmart", share_type=share) for share in ("all", "ffn", "attention", "none")},
    "preln": tiny(layout="brightmart", ln_type="preln"),
    "E=H": tiny(layout="brightmart", embedding_size=24),
}


@pytest.mark.parametrize("name", CASES)
def test_every_layout_and_sharing_is_recognised_and_gives_the_logits(name, tmp_path):
    config = CASES[name]
    model = perturbed(AlbertForPreTraining(config))
    torch.save(their_state(model), tmp_path / "pytorch_model.bin")
    neutral = config.model_copy(update={"layout": "google", "share_type": "all"})
    imported = read_albert_pytorch(tmp_path, neutral, {})
    assert imported.config == config
    assert imported.state.keys() == model.state_dict().keys()
    assert all(torch.equal(imported.state[n], x) for n, x in model.state_dict().items())
    ids, types, mask = padded(random_sequences(60))
    mlm, sop = build_model(imported.config, imported.state, name).forward_padded(ids, types, mask)
    plain_mlm, plain_sop = PlainAlbert(config, dict(model.state_dict())).logits(ids, types, mask)
    torch.testing.assert_close(mlm[mask], plain_mlm[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sop, plain_sop, rtol=1e-4, atol=1e-4)


def test_a_random_projection_is_tied_again_and_reported(tmp_path):
    model = AlbertForPreTraining(CASES["all"])
    torch.save(their_state(model), tmp_path / "pytorch_model.bin")
    imported = read_albert_pytorch(tmp_path, model.config, {})
    assert [n for n in imported.notes if n.startswith("cls.predictions.project_layer.weight differs")]
    tied = their_state(model)
    tied["cls.predictions.project_layer.weight"] = tied["bert.embeddings.word_embeddings_2.weight"].T.clone()
    torch.save(tied, tmp_path / "pytorch_model.bin")
    (note,) = read_albert_pytorch(tmp_path, model.config, {}).notes
    assert "give --hidden-act gelu for weights that it trained" in note
    assert read_albert_pytorch(tmp_path, model.config, {"hidden_act": "gelu_new"}).notes == []


def test_a_square_projection_is_multiplied_into_the_embeddings(tmp_path):
    """Later versions of albert_pytorch project even where E = H."""
    config = CASES["E=H"]
    model = perturbed(AlbertForPreTraining(config).double())
    projection = torch.randn(24, 24, dtype=torch.float64) / 5
    state = their_state(model)
    state["bert.embeddings.word_embeddings_2.weight"] = projection
    del state["cls.predictions.decoder.weight"]
    torch.save({n: x.float() for n, x in state.items()}, tmp_path / "pytorch_model.bin")
    imported = read_albert_pytorch(tmp_path, config, {})
    plain = dict(model.state_dict()) | {"albert.embeddings.word_embeddings_2.weight": projection}
    ids, types, mask = padded(random_sequences(60))
    expected, _ = PlainAlbert(config, plain).logits(ids, types, mask)
    ours, _ = build_model(imported.config, imported.state, "x").forward_padded(ids, types, mask)
    torch.testing.assert_close(ours[mask].double(), expected[mask], rtol=1e-4, atol=1e-4)
    assert "word_embeddings_2 between equal sizes was multiplied into word_embeddings" in imported.notes


def test_the_pooled_shift_of_its_classifier_is_folded_into_the_bias(tmp_path):
    model = perturbed(AlbertForSequenceClassification(tiny(), 3)).eval()
    torch.save(their_state(model), tmp_path / "pytorch_model.bin")
    imported = read_albert_pytorch(tmp_path, model.config, {}, legacy_pooled_shift=True)
    batch = random_sequences(60)
    _, pooled = model.albert(batch)
    expected = model.classifier(pooled + 0.1)
    ours = build_model(imported.config, imported.state, "x")(batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.save(their_state(AlbertForPreTraining(tiny())), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="--legacy-pooled-shift is for fine-tuned sequence classifiers"):
        read_albert_pytorch(tmp_path, model.config, {}, legacy_pooled_shift=True)


def test_data_parallel_prefix_and_span_head(tmp_path):
    model = AlbertForQuestionAnswering(tiny())
    state = {f"module.{n}": x for n, x in their_state(model).items()}
    torch.save(state, tmp_path / "best.pt")
    imported = read_albert_pytorch(tmp_path / "best.pt", model.config, {})
    assert torch.equal(imported.state["span_classifier.weight"], model.span_classifier.weight)


def test_names_that_are_not_understood_are_listed(tmp_path):
    state = their_state(AlbertForPreTraining(tiny()))
    state["bert.encoder.adapter.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"unexpected: bert\.encoder\.adapter\.weight"):
        read_albert_pytorch(tmp_path, tiny(), {})
    assert our_name("bert.encoder.adapter.weight", 1) is None


def test_command_reads_a_json_with_a_comment(tmp_path, capsys):
    model = AlbertForPreTraining(CASES["preln"])
    source = tmp_path / "source"
    source.mkdir()
    torch.save(their_state(model), source / "pytorch_model.bin")
    fields = model.config.model_dump(exclude={"layout", "share_type", "final_ln", "ln_type"})
    text = json.dumps({**fields, "hidden_act": "gelu", "pooler_type": "x"})[:-1]
    (source / "config.json").write_text(
        text + ',\n "ln_type": "preln" /**postln or preln**/, "share_type": "all"}'
    )
    run(["from-albert-pytorch", str(source), "--output", str(tmp_path / "model")])
    config, state, _ = load_pretrained(tmp_path / "model")
    assert config == model.config
    assert all(torch.equal(state[n], x) for n, x in model.state_dict().items())
    assert "note: cls.predictions.project_layer.weight differs" in capsys.readouterr().err
