"""Recipes, overrides, and every message that a wrong configuration gets."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from albert.config import gradient_accumulation_steps, load_run_config, recipe_names
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
            r"\(50\) is not a multiple .* 48 and 64",
        ),
        (["schedule.end_learning_rate=1"], r"schedule.end_learning_rate \(1.0\) must not exceed"),
        (["schedule.name=wsd"], r"schedule.decay_steps \(0\) must be between 1 and"),
        (["model.preset=huge"], "model.preset: 'huge' is neither a preset"),
        (["model.share_type=ffn", "model.num_hidden_groups=2"], "share_type 'ffn' needs num_hidden_groups 1"),
        (["model.final_ln=true"], "final_ln is for ln_type preln"),
        (["train={"], r"override 'train=\{': the value is not valid YAML"),
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


def test_accumulation_is_derived_and_impossible_batches_name_the_nearest():
    config = load_run_config("base", ["train.global_batch_size=4096", "train.micro_batch_size=32"])
    assert gradient_accumulation_steps(config, 8) == 16
    with pytest.raises(
        ConfigError, match=r"\(4096\) .* world_size \(48\) = 1536; nearest multiples are 3072 and 4608"
    ):
        gradient_accumulation_steps(config, 48)


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
