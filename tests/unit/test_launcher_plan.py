"""The plan: parameters exact, memory by part, FLOPs, communication, and advice with its reason."""

import json
import sys

import pytest
import torch

from albert import cross_entropy
from albert.config import load_run_config
from albert.errors import ConfigError
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS
from launcher import cli, plan_memory
from launcher.devices import DEVICES, find_device
from launcher.plan import PlanRequest, communication_bytes, make_plan
from launcher.plan_memory import largest_micro_batch, num_parameters, peak_memory


def request(
    recipe: str, *overrides: str, nodes: int = 8, gpus: int = 8, device: str = "h200", **other
) -> PlanRequest:
    config = load_run_config(recipe, ["data.directory=d", "train.output_dir=o", *overrides])
    seq_length = other.pop("seq_length", config.model.max_position_embeddings)
    return PlanRequest(config, nodes, gpus, find_device(device), seq_length, other.pop("network", 400))


@pytest.mark.parametrize("share_type", ["all", "ffn", "attention", "none"])
@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_parameters_are_counted_exactly(preset, share_type):
    config = MODEL_PRESETS[preset].model_copy(update={"share_type": share_type})
    with torch.device("meta"):
        model = AlbertForPreTraining(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_xlarge_on_64_gpus_as_by_hand():
    plan = make_plan(request("xlarge"))
    assert plan.accumulation_steps == 2
    # 2,097,152 tokens of 7.555 GFLOP, as published figures are compared in GFLOP per token, less what the last layer
    # need not compute for the 434 of 512 tokens that are neither first nor predicted: 3 x (4 + 16 + 1) x 2048^2 each.
    expected = 4096 * (512 * 7.555e9 - 434 * 3 * 21 * 2048**2)
    assert plan.flops_per_step == pytest.approx(expected, rel=1e-3)
    # 60 % of 0.8 x 989 TFLOP/s on 64 GPUs.
    assert plan.compute_s == pytest.approx(plan.flops_per_step / (64 * 0.6 * 0.8 * 989e12), rel=1e-6)
    gradients = 2 * 63 / 64 * 4 * num_parameters(MODEL_PRESETS["xlarge"])
    weights = 63 / 64 * 2 * num_parameters(MODEL_PRESETS["xlarge"])
    assert plan.communication_s == pytest.approx((gradients + weights) / 50e9, rel=1e-6)
    assert plan.days == pytest.approx(125_000 * plan.step_s / 86400)
    assert plan.advice == ()


def test_activations_are_16_hidden_values_per_token_and_layer_use():
    """In the last use, 13 of them for the 78 tokens that are needed only."""
    memory = make_plan(request("base")).memory
    tokens = load_run_config("base").train.micro_batch_size * 512
    values = tokens * (12 * 16 - 13 * (1 - 78 / 512)) * 768 * 2
    assert values < memory.activations < 1.01 * values


def test_the_plan_counts_the_logits_that_the_loss_holds_at_a_time():
    assert plan_memory.LOGITS_AT_A_TIME == cross_entropy.LOGITS_AT_A_TIME
    model = MODEL_PRESETS["base"]
    gradient = 4 * 30000 * 129
    assert plan_memory.vocabulary_bytes(model, 10, 2) == 10 * 30000 * (2 + 4 + 4) + gradient
    assert plan_memory.vocabulary_bytes(model, 10**6, 4) == 559 * 30000 * (4 + 4) + gradient


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    asked = request("xxlarge", gpus=1, nodes=1)
    sizes = {"seq_length": 512, "preds": 77}
    budget = asked.device.usable_bytes
    largest = largest_micro_batch(asked.config, 1, 1, budget=budget, **sizes)

    def total(micro_batch: int) -> int:
        train = asked.config.train.model_copy(update={"micro_batch_size": micro_batch})
        return peak_memory(asked.config.model_copy(update={"train": train}), 1, 1, **sizes).total

    assert total(largest) <= budget < total(largest + 1)


def test_stages_differ_in_what_they_send():
    asked = request("base", "train.micro_batch_size=8", nodes=1)
    parameters = num_parameters(MODEL_PRESETS["base"])
    per_rank = 7 / 8 * parameters
    expected = {0: 2 * 4, 1: 2 * 4 + 2, 2: 64 * 4 + 2, 3: 64 * (4 + 2 * 2)}
    for stage, factor in expected.items():
        assert communication_bytes(asked, stage, 64) == pytest.approx(factor * per_rank)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["deepspeed.config=zero3"], "ZeRO-3 is wasteful here: layers are shared, so 59 M parameters"),
        (["deepspeed.config=zero2"], "use deepspeed.config=zero1"),
        (["train.activation_checkpointing=true"], "activation checkpointing costs a third more computation"),
        (["train.micro_batch_size=4"], "train.micro_batch_size=32"),
    ],
)
def test_a_wasteful_choice_is_named_with_its_reason(overrides, advice):
    assert any(advice in text for text in make_plan(request("xlarge", *overrides, nodes=2)).advice)


def test_a_micro_batch_that_does_not_fit_gets_one_that_does():
    advice = make_plan(request("xxlarge", "train.micro_batch_size=64", nodes=1, device="a100-40")).advice
    assert any("does not fit: at most" in text and "use train.micro_batch_size=32" in text for text in advice)


@pytest.mark.parametrize(
    ("device", "overrides", "advice"),
    [
        (
            "v100",
            [],
            "v100 has no bf16 products (compute capability 8.0 or later has): use train.precision=fp16",
        ),
        ("a100-80", ["train.fp8=on"], "a100-80 has no float8 products"),
        ("h100", ["train.fp8=on"], "the times are those of bf16 products"),
    ],
)
def test_a_precision_that_the_device_lacks_is_named(device, overrides, advice):
    assert any(
        advice in text for text in make_plan(request("xlarge", *overrides, nodes=2, device=device)).advice
    )
    assert not any(
        "products" in text for text in make_plan(request("xlarge", nodes=2, device="a100-80")).advice
    )


def test_too_many_nodes_for_the_work_are_named():
    plan = make_plan(request("base", "train.micro_batch_size=8", nodes=64, network=100))
    assert any("of a step is communication; fewer nodes" in text for text in plan.advice)
    assert any("deepspeed.config=zero1_bf16_reduction sends half" in text for text in plan.advice)


def test_gradients_that_are_summed_in_bf16_are_half_the_bytes():
    asked = request("base", "train.micro_batch_size=8", "deepspeed.config=zero1_bf16_reduction", nodes=1)
    expected = 7 / 8 * num_parameters(MODEL_PRESETS["base"]) * (2 * 2 + 2)
    assert communication_bytes(asked, 1, 64) == pytest.approx(expected)
    assert not any("zero1_bf16_reduction" in text for text in make_plan(asked).advice)


def test_efficiency_follows_the_hidden_size():
    device = DEVICES["h200"]
    assert [device.efficiency(size) for size in (768, 1024, 2048, 4096, 8192)] == [
        0.47,
        0.52,
        0.60,
        0.65,
        0.65,
    ]
    assert device.efficiency(384) == pytest.approx(0.235)


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["launcher", "plan", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command_reports_and_prints_json(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "--config", "xlarge", "--nodes", "8", "--gpu", "h200")
    assert code == 0
    assert "batch        4096 = 32 x 2 accumulated x 64 ranks" in output
    assert "run          predicted 0.7" in output
    code, output, _ = run(monkeypatch, capsys, "--config", "xlarge", "--nodes", "8", "--json")
    assert json.loads(output)["num_ranks"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config xlarge --nodes 3", "nearest multiples"),
        ("--config xlarge --nodes 0", "--nodes 0: give 1 or more"),
        ("--config xlarge --gpu tpu", "--gpu 'tpu': not known; known are h200"),
        ("--config xlarge --seq-length 513", "--seq-length 513: 1 to model.max_position_embeddings (512)"),
        ("--config xlarge model.hidden=3", "model.hidden: unknown key"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, words, message):
    code, _, errors = run(monkeypatch, capsys, *words.split())
    assert code == 78
    assert message in errors


def test_an_unknown_device_lists_the_known():
    with pytest.raises(ConfigError, match="rtx4090"):
        find_device("x")
