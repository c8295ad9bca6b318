"""How the model runs: dropout, checkpointing, compilation, initialisation, what a step keeps and copies."""

import math

import pytest
import torch
from model_samples import LENGTHS, perturbed, pretrain_batch, random_sequences, tiny
from plain_albert import PlainAlbert, activate
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from albert.activations import ACTIVATIONS, gelu_new
from albert.attention import PackedLayout, attend, packed_layout
from albert.heads import AlbertForPreTraining
from albert.linear import PackedWeights, linear, rows_to_add, split_features
from albert.model_config import MODEL_PRESETS
from albert.modeling import block_of_use


def gradients(model, batch):
    model.zero_grad()
    output = model(batch)
    (output.mlm_loss_sum + output.sop_loss_sum).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("share_type", ["all", "ffn", "attention", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_nothing_but_memory(share_type, dropout):
    config = tiny(share_type=share_type, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = AlbertForPreTraining(config).train()
    batch = pretrain_batch(config.vocab_size)
    results, kept = [], []
    for enabled in (False, True):
        model.activation_checkpointing = enabled
        assert model.activation_checkpointing is enabled
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results.append(gradients(model, batch))
        kept.append(sum(saved))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    layers = config.num_hidden_layers
    per_use = sum(LENGTHS) * config.hidden_size
    assert kept[1] < kept[0] - (layers - 1) * 5 * per_use


def test_evaluation_is_deterministic_and_training_is_not():
    config = tiny(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model, batch = AlbertForPreTraining(config), random_sequences(60)
    model.eval()
    assert torch.equal(model.albert(batch)[0], model.albert(batch)[0])
    model.train()
    assert not torch.equal(model.albert(batch)[0], model.albert(batch)[0])
    torch.manual_seed(3)
    first = model.albert(batch)[0]
    torch.manual_seed(3)
    assert torch.equal(first, model.albert(batch)[0])


@pytest.mark.parametrize("ln_type", ["postln", "preln"])
def test_dropout_sits_on_each_block_output_before_the_residual(ln_type):
    """Google drops the output of both blocks; with all of it dropped only the residual is left."""
    config = tiny(ln_type=ln_type)
    model = perturbed(AlbertForPreTraining(config).double()).train()
    parameters = dict(model.named_parameters())
    plain = PlainAlbert(config, parameters)
    x = torch.randn(sum(LENGTHS), 24, dtype=torch.float64)
    block = model.albert.encoder.feed_forward[0]
    block.dropout.p = 1.0
    name = "albert.encoder.feed_forward.0.LayerNorm"
    expected = x if ln_type == "preln" else plain.norm(x, name)
    torch.testing.assert_close(block(x), expected)

    attention = model.albert.encoder.attention[0]
    attention.dropout.p = 1.0
    layout = packed_layout(random_sequences(60))
    name = "albert.encoder.attention.0.LayerNorm"
    expected = x if ln_type == "preln" else plain.norm(x, name)
    torch.testing.assert_close(attention(x, *attention.joined_projection(), layout), expected)


def test_embedding_dropout_follows_the_layer_norm():
    model = perturbed(AlbertForPreTraining(tiny(hidden_dropout_prob=0.5))).train()
    batch = random_sequences(60)
    inputs = (batch.input_ids, batch.token_type_ids, batch.position_ids)
    torch.manual_seed(0)
    dropped = model.albert.embeddings(*inputs)
    model.eval()
    whole = model.albert.embeddings(*inputs)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert 0.4 < kept.double().mean() < 0.6


def test_attention_dropout_drops_attention_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    length, draws = 6, 4000
    qkv = torch.randn(length, 3, 2, 4, dtype=torch.float64)
    layout = PackedLayout(torch.tensor([0, length]).int(), length, ((1, length),))
    many = PackedLayout(torch.zeros(0), length, ((draws, length),))
    whole = attend(qkv, layout)
    dropped = attend(qkv.repeat(draws, 1, 1, 1), many, dropout=0.25).view(draws, length, -1)
    error = (dropped.mean(0) - whole).abs()
    assert (error < 5 * dropped.std(0) / math.sqrt(draws)).all()
    assert (dropped.std(0) > 0.01).all()


@pytest.mark.parametrize("lengths", [(5,), (5, 5, 5), (5, 5, 3, 3, 3, 5), (1, 9, 1)])
def test_attention_of_packed_sequences_equals_each_alone(lengths):
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 4, dtype=torch.float64, requires_grad=True)
    runs = packed_layout(random_sequences(60, lengths)).runs
    assert sum(n * length for n, length in runs) == sum(lengths)
    output = attend(qkv, PackedLayout(torch.zeros(0), 0, runs))
    expected = []
    for part in qkv.split(list(lengths)):
        query, key, value = (part[:, i].transpose(0, 1) for i in range(3))
        weights = (query @ key.transpose(1, 2) / 2.0).softmax(-1)
        expected.append((weights @ value).transpose(0, 1).flatten(1))
    torch.testing.assert_close(output, torch.cat(expected))
    weight = torch.randn_like(output)
    ours = torch.autograd.grad((output * weight).sum(), qkv, retain_graph=True)[0]
    theirs = torch.autograd.grad((torch.cat(expected) * weight).sum(), qkv)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("share_type", ["all", "none"])
def test_layers_are_compiled_once_whatever_is_shared(share_type):
    config = tiny(share_type=share_type)
    model, batch = AlbertForPreTraining(config), pretrain_batch(60)
    expected = gradients(model, batch)
    names = set(model.state_dict())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter, fullgraph=True)
    actual = gradients(model, batch)
    # One attention block, one feed-forward block; each for all tokens and for those that the last layer gives.
    assert counter.frame_count == 4
    assert set(model.state_dict()) == names
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)


class CountKernels(TorchDispatchMode):
    """Counts the operations that are dispatched, views apart."""

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.rows = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if isinstance(args[0] if args else None, torch.Tensor) and args[0].dim():
            self.rows.add((name, len(args[0])))
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_a_layer_use_dispatches_few_kernels_and_no_hidden_copy():
    """What makes the step fast: one matrix product for Q, K and V, one kernel each for attention and gelu."""

    def counts(layers):
        model = AlbertForPreTraining(tiny(num_hidden_layers=layers))
        batch = pretrain_batch(60, (16, 16))
        with CountKernels() as counter, torch.no_grad():
            model(batch)
        return counter.counts

    two, five = counts(2), counts(5)
    per_use = {name: (n - two.get(name, 0)) / 3 for name, n in five.items() if n != two.get(name, 0)}
    views = {
        "t",
        "view",
        "transpose",
        "unbind",
        "_unsafe_view",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
    }
    kernels = {name: n for name, n in per_use.items() if name not in views}
    assert kernels == {
        "addmm": 4,  # joined Q, K, V; attention output; both feed-forward matrices
        "_scaled_dot_product_flash_attention_for_cpu": 1,
        "gelu": 1,
        "add_": 2,
        "native_layer_norm": 2,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_joined_projection_lie_alike_for_all_layers(dtype):
    """They are added to each other; the last layer's is made of two."""
    weight = torch.randn(3 * 64, 64, dtype=dtype, requires_grad=True)
    bias, rows = torch.zeros(3 * 64, dtype=dtype), torch.randn(50, 64, dtype=dtype)
    whole = linear(rows, weight, bias)
    query, other = split_features(weight, (64, 128))
    parts = torch.cat([linear(rows, query, bias[:64]), linear(rows, other, bias[64:])], dim=1)
    torch.testing.assert_close(parts, whole)
    gradients = [torch.autograd.grad(output.sum(), weight)[0] for output in (whole, parts)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].stride() == gradients[1].stride()


def test_the_head_sees_masked_positions_only():
    model = AlbertForPreTraining(tiny())
    batch = pretrain_batch(60)
    seen = []
    model.predictions.register_forward_hook(lambda _m, inputs, output: seen.append(output.shape))
    model(batch)
    assert seen == [(len(batch.masked_lm_indices), 8)]


def test_activations():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(function(x), activate(x, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1001, 65536, 200_003])
def test_gelu_of_the_cpu_equals_the_formula_in_fp64_as_closely_as_torchs(count):
    source = torch.linspace(-8, 8, count)
    weight = torch.linspace(-1, 1, count)

    def errors(function):
        x = source.clone().requires_grad_()
        y = function(x + 0.0)  # which may be overwritten
        (slope,) = torch.autograd.grad((y * weight).sum(), x)
        return [
            (mine.detach().double() - exact).abs().max()
            for mine, exact in zip((y, slope), wanted, strict=True)
        ]

    x = source.double().requires_grad_()
    y = activate(x, "gelu_new")
    wanted = y.detach(), torch.autograd.grad((y * weight).sum(), x)[0]
    for mine, theirs in zip(errors(gelu_new), errors(lambda x: F.gelu(x, approximate="tanh")), strict=True):
        assert mine < 3 * theirs


def test_gelu_of_the_cpu_at_the_ends_of_the_numbers():
    x = torch.tensor([0.0, 1e-30, -1e-30, 30.0, -30.0, 1e30, -1e30, torch.inf, torch.nan], requires_grad=True)
    y = gelu_new(x + 0.0)
    expected = torch.tensor([0.0, 5e-31, -5e-31, 30.0, 0.0, 1e30, 0.0, torch.inf, torch.nan])
    torch.testing.assert_close(y, expected, equal_nan=True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    theirs = torch.ops.aten.gelu_backward(torch.ones_like(x), x.detach(), approximate="tanh")
    torch.testing.assert_close(slope, theirs, equal_nan=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_that_layers_share_are_laid_out_once_per_pass(checkpointing):
    def laid_out(options):
        model = AlbertForPreTraining(tiny(num_hidden_layers=4, **options)).train()
        model.activation_checkpointing = checkpointing
        with CountKernels() as counter:
            gradients(model, pretrain_batch(60))
        return counter.counts.get("_reorder_linear_weight", 0)

    # Q, K and V; attention output; both feed-forward matrices; and their transposes
    assert laid_out({}) == 4 * 2
    assert laid_out({"num_hidden_groups": 2}) == 4 * 2  # of the last group but one use has all tokens
    assert laid_out({"share_type": "attention"}) == laid_out({"share_type": "ffn"}) == 2 * 2
    assert laid_out({"share_type": "none"}) == 0


def test_sequences_of_any_lengths_are_multiplied_in_few_numbers_of_rows():
    model = AlbertForPreTraining(tiny(vocab_size=60)).train()
    with CountKernels() as counter:
        for length in range(3, 33):
            gradients(model, pretrain_batch(60, (32, length)))
    seen = {rows for name, rows in counter.rows if name == "_linear_pointwise"}
    assert {48, 64} <= seen  # tokens
    assert len(seen) < 20  # and features, by the gradients of weights


def test_rows_are_added_up_to_few_different_numbers():
    for number in (1, 15, 16, 100, 901, 1024, 1843, 40_000):
        total = number + rows_to_add(number, torch.ones(2, 4))
        assert number <= total < number + max(16, number / 32 + 1)
    totals = {n + rows_to_add(n, torch.ones(2, 4)) for n in range(1, 5000)}
    assert len(totals) < 250
    assert rows_to_add(33, torch.ones(2, 4, dtype=torch.bfloat16)) == 0


def test_laid_out_weights_give_the_same_products_and_gradients():
    weight, bias = torch.randn(96, 40, requires_grad=True), torch.randn(96, requires_grad=True)
    rows = torch.randn(37, 40, requires_grad=True)
    packed = PackedWeights()

    def results():
        output = linear(rows, weight, bias)
        return output, *torch.autograd.grad((output**2).sum(), (rows, weight, bias))

    plain = results()
    for _ in range(2):
        with packed.in_use(is_reused=True):
            inside = results()
        for mine, other in zip(inside, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results(), plain, strict=True))


def test_initialisation_is_googles():
    config = MODEL_PRESETS["small_zh"]
    model = AlbertForPreTraining(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            bound = 2 * config.initializer_range
            assert parameter.abs().max() <= bound, name
            if parameter.numel() > 10_000:  # a normal cut at two sigma has 0.8796 of its spread
                spread = parameter.std().item() / config.initializer_range
                assert spread == pytest.approx(0.8796, rel=0.02), name
        else:
            assert (parameter == float(name.endswith("LayerNorm.weight"))).all(), name


def test_initialisation_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = AlbertForPreTraining(tiny()).state_dict()
    torch.manual_seed(2)
    second = AlbertForPreTraining(tiny()).state_dict()
    other = AlbertForPreTraining(tiny(), seed=1).state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    name = "albert.encoder.attention.0.query.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("query", "key")])


@pytest.mark.parametrize(
    ("options", "attention", "feed_forward"),
    [
        ({}, [0, 0, 0, 0], [0, 0, 0, 0]),
        ({"share_type": "ffn"}, [0, 1, 2, 3], [0, 0, 0, 0]),
        ({"share_type": "attention"}, [0, 0, 0, 0], [0, 1, 2, 3]),
        ({"share_type": "none"}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"num_hidden_groups": 2}, [0, 0, 1, 1], [0, 0, 1, 1]),
        ({"num_hidden_groups": 2, "inner_group_num": 2}, [0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 0, 1, 2, 3, 2, 3]),
    ],
)
def test_which_block_each_layer_use_takes(options, attention, feed_forward):
    assert block_of_use(tiny(**options)) == (attention, feed_forward)


def test_biases_and_layer_norms_are_named_so_that_optimizers_find_them():
    model = AlbertForPreTraining(tiny(ln_type="preln", final_ln=True))
    for name, parameter in model.named_parameters():
        assert (parameter.dim() == 1) == ("LayerNorm" in name or name.endswith("bias")), name
