"""What a layer use moves and saves: bytes per token, which are the same on every machine and for any length."""

from __future__ import annotations

import functools

import pytest
import torch

from albert import modeling
from albert.model_config import MODEL_PRESETS
from benchmarks.layer_traffic import BARS_KB, LayerUse, count, layer_use

LENGTH = 16


@functools.cache
def use_of(preset: str) -> LayerUse:
    return layer_use(MODEL_PRESETS[preset], LENGTH)


@pytest.mark.parametrize("preset", BARS_KB)
def test_a_layer_use_saves_little_for_backward(preset):
    """16 rows of the hidden size in 16 bits, the logarithmic sums of attention, and a few numbers of LayerNorm."""
    config = MODEL_PRESETS[preset]
    row = 2 * config.hidden_size
    sums = 4 * config.num_attention_heads
    saved = use_of(preset).saved
    assert 16 * row + sums < saved <= 16 * row + sums + 16
    assert saved <= 1000 * BARS_KB[preset][0]


@pytest.mark.parametrize("preset", BARS_KB)
def test_a_layer_use_moves_little_besides_its_products(preset):
    assert sum(use_of(preset).moved.values()) <= 1000 * BARS_KB[preset][1]


def test_every_operation_is_counted_with_what_it_reads_and_writes():
    use = use_of("base")
    row = 2 * MODEL_PRESETS["base"].hidden_size
    assert use.products == 14  # 4 matrix products and attention; 8 and attention in the backward pass
    assert use.moved["gelu"] == (4 + 4) * row
    assert use.moved["gelu_backward"] == (4 + 4 + 4) * row
    assert use.moved["add_"] == 2 * 3 * row  # residuals
    assert use.moved["add"] == 2 * 3 * row  # where their gradients meet
    assert use.moved["native_layer_norm"] == pytest.approx(2 * 2 * row, rel=0.01)
    weights = 4 * 768 * 768 + 2 * 768 * 3072
    assert use.moved_per_use["add"] == pytest.approx(3 * 2 * weights, rel=0.01)  # read two, write one


def test_an_activation_of_many_operations_misses_the_bar(monkeypatch):
    def spelled_out(x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))

    monkeypatch.setitem(modeling.ACTIVATIONS, "gelu_new", spelled_out)
    use = layer_use(MODEL_PRESETS["base"], LENGTH)
    saved_kb, moved_kb = BARS_KB["base"]
    assert use.kernels > use_of("base").kernels + 15
    assert sum(use.moved.values()) > 2 * 1000 * moved_kb
    assert use.saved > 1000 * saved_kb


def test_saved_storages_count_once_and_parameters_not_at_all():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            y = x * self.weight  # saves x, and the weight, which is a parameter
            z = y.view(2, 4).sin().flatten() + y.cos()  # both save y
            loss = z.sum()
            return type("Output", (), {"mlm_loss_sum": loss, "sop_loss_sum": loss * 0.0})

    assert count(Model(), torch.ones(8))["saved"] == 2 * 8 * 4
