"""Schedules, LAMB and AdamW against published numbers and references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from albert.config import OptimizerConfig, ScheduleConfig
from albert.heads import AlbertForSequenceClassification
from albert.model_config import ModelConfig
from albert.optim.groups import is_excluded, parameter_groups, rate_factors
from albert.optim.lamb import Lamb, build_optimizer
from albert.optim.schedules import learning_rate


def rate(name: str, step: int, *, peak: float = 1.0, total: int = 100, **keys) -> float:
    return learning_rate(ScheduleConfig(name=name, **keys), peak, total, step)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1562, 0.0008797184), (3124, 0.0017594368), (3125, 0.001716), (62500, 0.00088), (125000, 0.0)],
)
def test_googles_schedule(step, expected):
    got = rate("google_polynomial", step, peak=0.00176, total=125000, warmup_steps=3125)
    assert got == pytest.approx(expected, rel=1e-12)


def test_brightmarts_warmup_jumps_to_the_published_rate():
    before = rate("google_polynomial", 12499, peak=0.00176, total=125000, warmup_steps=12500)
    after = rate("google_polynomial", 12500, peak=0.00176, total=125000, warmup_steps=12500)
    assert (round(before, 6), round(after, 6)) == (0.00176, 0.001584)


def test_the_other_schedules_are_continuous_and_closed_form():
    for name in ("polynomial", "linear", "cosine", "constant"):
        assert rate(name, 5, warmup_steps=10) == 0.5
        assert rate(name, 10, warmup_steps=10) == 1.0
    assert rate("linear", 55, warmup_steps=10) == pytest.approx(0.5)
    assert rate("linear", 100, warmup_steps=10, end_learning_rate=0.1) == pytest.approx(0.1)
    assert rate("polynomial", 55, warmup_steps=10, power=2.0) == pytest.approx(0.25)
    assert rate("cosine", 40, warmup_steps=10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert rate("constant", 99, warmup_steps=10) == 1.0
    assert [rate("wsd", t, warmup_steps=10, decay_steps=20) for t in (50, 80, 90, 100)] == [
        1.0,
        1.0,
        0.5,
        0.0,
    ]


def test_lamb_golden_number():
    """First step for w = [3, 4], g = [1, 0], no decay: u = [3.16217766, 0], r = 1.58118883."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    group = {"params": [weight], "name": "w", "num_elements": 2, "weight_decay": 0.0, "adapt": True}
    optimizer = Lamb([group])
    weight.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    update = 0.1 / (math.sqrt(0.001) + 1e-6)
    assert update == pytest.approx(3.16217766, rel=1e-8)
    expected = 3.0 - 0.1 * (5 / update) * update
    assert weight.tolist() == pytest.approx([expected, 4.0], rel=1e-12)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 3)
        self.LayerNorm = nn.LayerNorm(3)


def test_groups_hold_one_adapted_matrix_each():
    groups = parameter_groups(_Two(), OptimizerConfig(learning_rate=1.0))
    assert [(g["name"], g["adapt"], g["weight_decay"], g["num_elements"]) for g in groups] == [
        ("dense.weight", True, 0.01, 15),
        ("undecayed", False, 0.0, 9),
    ]
    adamw = parameter_groups(_Two(), OptimizerConfig(name="adamw", learning_rate=1.0))
    assert [(g["name"], g["adapt"], g["num_elements"]) for g in adamw] == [
        ("decayed", False, 15),
        ("undecayed", False, 9),
    ]
    brightmart = parameter_groups(_Two(), OptimizerConfig(learning_rate=1.0, lamb_variant="brightmart"))
    assert [(g["name"], g["adapt"], g["weight_decay"]) for g in brightmart] == [
        ("dense.weight", True, 0.01),
        ("dense.bias", True, 0.0),
        ("LayerNorm.weight", True, 0.0),
        ("LayerNorm.bias", True, 0.0),
    ]
    assert not is_excluded("albert.encoder.attention.0.query.weight")


def test_adamw_equals_torch():
    torch.manual_seed(0)
    ours, theirs = _Two().double(), _Two().double()
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.1, eps=1e-8)
    optimizer = build_optimizer(ours, config)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.dense.weight], "weight_decay": 0.1},
            {"params": [theirs.dense.bias, *theirs.LayerNorm.parameters()], "weight_decay": 0.0},
        ],
        lr=0.01,
        eps=1e-8,
    )
    for step in range(5):
        inputs = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model.zero_grad()
            model.LayerNorm(model.dense(inputs)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.num_steps += 1
        optimizer.step()
        reference.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "bias_correction", "bounds"), [("google", False, None), ("deepspeed", True, (0.01, 10.0))]
)
def test_lamb_variants(variant, bias_correction, bounds):
    optimizer = build_optimizer(_Two(), OptimizerConfig(learning_rate=1.0, lamb_variant=variant))
    assert (optimizer.bias_correction, optimizer.ratio_bounds) == (bias_correction, bounds)


def test_ratio_is_clamped_in_the_deepspeed_variant():
    weight = nn.Parameter(torch.full((4,), 1000.0))
    group = {"params": [weight], "name": "w", "num_elements": 4, "weight_decay": 0.0, "adapt": True}
    optimizer = Lamb([group], ratio_bounds=(0.01, 10.0))
    weight.grad = torch.ones(4)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    update = 0.1 / (math.sqrt(0.001) + 1e-6)
    assert weight[0].item() == pytest.approx(1000.0 - 10 * update, rel=1e-6)


def test_zero_weights_or_updates_have_ratio_one():
    weight = nn.Parameter(torch.zeros(3))
    group = {"params": [weight], "name": "w", "num_elements": 3, "weight_decay": 0.0, "adapt": True}
    optimizer = Lamb([group])
    weight.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert weight[0].item() == pytest.approx(-0.1 / (math.sqrt(0.001) + 1e-6), rel=1e-6)


_SMALL = {
    "vocab_size": 20, "embedding_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 8, "num_hidden_layers": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "attention", "feed_forward", "embeddings"),
    [
        ({}, [0.5], [0.5], 0.25),
        ({"share_type": "none"}, [0.0625, 0.125, 0.25, 0.5], [0.0625, 0.125, 0.25, 0.5], 0.03125),
        ({"share_type": "attention"}, [0.5], [0.0625, 0.125, 0.25, 0.5], 0.03125),
        ({"share_type": "ffn"}, [0.0625, 0.125, 0.25, 0.5], [0.5], 0.03125),
        ({"num_hidden_groups": 2}, [0.25, 0.5], [0.25, 0.5], 0.125),
        ({"inner_group_num": 2}, [0.25, 0.5], [0.25, 0.5], 0.125),
    ],
)
def test_layer_decay_by_hand(changes, attention, feed_forward, embeddings):
    model = AlbertForSequenceClassification(ModelConfig(**_SMALL, **changes), 2)
    factors = rate_factors(model, 0.5)
    assert factors.keys() == dict(model.named_parameters()).keys()
    for kind, expected in (("attention", attention), ("feed_forward", feed_forward)):
        for name in (n for n in factors if n.startswith(f"albert.encoder.{kind}.")):
            assert factors[name] == expected[int(name.split(".")[3])], name
    assert factors["albert.embeddings.word_embeddings.weight"] == embeddings
    assert factors["albert.encoder.embedding_hidden_mapping_in.bias"] == embeddings
    assert factors["albert.pooler.weight"] == factors["classifier.weight"] == 1.0


def test_a_final_layer_norm_is_as_high_as_the_last_layer():
    sizes = {**_SMALL, "embedding_size": 4}
    config = ModelConfig(**sizes, layout="brightmart", ln_type="preln", share_type="none", final_ln=True)
    factors = rate_factors(AlbertForSequenceClassification(config, 2), 0.5)
    assert factors["albert.encoder.LayerNorm.weight"] == 0.5
    assert factors["albert.embeddings.word_embeddings_2.weight"] == 0.03125


def test_layer_decay_splits_the_groups_and_keeps_their_decay():
    model = AlbertForSequenceClassification(ModelConfig(**_SMALL), 2)
    config = OptimizerConfig(name="adamw", learning_rate=1.0, layer_decay=0.5)
    groups = parameter_groups(model, config)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("decayed x 0.25", 0.01), ("undecayed x 0.25", 0.0), ("decayed x 0.5", 0.01), ("undecayed x 0.5", 0.0),
        ("decayed", 0.01), ("undecayed", 0.0),
    ]  # fmt: skip
    assert sum(group["num_elements"] for group in groups) == sum(p.numel() for p in model.parameters())
    lamb = parameter_groups(model, config.model_copy(update={"name": "lamb"}))
    by_name = {group["name"]: group["rate_factor"] for group in lamb}
    assert by_name["albert.encoder.attention.0.query.weight"] == 0.5
