"""Recipes, overrides, and every message that a wrong configuration gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from albert.config import gradient_accumulation_steps, load_run_config, recipe_names
from albert.config_files import read_yaml
from albert.deepspeed_config import build_deepspeed_config, placement_names, read_placement
from albert.errors import ConfigError, MissingInputError
from albert.model_config import MODEL_PRESETS, ModelConfig, read_model_config, write_model_config
from albert.resuming import check_resumable

RECIPES = ["base", "demo", "large", "small_zh", "tiny_zh", "xlarge", "xxlarge"]
PLACEMENTS = ["zero0", "zero1", "zero1_bf16_reduction", "zero2", "zero2_offload", "zero3"]


def test_recipes_and_placements_are_those_that_are_documented():
    assert recipe_names() == RECIPES
    assert placement_names() == PLACEMENTS


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_recipe_fits_every_placement(recipe, placement):
    config = load_run_config(recipe, [f"deepspeed.config={placement}"])
    if placement == "zero0" and config.train.precision != "fp32":
        with pytest.raises(ConfigError, match="ZeRO stage 0 accumulates gradients in 16 bits"):
            build_deepspeed_config(config, world_size=2)
        return
    result = build_deepspeed_config(config, world_size=2)
    assert result["train_batch_size"] == config.train.global_batch_size
    factors = result["train_micro_batch_size_per_gpu"] * result["gradient_accumulation_steps"] * 2
    assert factors == config.train.global_batch_size
    assert result["gradient_clipping"] == config.optimizer.max_grad_norm
    assert result["bf16"]["enabled"] is (config.train.precision == "bf16")
    assert "auto" not in str(result)


def test_checking_a_recipe_takes_milliseconds():
    load_run_config("base")
    begin = time.perf_counter()
    for _ in range(10):
        build_deepspeed_config(load_run_config("xlarge"), 8)
    assert (time.perf_counter() - begin) / 10 < 0.1


def test_published_numbers():
    config = load_run_config("xlarge")
    assert (config.train.global_batch_size, config.train.num_steps) == (4096, 125000)
    assert (config.optimizer.learning_rate, config.schedule.warmup_steps) == (0.00176, 3125)
    assert (config.model.hidden_size, config.model.num_attention_heads) == (2048, 16)
    assert load_run_config("tiny_zh").schedule.warmup_steps == 12500


def test_overrides_are_typed():
    config = load_run_config("base", ["optimizer.learning_rate=1e-3", "seed=7", "data.num_lanes=48"])
    assert (config.optimizer.learning_rate, config.seed, config.data.num_lanes) == (0.001, 7, 48)


def test_all_problems_are_reported_at_once():
    overrides = [
        "train.num_step=5",
        "train.micro_batch_size=-1",
        "foo=1",
        "schedule.name=polinomial",
        "model.hidden_size=130",
        "nonsense",
        "data.num_lanes=0",
    ]
    with pytest.raises(ConfigError) as caught:
        load_run_config("demo", overrides)
    message = str(caught.value)
    for expected in (
        "demo: train.num_step: unknown key; did you mean 'num_steps'?",
        "train.micro_batch_size: input should be greater than or equal to 1, got -1",
        "foo: unknown key; valid here: model, data, train",
        "schedule.name: input should be 'google_polynomial', 'polynomial'",
        "model: hidden_size (130) is not a multiple of num_attention_heads",
        "override 'nonsense' is not of the form section.key=value",
        "data: num_lanes (0) must be 'auto' or at least 1",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule.warmup_steps=600"],
            r"schedule.warmup_steps \(600\) must be less than train.num_steps \(600\)",
        ),
        (
            ["train.global_batch_size=50", "train.micro_batch_size=16"],
            r"\(50\) is not a multiple of train.micro_batch_size \(16\); take a multiple of 16 x world_size, or a "
            r"train.micro_batch_size that divides 50 / world_size",
        ),
        (["schedule.end_learning_rate=1"], r"schedule.end_learning_rate \(1.0\) must not exceed"),
        (["schedule.name=wsd"], r"schedule.decay_steps \(0\) must be between 1 and"),
        (["model.preset=huge"], "model.preset: 'huge' is neither a preset"),
        (["model.share_type=ffn", "model.num_hidden_groups=2"], "share_type 'ffn' needs num_hidden_groups 1"),
        (["model.final_ln=true"], "final_ln is for ln_type preln"),
        (["train={"], r"override 'train=\{': the value is not valid YAML"),
        (["seed=2024-13-01"], "override 'seed=2024-13-01': the value is not valid YAML"),
    ],
)
def test_contradictions(overrides, message):
    steps = ["train.num_steps=600"]
    with pytest.raises(ConfigError, match=message):
        load_run_config("demo", steps + overrides)


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(MissingInputError, match="recipes are base, demo"):
        load_run_config("bsae")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_run_config(str(broken))
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="holds no sections"):
        load_run_config(str(broken))
    broken.write_text("model: {preset: base}\n")
    with pytest.raises(ConfigError, match=r"data: missing; give it in the file or as data=VALUE"):
        load_run_config(str(broken))


_CHINESE = "# 模型\nmodel: {preset: base}\ndata: {directory: 数据}\n"


def test_configurations_are_utf_8(tmp_path: Path):
    path = tmp_path / "chinese.yaml"
    path.write_text(_CHINESE, encoding="gbk")
    with pytest.raises(ConfigError, match=r"chinese\.yaml: line 1 is not UTF-8; convert the file to UTF-8"):
        load_run_config(str(path))
    path.write_text('{"seed": 1,\n "模型": 1}', encoding="gbk")
    with pytest.raises(ConfigError, match=r"chinese\.yaml: line 2 is not UTF-8; convert the file to UTF-8"):
        read_placement(str(path))


def test_configurations_are_read_alike_in_every_locale(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(_CHINESE, encoding="utf-8-sig")
    (tmp_path / "placement.json").write_text('{"seed": "种子"}', encoding="utf-8")
    code = (
        "import locale\n"
        "from albert.config_files import read_yaml\n"
        "from albert.deepspeed_config import Path, read_placement\n"
        "assert locale.getpreferredencoding(False) != 'UTF-8'\n"
        "print(ascii([read_yaml(Path('run.yaml')), read_placement('placement.json')]))"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **ascii_only},
        check=False,
    )
    wanted = [{"model": {"preset": "base"}, "data": {"directory": "数据"}}, {"seed": "种子"}]
    assert (result.stdout.rstrip(), result.stderr) == (ascii(wanted), "")


def test_yaml_merges_and_keys_of_other_types_are_no_repetition(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: &base {a: 1, b: 2}\nother: &other {c: 3}\nboth: {<<: *base, <<: *other}\n"
        "one: {nested: &nested {<<: *base, b: 3}}\ntwo: {<<: *nested, 1: x, '1': y}\n"
    )
    values = read_yaml(path)
    assert values["both"] == {"a": 1, "b": 2, "c": 3}
    assert values["two"] == {"a": 1, "b": 3, 1: "x", "1": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\x07", "unacceptable character #x0007"),
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice in .*, line 2, column 1"),
        ("train:\n  num_steps: 1\n  precision: fp32\n  num_steps: 2\n", "key 'num_steps' is given twice .* line 4"),
        ("seed: 2024-13-01\n", "month must be in 1..12"),
    ],
)  # fmt: skip
def test_yaml_that_does_not_say_what_it_means_is_refused(tmp_path: Path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: not valid YAML: {message}"):
        load_run_config(str(path))


def test_accumulation_is_derived_and_impossible_batches_name_the_nearest():
    config = load_run_config("base", ["train.global_batch_size=4096", "train.micro_batch_size=32"])
    assert gradient_accumulation_steps(config, 8) == 16
    with pytest.raises(
        ConfigError, match=r"\(4096\) .* world_size \(48\) = 1536; nearest multiples are 3072 and 4608"
    ):
        gradient_accumulation_steps(config, 48)


@pytest.mark.parametrize(
    ("batch", "micro_batch", "world_size", "cure"),
    [
        (4096, 64, 4096, "take 262144, or set train.micro_batch_size=1"),
        (100, 20, 2, "nearest multiples are 80 and 120, or set train.micro_batch_size=10"),
        (100, 50, 5, "take 250, or set train.micro_batch_size=20"),
        (96, 32, 5, "take 160"),
    ],
)
def test_what_is_proposed_divides_over_the_ranks(batch, micro_batch, world_size, cure):
    sizes = [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro_batch}"]
    with pytest.raises(ConfigError) as caught:
        gradient_accumulation_steps(load_run_config("base", sizes), world_size)
    assert str(caught.value).endswith(f"= {micro_batch * world_size}; {cure}")
    for name, size in re.findall(r"(take|micro_batch_size=|multiples are|and) ?(\d+)", cure):
        key = "micro" if name.startswith("micro") else "global"
        mended = load_run_config("base", [*sizes, f"train.{key}_batch_size={size}"])
        assert gradient_accumulation_steps(mended, world_size) >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"zero_optimisation": {"stage": 2}}',
            "zero_optimisation: unknown key; did you mean 'zero_optimization'",
        ),
        ('{"train_batch_size": 8}', r"train_batch_size \(8\): owned by train.global_batch_size"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled .* owned by train.precision"),
        ('{"optimizer": {"type": "Lamb"}}', "optimizer: not allowed here"),
        ('{"zero_optimization": {"stage": "auto"}}', '"auto" is not understood'),
        ('{"communication_data_type": "float32"}', "must be one of fp32, bf16, fp16"),
        ('{"communication_data_type": null}', "must be one of fp32, bf16, fp16"),
        ('{"activation_checkpointing": {}}', "use train.activation_checkpointing"),
        ("{", "not valid JSON"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_placement_files_are_checked(tmp_path: Path, text, message):
    path = tmp_path / "placement.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_placement(str(path))


def test_placement_may_leave_owned_keys_to_the_run(tmp_path: Path):
    path = tmp_path / "placement.json"
    fp16 = {"initial_scale_power": 8}
    placement = {"train_batch_size": "auto", "fp16": fp16, "zero_optimization": {"stage": 1}}
    path.write_text(json.dumps(placement))
    config = load_run_config("base", [f"deepspeed.config={path}", "train.precision=fp16"])
    result = build_deepspeed_config(config, 4)
    assert result["train_batch_size"] == 4096
    assert result["fp16"] == {"initial_scale_power": 8, "enabled": True}
    with pytest.raises(MissingInputError, match="zero9"):
        read_placement("zero9")


def test_model_config_round_trip(tmp_path: Path):
    for name, preset in MODEL_PRESETS.items():
        write_model_config(preset, tmp_path / f"{name}.json")
        assert read_model_config(tmp_path / f"{name}.json") == preset


def test_foreign_model_configs(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(
        '{"hidden_act": "gelu", "ln_type": "preln" /**postln or preln**/, "hidden_size": 1024, "vocab_size": 21128,'
        ' "num_attention_heads": 16, "intermediate_size": 4096, "pooler_type": "first_token_transform"}'
    )
    config = read_model_config(path)
    assert (config.layout, config.ln_type, config.hidden_act) == ("brightmart", "preln", "gelu_new")
    path.write_text('{"model_type": "albert", "hidden_act": "gelu", "vocab_size": 30000}')
    assert read_model_config(path).hidden_act == "gelu"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_model_config(path)
    path.write_text('{"hidden_size": "many"}')
    with pytest.raises(ConfigError, match="hidden_size"):
        read_model_config(path)
    with pytest.raises(MissingInputError, match="no such model configuration"):
        read_model_config(tmp_path / "absent.json")


def test_unknown_keys_are_refused_in_our_own_configs(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "albert-pretraining", "hiden_size": 4}')
    with pytest.raises(ConfigError, match="hiden_size"):
        read_model_config(path)
    assert ModelConfig().num_layer_uses == 12


def test_only_what_changes_the_mathematics_must_stay():
    stored = load_run_config("base").model_dump(mode="json")
    same = {"dataset": ("a", "a")}
    free = load_run_config(
        "base",
        [
            "train.micro_batch_size=8",
            "deepspeed.config=zero3",
            "log.interval_steps=1",
            "data.directory=other",
        ],
    )
    check_resumable(stored, free, same, "run")
    del stored["data"]["remask"]  # a checkpoint that is older than the key
    check_resumable(stored, free, same, "run")
    other = load_run_config("base", ["seed=3", "train.global_batch_size=2048"])
    with pytest.raises(ConfigError, match=r"seed: 12345 in the checkpoint, 3 now; train.global_batch_size"):
        check_resumable(stored, other, same, "run")
    allowed = load_run_config(
        "base",
        [
            "seed=3",
            "train.global_batch_size=2048",
            "checkpoint.allow_changes=[seed, train.global_batch_size]",
        ],
    )
    with pytest.raises(ConfigError, match=r"dataset: hash a in the checkpoint, b now"):
        check_resumable(stored, allowed, {"dataset": ("a", "b")}, "run")
    check_resumable(stored, allowed, same, "run")


def test_bare_on_and_off_are_words():
    """YAML 1.1 reads them as booleans."""
    config = load_run_config("demo", ["log.progress=off", "train.compile=on"])
    assert (config.log.progress, config.train.compile) == ("off", "on")
