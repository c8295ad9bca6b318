"""Products in float8, emulated: against their definition in plain torch, in the model; every refusal."""

import subprocess
import sys

import pytest
import torch
from model_samples import pretrain_batch, tiny
from torch.nn import functional as F

from albert.config import load_run_config
from albert.errors import ConfigError
from albert.fp8 import COMPILE_OPTIONS, _build_product, fp8_product, has_fp8
from albert.heads import AlbertForPreTraining
from albert.linear import Linear, linear
from albert.resuming import check_resumable

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.1}
E4M3_MAX = 448.0
BF16_ROUNDING = 2.0**-8


@pytest.fixture(scope="module")
def product():
    return fp8_product("emulated", CPU)


def factors(tokens: int, inputs: int = 64, outputs: int = 48) -> list[torch.Tensor]:
    """Rows (one an outlier), weight, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    rows, weight, bias, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    rows[-1] *= 1000
    return [x.bfloat16() for x in (rows, 0.02 * weight, bias, gradient)]


def run(product, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Result, and gradients of rows, weight and bias."""
    rows, weight, bias = (x.clone().requires_grad_() for x in values[:3])
    output = product(rows, weight, bias)
    return [output.detach(), *torch.autograd.grad(output, (rows, weight, bias), values[3])]


def rounded(values: torch.Tensor, dim: int) -> torch.Tensor:
    """To e4m3 after scaling by the largest power of two that keeps what runs along `dim` within 448."""
    largest = values.double().abs().amax(dim, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(E4M3_MAX / largest)))
    return (values.double() * scale).float().to(torch.float8_e4m3fn).double() / scale


def by_definition(values: list[torch.Tensor]) -> list[torch.Tensor]:
    rows, weight, bias, gradient = values
    return [
        rounded(rows, 1) @ rounded(weight, 1).T + bias.double(),
        rounded(gradient, 1) @ rounded(weight, 0),
        rounded(gradient, 0).T @ rounded(rows, 0),
        gradient.double().sum(0),
    ]


@pytest.mark.parametrize("tokens", [1, 16, 77])
def test_products_are_those_of_rounded_factors(tokens, product):
    values = factors(tokens)
    for ours, theirs in zip(run(product, values), by_definition(values), strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - theirs).abs()
        # Product and sum with the bias are rounded to bf16 one after the other.
        assert (error <= 2 * BF16_ROUNDING * (theirs.abs() + 3)).all()
        assert error.norm() <= BF16_ROUNDING * theirs.norm()


@pytest.fixture
def num_kernel_calls(monkeypatch):
    """Counts the float8 kernels, and checks what those of a GPU take; torch's own for a CPU take everything."""
    calls = []

    def checked(left, right, *, scale_a, scale_b, out_dtype, **options):
        assert left.dtype == right.dtype == torch.float8_e4m3fn
        assert out_dtype == torch.bfloat16
        assert left.is_contiguous()
        assert right.t().is_contiguous()
        assert left.shape[1] % 16 == right.shape[0] % 16 == right.shape[1] % 16 == 0
        assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in (scale_a, scale_b))
        shapes = [tuple(scale.shape) for scale in (scale_a, scale_b)]
        assert shapes in ([(), ()], [(left.shape[0], 1), (1, right.shape[1])])
        calls.append(left.shape)
        return kernel(left, right, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, **options)

    kernel = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", checked)
    return lambda: len(calls)


@pytest.mark.parametrize("tokens", [1, 16, 77])
def test_what_a_gpu_is_given_suits_its_kernels_and_means_the_same(tokens, product, num_kernel_calls):
    values = factors(tokens)
    expected = run(product, values)
    assert num_kernel_calls() == 0
    actual = run(_build_product(is_emulated=False), values)
    assert num_kernel_calls() == 3
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=BF16_ROUNDING, atol=1e-3)


def test_products_are_near_those_of_bf16(product):
    values = factors(77)
    pairs = zip(run(product, values)[:3], run(F.linear, values)[:3], strict=True)
    errors = [((ours - theirs).double().norm() / theirs.double().norm()).item() for ours, theirs in pairs]
    # Three bits behind the point: each factor is off by 2.6 % (root of mean square), a product by 3.7 %.
    assert all(0.02 < error < 0.05 for error in errors), errors


def test_an_outlier_costs_the_other_tokens_nothing(product):
    """What one scale for the whole tensor would not keep."""
    values = factors(77)
    alone = [values[0][:76], *values[1:3], values[3][:76]]
    for ours, theirs in zip(run(product, values)[:2], run(product, alone)[:2], strict=True):
        torch.testing.assert_close(ours[:76], theirs, rtol=2 * BF16_ROUNDING, atol=1e-3)


def test_what_is_not_finite_stays_so_and_zeros_stay_zeros(product):
    for value in (float("nan"), float("inf")):
        values = factors(16)
        values[0][3, 5] = value
        output, _, of_weight, _ = run(product, values)
        assert not output[3].isfinite().any()
        assert output[:3].isfinite().all()
        assert not of_weight.isfinite().all()
    rows, weight, bias, gradient = factors(16)
    output, of_rows, of_weight, _ = run(product, [0 * rows, weight, bias, 0 * gradient])
    assert torch.equal(output, bias.expand(16, -1))
    assert not of_rows.any()
    assert not of_weight.any()


def step(model, batch) -> dict[str, torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    output = model(batch)
    loss = output.mlm_loss_sum + output.sop_loss_sum
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.double() for n, p in model.named_parameters()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    names = theirs.keys() - {"loss"}
    differences = sum((ours[n] - theirs[n]).square().sum() for n in names)
    return (differences / sum(theirs[n].square().sum() for n in names)).sqrt().item()


def test_only_the_products_of_the_blocks_are_replaced(product):
    model = AlbertForPreTraining(tiny(**SIZES, share_type="none"))
    names = list(model.state_dict())
    calls = []
    model.use_product(lambda *values: calls.append(values[1].shape) or linear(*values))
    model(pretrain_batch(60))
    inner, outer = (48, 32), (32, 48)
    assert calls == [*[(96, 32), (32, 32), inner, outer] * 3, (32, 32), (64, 32), (32, 32), inner, outer]
    assert list(model.state_dict()) == names
    blocks = (model.albert.encoder.attention, model.albert.encoder.feed_forward)
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [m for m in model.modules() if isinstance(m, Linear) and id(m) not in inside]
    assert all(module.product is linear for module in outside)


@pytest.mark.parametrize("share_type", ["all", "ffn", "attention", "none"])
def test_a_step_is_near_that_of_bf16(share_type, product):
    model = AlbertForPreTraining(tiny(**SIZES, share_type=share_type)).bfloat16()
    batch = pretrain_batch(60)
    expected = step(model, batch)
    model.use_product(product)
    actual = step(model, batch)
    assert 0 < abs(actual["loss"] / expected["loss"] - 1) < 0.001
    assert 0.02 < difference(actual, expected) < 0.1
    model.activation_checkpointing = True
    again = step(model, batch)
    assert all(torch.equal(again[n], x) for n, x in actual.items())


def test_the_last_layer_gives_its_kept_tokens_the_same(product):
    model = AlbertForPreTraining(tiny(**SIZES)).bfloat16().albert
    batch = pretrain_batch(60)
    for module in model.encoder.modules():
        if hasattr(module, "product") and module is not model.encoder.embedding_hidden_mapping_in:
            module.product = product
    every, pooled = model(batch.sequences)
    kept, pooled_kept = model(batch.sequences, needed=batch.masked_lm_indices)
    torch.testing.assert_close(kept, every[batch.masked_lm_indices], rtol=0.05, atol=0.05)
    torch.testing.assert_close(pooled_kept, pooled, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.fp8=on"], r"train\.fp8 \(on\) needs train\.precision bf16, not fp32"),
        (
            ["train.fp8=emulated", "train.precision=fp16"],
            r"train\.fp8 \(emulated\) needs train\.precision bf16",
        ),
        (
            ["train.fp8=on", "train.precision=bf16", "model.hidden_size=312", "model.num_attention_heads=12"],
            r"train\.fp8 \(on\) needs a multiple of 16 as model\.hidden_size, not 312; use train\.fp8=off",
        ),
        (
            ["train.fp8=on", "train.precision=bf16", "model.intermediate_size=1000"],
            r"needs a multiple of 16 as model\.intermediate_size, not 1000; use train\.fp8=off",
        ),
        (["train.fp8=fast"], r"train\.fp8: input should be 'off', 'on' or 'emulated', got 'fast'"),
    ],
)
def test_what_the_configuration_refuses(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config("demo", overrides)


def test_on_and_off_are_words():
    assert load_run_config("base", ["train.fp8=on"]).train.fp8 == "on"
    assert load_run_config("base", ["train.fp8=off"]).train.fp8 == load_run_config("base").train.fp8 == "off"


def test_a_cpu_is_refused():
    assert not has_fp8(CPU)
    with pytest.raises(
        ConfigError, match=r"train\.fp8 \(on\): a CPU does not compute in float8; use a GPU of .* 8\.9"
    ):
        fp8_product("on", CPU)


def test_an_older_gpu_is_refused_and_a_newer_one_is_not(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(
        ConfigError, match=r"train\.fp8 \(on\): NVIDIA A100 \(compute capability 8\.0\) does not compute in float8; "
        r"use a GPU of compute capability 8\.9 or later, train\.fp8=off, or train\.fp8=emulated"
    ):  # fmt: skip
        fp8_product("on", device)
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        fp8_product("on", device)


def test_compiled_layers_on_a_cpu_are_refused():
    with pytest.raises(
        ConfigError, match=r"train\.compile \(on\) with train\.fp8 \(emulated\) gives wrong results on a CPU; use "
        r"train\.compile=off"
    ):  # fmt: skip
        fp8_product("emulated", CPU, is_compiled=True)


def test_the_compiler_knows_its_options():
    AlbertForPreTraining(tiny()).compile_layers(**COMPILE_OPTIONS)
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        AlbertForPreTraining(tiny()).compile_layers(options={"emulate_precision": True})


def test_torchao_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(
        ConfigError, match=r"train\.fp8 \(emulated\): torchao cannot be imported \(.*torchao.*\); "
        r"run pip install 'albert-pretraining\[fp8\]', or use train\.fp8=off"
    ):  # fmt: skip
        fp8_product("emulated", CPU)


def test_importing_it_says_nothing():
    code = "import torch; from albert.fp8 import fp8_product; fp8_product('emulated', torch.device('cpu'))"
    result = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_a_run_does_not_change_to_float8_unnoticed():
    stored = load_run_config("base").model_dump(mode="json")
    other = load_run_config("base", ["train.fp8=on"])
    with pytest.raises(ConfigError, match=r"train\.fp8: 'off' in the checkpoint, 'on' now"):
        check_resumable(stored, other, {}, "run")
    del stored["train"]["fp8"]  # a checkpoint that is older than the key
    check_resumable(stored, load_run_config("base"), {}, "run")
    check_resumable(
        stored, load_run_config("base", ["train.fp8=on", "checkpoint.allow_changes=[train.fp8]"]), {}, "run"
    )
