"""TensorFlow checkpoints: real files of both layouts, read without TensorFlow, logits against numpy."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tf_albert
import torch

from albert.convert.cli import run
from albert.convert.crc32c import crc32c
from albert.convert.foreign import our_name
from albert.convert.tensor_bundle import TensorBundle
from albert.convert.tensorflow import dotted_name, read_tensorflow
from albert.errors import AlbertError, ConfigError, DataError, MissingInputError
from albert.model_config import MODEL_PRESETS, ModelConfig
from albert.pretrained import load_pretrained
from albert.weights import build_model, expected_shapes

FIXTURES = Path(__file__).parent.parent / "fixtures"
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


@pytest.fixture(params=["checked in", "written now"])
def checkpoints(request, tmp_path):
    """Directory with checkpoints that TensorFlow wrote."""
    if request.param == "checked in":
        return FIXTURES
    if not HAS_TENSORFLOW:
        pytest.skip("TensorFlow is not installed (extra `tf`)")
    for name in tf_albert.MODELS:
        tf_albert.write(tmp_path / f"{name}.ckpt", tf_albert.stored(name))
    return tmp_path


def foreign_config(name):
    """The configuration as the checkpoint's own json would say it: without the layout."""
    fields = {k: v for k, v in tf_albert.config_fields(name).items() if k not in ("layout",)}
    return ModelConfig(**fields)


def relative(ours, expected):
    return np.abs(ours.detach().numpy() - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", tf_albert.MODELS)
def test_every_variable_is_read_as_tensorflow_wrote_it(name, checkpoints):
    bundle = TensorBundle(checkpoints / f"{name}.ckpt")
    stored = tf_albert.stored(name)
    assert set(bundle.entries) == set(stored)
    for variable, value in stored.items():
        read = bundle.read(variable)
        assert read.dtype == value.dtype
        assert np.array_equal(read, value)


@pytest.mark.parametrize("name", tf_albert.MODELS)
def test_logits_equal_an_independent_forward(name, checkpoints):
    imported = read_tensorflow(checkpoints / f"{name}.ckpt", foreign_config(name), {})
    assert imported.config.layout == tf_albert.MODELS[name]["layout"]
    rng = np.random.default_rng(0)
    ids, types = rng.integers(60, size=(3, 12)), rng.integers(2, size=(3, 12))
    expected_mlm, expected_sop = tf_albert.NumpyAlbert(name).logits(ids, types)
    state = dict(imported.state)
    if "sop_classifier.weight" not in state:  # the hub module has no sentence-order head
        state |= {"sop_classifier.weight": torch.zeros(2, 24), "sop_classifier.bias": torch.zeros(2)}
        expected_sop = np.zeros_like(expected_sop) + 1e-30
    model = build_model(imported.config, state, name)
    mlm, sop = model.forward_padded(torch.from_numpy(ids), torch.from_numpy(types), torch.ones(3, 12))
    assert relative(mlm, expected_mlm) < 1e-5
    assert np.abs(sop.detach().numpy() - expected_sop).max() < 1e-5 * np.abs(expected_sop).max() + 1e-20


def test_optimizer_slots_are_passed_over_and_counted():
    imported = read_tensorflow(FIXTURES / "google.ckpt", foreign_config("google"), {})
    model_variables = len(tf_albert.shapes("google"))
    assert len(imported.state) == model_variables
    assert imported.notes[0] == f"{2 * model_variables + 1} optimizer slots and counters were passed over"


def test_command_writes_a_model_that_loads_bitwise(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(FIXTURES / f"google.ckpt{suffix}", source / f"model.ckpt-best{suffix}")
    fields = {k: v for k, v in tf_albert.config_fields("google").items() if k != "layout"}
    (source / "albert_config.json").write_text(
        json.dumps({**fields, "hidden_act": "gelu", "net_structure_type": 0})
    )
    run(["from-tf", str(source), "--output", str(tmp_path / "model")])
    config, state, tokenizer = load_pretrained(tmp_path / "model")
    assert config == ModelConfig(**tf_albert.config_fields("google"))
    values = tf_albert.variables("google")
    for variable, value in values.items():
        ours = state[our_name(dotted_name(variable), 2)].numpy()
        assert np.array_equal(ours, value.T if variable.endswith("kernel") else value)
    assert len(state) == len(values)
    assert tokenizer is None
    output = capsys.readouterr()
    assert "optimizer slots and counters were passed over" in output.err
    assert f"{sum(v.size for v in values.values()):,} parameters, layout google, parts albert" in output.out
    assert output.out.rstrip().endswith("parts albert pooler predictions sop_classifier")


def test_published_tiny_zh_matches_name_by_name_and_shape_by_shape():
    """The 31 variables of brightmart's albert_tiny_zh, as its index file lists them."""
    hidden, inner, embed = 312, 1248, 128
    scope = "bert/encoder/layer_shared"
    published = {
        "bert/embeddings/LayerNorm/beta": [hidden],
        "bert/embeddings/LayerNorm/gamma": [hidden],
        "bert/embeddings/position_embeddings": [512, hidden],
        "bert/embeddings/token_type_embeddings": [2, hidden],
        "bert/embeddings/word_embeddings": [21128, embed],
        "bert/embeddings/word_embeddings_2": [embed, hidden],
        f"{scope}/attention/output/LayerNorm/beta": [hidden],
        f"{scope}/attention/output/LayerNorm/gamma": [hidden],
        f"{scope}/attention/output/dense/bias": [hidden],
        f"{scope}/attention/output/dense/kernel": [hidden, hidden],
        **{f"{scope}/attention/self/{n}/bias": [hidden] for n in ("key", "query", "value")},
        **{f"{scope}/attention/self/{n}/kernel": [hidden, hidden] for n in ("key", "query", "value")},
        f"{scope}/intermediate/dense/bias": [inner],
        f"{scope}/intermediate/dense/kernel": [hidden, inner],
        f"{scope}/output/LayerNorm/beta": [hidden],
        f"{scope}/output/LayerNorm/gamma": [hidden],
        f"{scope}/output/dense/bias": [hidden],
        f"{scope}/output/dense/kernel": [inner, hidden],
        "bert/pooler/dense/bias": [hidden],
        "bert/pooler/dense/kernel": [hidden, hidden],
        "cls/predictions/output_bias": [21128],
        "cls/predictions/transform/LayerNorm/beta": [hidden],
        "cls/predictions/transform/LayerNorm/gamma": [hidden],
        "cls/predictions/transform/dense/bias": [hidden],
        "cls/predictions/transform/dense/kernel": [hidden, hidden],
        "cls/seq_relationship/output_bias": [2],
        "cls/seq_relationship/output_weights": [2, hidden],
    }
    assert len(published) == 31
    assert sum(int(np.prod(s)) for s in published.values()) == 4_295_186
    ours = {}
    for variable, shape in published.items():
        is_transposed = variable.endswith(("/kernel", "/word_embeddings_2"))
        ours[our_name(dotted_name(variable), 1)] = tuple(reversed(shape)) if is_transposed else tuple(shape)
    expected = expected_shapes(MODEL_PRESETS["tiny_brightmart"])
    pretraining = {
        n: s for n, s in expected.items() if n.split(".")[0] in ("albert", "predictions", "sop_classifier")
    }
    assert ours == pretraining


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("output_weights", "classifier.weight"),
        ("output_bias", "classifier.bias"),
        ("cls/squad/output_weights", "span_classifier.weight"),
        ("cls/squad/output_bias", "span_classifier.bias"),
        ("module/bert/pooler/dense/kernel", "albert.pooler.weight"),
        (
            "bert/encoder/transformer/group_1/inner_group_2/ffn_1/intermediate/output/dense/bias",
            "albert.encoder.feed_forward.5.output.bias",
        ),
        ("bert/something/kernel", None),
    ],
)
def test_names(variable, name):
    assert our_name(dotted_name(variable), 3) == name


@pytest.fixture
def broken(tmp_path):
    """A copy of the google checkpoint to break."""
    for file in FIXTURES.glob("google.ckpt*"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / "google.ckpt"


def refusal(path, config=None) -> AlbertError:
    with pytest.raises(AlbertError) as caught:
        read_tensorflow(path, config or foreign_config("google"), {})
    return caught.value


def test_truncated_data_is_refused(broken):
    data = Path(f"{broken}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:100_000])
    error = refusal(broken)
    assert isinstance(error, DataError)
    assert "truncated, variable" in str(error)
    assert "the file has 100000" in str(error)


def test_a_flipped_bit_is_refused_and_the_variable_named(broken):
    entry = TensorBundle(broken).entries["bert/pooler/dense/kernel"]
    path = Path(f"{broken}.data-00000-of-00001")
    data = bytearray(path.read_bytes())
    data[entry.offset + 5] ^= 1
    path.write_bytes(data)
    error = refusal(broken)
    assert isinstance(error, DataError)
    assert "checksum mismatch in variable bert/pooler/dense/kernel" in str(error)


@pytest.mark.parametrize("position", [100, -60, -3])
def test_a_damaged_index_is_refused(broken, position):
    path = Path(f"{broken}.index")
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged or no TensorFlow checkpoint index"):
        TensorBundle(broken)


def test_missing_files_are_named(broken):
    Path(f"{broken}.data-00000-of-00001").unlink()
    assert "data-00000-of-00001: missing; a checkpoint is" in str(refusal(broken))
    error = refusal(broken.with_name("other.ckpt"))
    assert isinstance(error, MissingInputError)
    assert "other.ckpt.index does not exist" in str(error)


def test_a_directory_with_several_checkpoints_asks_for_one():
    with pytest.raises(MissingInputError, match=r"brightmart.ckpt.index, google.ckpt.index, hub.ckpt.index"):
        TensorBundle(FIXTURES)


def test_a_directory_follows_its_checkpoint_file_and_hub_modules(tmp_path):
    for name, target in (("google", "model.ckpt-7"), ("hub", "model.ckpt-8")):
        for suffix in (".index", ".data-00000-of-00001"):
            shutil.copy(FIXTURES / f"{name}.ckpt{suffix}", tmp_path / f"{target}{suffix}")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/somewhere/model.ckpt-8"\n')
    assert TensorBundle(tmp_path).prefix.name == "model.ckpt-8"
    (tmp_path / "hub" / "variables").mkdir(parents=True)
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(FIXTURES / f"hub.ckpt{suffix}", tmp_path / "hub" / "variables" / f"variables{suffix}")
    assert len(read_tensorflow(tmp_path / "hub", foreign_config("hub"), {}).state) == 30


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"hidden_size": 48},
            ["wrong shape: ", "albert.encoder.attention.0.query.weight is [24, 24] instead of [48, 48]"],
        ),
        (
            {"num_hidden_groups": 1},
            ["unexpected: albert.encoder.attention.2.", " and 20 more; use the configuration"],
        ),
        ({"num_hidden_groups": 4}, ["missing: albert.encoder.attention.4.query.weight"]),
        ({"vocab_size": 61}, ["albert.embeddings.word_embeddings.weight is [60, 8] instead of [61, 8]"]),
    ],
)
def test_a_configuration_of_another_model_is_refused_with_the_difference(change, parts):
    config = ModelConfig(**{**foreign_config("google").model_dump(), **change})
    error = refusal(FIXTURES / "google.ckpt", config)
    assert isinstance(error, DataError)
    for part in parts:
        assert part in str(error)


def test_nothing_is_written_when_the_import_fails(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**tf_albert.config_fields("google"), "hidden_size": 48}))
    with pytest.raises(DataError):
        run(
            [
                "from-tf",
                f"{FIXTURES}/google.ckpt",
                "--config",
                str(config),
                "--output",
                str(tmp_path / "model"),
            ]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_checkpoint_that_is_no_albert_is_refused(monkeypatch):
    bundle_names = {f"other/{n}" for n in tf_albert.stored("google")}
    from albert.convert.foreign import detect_layout

    names = [dotted_name(n.replace("embedding_hidden_mapping_in", "x")) for n in bundle_names]
    with pytest.raises(DataError, match="holds no ALBERT: neither encoder/embedding_hidden_mapping_in"):
        detect_layout(names, "model.ckpt")


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match=r"num_attention_heads=7: .*not a multiple of num_attention_heads"):
        read_tensorflow(FIXTURES / "google.ckpt", foreign_config("google"), {"num_attention_heads": 7})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the check value of the CRC catalogue
        (bytes(32), 0x8A9136AA),  # RFC 3720, appendix B.4
        (bytes([255] * 32), 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_of_published_vectors(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", [2047, 2048, 4096, 4097, 50_001])
def test_crc32c_in_lanes_equals_byte_by_byte(length):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as byte_by_byte

    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    assert crc32c(data) == byte_by_byte(data)
