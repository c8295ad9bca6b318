"""Hugging Face directories out and in: bitwise round trip, silent loading, equal logits and token ids."""

import json
import logging
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from model_samples import padded, perturbed, random_sequences, tiny

from albert.convert.cli import run
from albert.convert.huggingface_export import ARCHITECTURES, write_hugging_face
from albert.errors import ConfigError, DataError, MissingInputError, UnsafeError
from albert.finetune.task_card import TaskCard
from albert.heads import (
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)
from albert.pretrained import load_pretrained, save_pretrained
from albert.tokenization import load_tokenizer

TEXT = [
    'In 1999, there were 3,000 (three thousand) dogs -- and "5," cats.',
    "Fellow-citizens of the Senate: ``quotes'' and 'apostrophes' aren't alike; cafés serve naïve façades!",
    "Ｆｕｌｌ width, tabs\tand  double  spaces, an em — dash, 50% of £5 = €2.50 ...",
    "ΣΊΣΥΦΟΣ rolled İstanbul's ﬁne stone. 漢字 mixed 中文，标点。",
    "",
    "[MASK] <pad> [SEP]ish",
]
CORPUS = [
    "the senate and the house of representatives met in 1999, as in 1899, and in 1799,",
    "there were three thousand dogs (and some cats) - in the street, said the mayor of the city.",
    'he said "we are here" and they said "so are we", but nobody was there; it was late!',
    "fellow citizens of the republic, the rolling stone of sisyphus is a fine stone",
]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A small model with ALBERT's special pieces and user-defined punctuation."""
    import sentencepiece as spm

    directory = tmp_path_factory.mktemp("spm")
    (directory / "text").write_text("\n".join(CORPUS * 4))
    spm.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "spiece"),
        vocab_size=140,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        user_defined_symbols=["(", ")", '"', "-", ".", "£", "€"],
        minloglevel=2,
    )
    return directory / "spiece.model"


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    words = ["the", "senate", "and", "of", "in", "##s", "##e", "dogs", "cats", ",", ".", "(", ")"]
    words += ["-", "1999", "a", "##b", "c", "##d", "漢", "字", "中", "文"]
    path = tmp_path_factory.mktemp("wp") / "vocab.txt"
    path.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def silent(caplog):
    """Fails on any warning or log line of Hugging Face."""
    transformers.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        yield
    transformers.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []


MODELS = {
    "AlbertForPreTraining": AlbertForPreTraining,
    "AlbertForMaskedLM": AlbertForPreTraining,
    "AlbertModel": AlbertForPreTraining,
    "AlbertForSequenceClassification": lambda c: AlbertForSequenceClassification(c, 3),
    "AlbertForTokenClassification": lambda c: AlbertForTokenClassification(c, 5),
    "AlbertForQuestionAnswering": AlbertForQuestionAnswering,
    "AlbertForMultipleChoice": lambda c: AlbertForMultipleChoice(c, 2),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_class_loads_silently_and_comes_back_bitwise(architecture, tmp_path, silent, sentencepiece):
    vocab_size = load_tokenizer(sentencepiece).vocab_size
    config = tiny(vocab_size=vocab_size, num_hidden_groups=2, inner_group_num=2)
    model = perturbed(MODELS[architecture](config)).eval()
    save_pretrained(tmp_path / "ours", config, model.state_dict(), sentencepiece)
    run(["to-hf", str(tmp_path / "ours"), "--output", str(tmp_path / "hf"), "--architecture", architecture])

    twin = getattr(transformers, architecture).from_pretrained(tmp_path / "hf").eval()
    ids, types, mask = padded(random_sequences(vocab_size))
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long()}
    if architecture == "AlbertForMultipleChoice":
        theirs = twin(**{n: x[:, None] for n, x in inputs.items()})[0]
    else:
        theirs = twin(**inputs)[0]
    if architecture == "AlbertModel":
        ours = model.albert.forward_padded(ids, types, mask)[0]
    else:
        output = model.forward_padded(ids, types, mask)
        ours = output[0] if isinstance(output, tuple) else output
    real = mask if ours.shape[:2] == mask.shape else slice(None)
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)

    run(["from-hf", str(tmp_path / "hf"), "--output", str(tmp_path / "again")])
    again_config, state, tokenizer = load_pretrained(tmp_path / "again")
    assert again_config == config
    assert tokenizer.read_bytes() == sentencepiece.read_bytes()
    heads = ARCHITECTURES[architecture]
    own = {n: x for n, x in model.state_dict().items() if n.partition(".")[0] in heads}
    if architecture == "AlbertForMaskedLM":
        own = {n: x for n, x in own.items() if "pooler" not in n}
    assert state.keys() == own.keys()
    assert all(torch.equal(state[n], x) for n, x in own.items())


@pytest.mark.parametrize("architecture", ["AlbertForSequenceClassification", "AlbertForTokenClassification"])
def test_the_labels_of_a_fine_tuned_model_are_exported(architecture, tmp_path):
    model = MODELS[architecture](tiny())
    num_labels = 3 if architecture == "AlbertForSequenceClassification" else 5
    labels = ("O", "B-LOC", "I-LOC", "乙", "丙")[:num_labels]
    card = TaskCard(
        task="t", kind="classification", labels=labels, max_seq_length=32, metric="accuracy", score=None, seed=0
    )  # fmt: skip
    files = {"task.json": card.encode()}
    save_pretrained(tmp_path / "ours", model.config, model.state_dict(), None, files)
    run(["to-hf", str(tmp_path / "ours"), "--output", str(tmp_path / "hf")])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: number for number, label in enumerate(labels)}
    wrong = card.model_copy(update={"labels": ("a", "b")})
    (tmp_path / "ours" / "task.json").write_bytes(wrong.encode())
    with pytest.raises(DataError, match=rf"the model has {num_labels} outputs and 2 labels \(a, b\)"):
        run(["to-hf", str(tmp_path / "ours"), "--output", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_without_a_task_card_labels_are_numbered(tmp_path):
    model = AlbertForSequenceClassification(tiny(), 2)
    write_hugging_face(tmp_path / "hf", model.config, model.state_dict(), None)
    raw = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert raw["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert raw["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}


def test_layers_that_share_nothing_become_groups(tmp_path):
    config = tiny(share_type="none")
    model = perturbed(AlbertForPreTraining(config))
    write_hugging_face(tmp_path / "hf", config, model.state_dict(), None)
    twin = transformers.AlbertForPreTraining.from_pretrained(tmp_path / "hf").eval()
    assert twin.config.num_hidden_groups == 4
    ids, types, mask = padded(random_sequences(60))
    theirs = twin(input_ids=ids, token_type_ids=types, attention_mask=mask.long()).prediction_logits
    torch.testing.assert_close(
        model.forward_padded(ids, types, mask)[0][mask], theirs[mask], rtol=1e-5, atol=1e-5
    )
    _, state, _ = load_pretrained(tmp_path / "hf")
    assert all(torch.equal(state[n], x) for n, x in model.state_dict().items())


def test_auto_tokenizer_gives_our_ids(tmp_path, silent, sentencepiece):
    tokenizer = load_tokenizer(sentencepiece)
    config = tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    write_hugging_face(tmp_path / "hf", config, AlbertForPreTraining(config).state_dict(), sentencepiece)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "AlbertTokenizer"
    assert theirs.model_max_length == config.max_position_embeddings
    texts = [line for line in [*TEXT, *CORPUS] if "[" not in line]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts)
    pair = theirs("the senate", "dogs")
    a, b = tokenizer.encode_batch(["the senate", "dogs"])
    assert pair["input_ids"] == [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    ids = (
        theirs.pad_token_id,
        theirs.unk_token_id,
        theirs.cls_token_id,
        theirs.sep_token_id,
        theirs.mask_token_id,
    )
    assert ids == tokenizer.special_ids()


def test_auto_tokenizer_of_a_wordpiece_model(tmp_path, silent, wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    config = tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    write_hugging_face(tmp_path / "hf", config, AlbertForPreTraining(config).state_dict(), wordpiece)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "BertTokenizer"
    texts = [line for line in [*TEXT, *CORPUS] if "[" not in line]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "brightmart"}, "layout brightmart"),
        ({"ln_type": "preln"}, "ln_type preln"),
        ({"share_type": "ffn"}, "share_type ffn"),
        ({"share_type": "attention", "ln_type": "preln"}, r"ln_type preln .* and share_type attention"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(options, reason, tmp_path):
    config = tiny(**options)
    with pytest.raises(ConfigError, match=f"cannot express {reason}"):
        write_hugging_face(tmp_path / "hf", config, AlbertForPreTraining(config).state_dict(), None)
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_unfitting_architectures(tmp_path):
    config = tiny()
    state = AlbertForPreTraining(config).state_dict()
    with pytest.raises(
        ConfigError, match="--architecture BertModel: unknown; there are AlbertForPreTraining"
    ):
        write_hugging_face(tmp_path / "hf", config, state, None, "BertModel")
    with pytest.raises(
        ConfigError, match="the model has no classifier; it has albert, predictions, sop_classifier"
    ):
        write_hugging_face(tmp_path / "hf", config, state, None, "AlbertForSequenceClassification")
    odd = {n: x for n, x in state.items() if not n.startswith("predictions")}
    with pytest.raises(ConfigError, match="no Hugging Face class has the parts albert, sop_classifier"):
        write_hugging_face(tmp_path / "hf", config, odd, None)


@pytest.fixture
def theirs(tmp_path):
    """A directory that Hugging Face itself saved."""
    fields = tiny().model_dump(exclude={"layout", "ln_type", "share_type", "final_ln"})
    model = transformers.AlbertForPreTraining(transformers.AlbertConfig(**fields))
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def test_pytorch_model_bin_with_tied_copies_and_buffers(theirs):
    directory, model = theirs
    state = dict(model.state_dict())
    state["albert.embeddings.position_ids"] = torch.arange(32)[None]
    assert "predictions.decoder.weight" in state
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    _, ours, _ = load_pretrained(directory)
    assert torch.equal(ours["albert.pooler.weight"], model.albert.pooler.weight)
    assert len(ours) == 32


def test_sharded_safetensors(theirs):
    directory, _ = theirs
    state = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[:10], names[10:])):
        safetensors.torch.save_file({n: state[n] for n in part}, directory / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(load_pretrained(directory)[1]) == 32


def test_a_bare_encoder_has_no_prefix(tmp_path):
    fields = tiny().model_dump(exclude={"layout", "ln_type", "share_type", "final_ln"})
    model = transformers.AlbertModel(transformers.AlbertConfig(**fields))
    model.save_pretrained(tmp_path / "hf")
    _, ours, _ = load_pretrained(tmp_path / "hf")
    assert torch.equal(ours["albert.pooler.bias"], model.pooler.bias)
    assert all(name.startswith("albert.") for name in ours)


def test_an_untied_decoder_is_refused(theirs):
    directory, _ = theirs
    state = safetensors.torch.load_file(directory / "model.safetensors")
    state["predictions.decoder.weight"] = state["albert.embeddings.word_embeddings.weight"] + 1
    safetensors.torch.save_file(state, directory / "model.safetensors")
    with pytest.raises(DataError, match=r"predictions\.decoder\.weight differs from albert\.embeddings"):
        load_pretrained(directory)


def test_a_renamed_tensor_is_named(theirs):
    directory, _ = theirs
    state = safetensors.torch.load_file(directory / "model.safetensors")
    state["albert.pooler.wieght"] = state.pop("albert.pooler.weight")
    safetensors.torch.save_file(state, directory / "model.safetensors")
    with pytest.raises(
        DataError, match=r"missing: albert\.pooler\.weight; unexpected: albert\.pooler\.wieght"
    ):
        load_pretrained(directory)


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return print, ("code was run",)


def test_code_in_a_weights_file_is_not_run(theirs, capsys):
    directory, _ = theirs
    (directory / "model.safetensors").unlink()
    torch.save({"a": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(
        UnsafeError, match="refused, it holds more than tensors and reading it could run code"
    ):
        load_pretrained(directory)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 10, 3000, -10])
def test_a_truncated_weights_file_is_refused(theirs, kept):
    directory, model = theirs
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="damaged, truncated or no PyTorch file"):
        load_pretrained(directory)
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="not a state dict of tensors"):
        load_pretrained(directory)
    path.unlink()
    with pytest.raises(MissingInputError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        load_pretrained(directory)
