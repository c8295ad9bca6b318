"""The path that CUDA takes, with PyTorch's own operator and its kernel written out: the kernel needs a GPU.

Checks what is ours in it: bounds, padded head sizes, gradients, and that new batch shapes do not compile again.
tests/gpu/test_attention.py runs the real kernel.
"""

import pytest
import torch
from model_samples import pretrain_batch, tiny, worst_error
from torch._dynamo.testing import CompileCounterWithBackend

from albert import attention
from albert.fp8 import fp8_product
from albert.heads import AlbertForPreTraining


def attention_weights(query, key, cu_query, cu_key, scale):
    """Softmax inside the spans that the bounds give; [heads, queries, keys]."""
    spans = [
        torch.bucketize(torch.arange(len(rows)), bounds[1:].long(), right=True)
        for rows, bounds in ((query, cu_query), (key, cu_key))
    ]
    inside = spans[0][:, None] == spans[1][None, :]
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~inside, -torch.inf).softmax(-1)


def flash_forward(query, key, value, cu_query, cu_key, max_query, max_key, *_, scale=None, **__):
    """What the kernel computes, and what it insists on; [tokens, heads, head_dim]."""
    assert query.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert cu_query.dtype == cu_key.dtype == torch.int32
    assert max_query >= cu_query.diff().max()
    assert max_key >= cu_key.diff().max()
    output = torch.empty_like(query)
    output.copy_(torch.einsum("hqk,khd->qhd", attention_weights(query, key, cu_query, cu_key, scale), value))
    log_sums = torch.zeros(query.shape[1], len(query))
    return output, log_sums, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(())


def flash_backward(gradient, query, key, value, output, log_sums, cu_query, cu_key, *_, scale=None, **__):
    """The gradients of `flash_forward`."""
    weights = attention_weights(query, key, cu_query, cu_key, scale)
    of_weights = torch.einsum("qhd,khd->hqk", gradient, value)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_scores = of_scores * (scale or query.shape[-1] ** -0.5)
    gradients = (
        torch.einsum("hqk,khd->qhd", of_scores, key),
        torch.einsum("hqk,qhd->khd", of_scores, query),
        torch.einsum("hqk,qhd->khd", weights, gradient),
    )
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((query, key, value), gradients, strict=True))


@pytest.fixture(scope="module")
def flash_kernel():
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    yield
    library._destroy()


@pytest.fixture
def on_cuda_path(monkeypatch, flash_kernel):
    def switch(enabled: bool) -> None:
        monkeypatch.setattr("albert.attention._has_flash_kernel", lambda qkv: enabled)

    return switch


def gradients(model, batch):
    model.zero_grad()
    output = model(batch)
    (output.mlm_loss_sum + output.sop_loss_sum).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("heads", [3, 4])  # head size 8, and 6, which is padded to 8
def test_gradients_equal_those_of_one_call_per_sequence(heads, on_cuda_path):
    model = AlbertForPreTraining(tiny(num_attention_heads=heads)).double()
    batch = pretrain_batch(60, (11, 17, 1, 17, 4))
    on_cuda_path(False)
    expected = gradients(model, batch)
    on_cuda_path(True)
    assert worst_error(gradients(model, batch), expected) < 1e-10


def test_attention_dropout_takes_the_path_that_has_dropout(on_cuda_path):
    model = AlbertForPreTraining(tiny(attention_probs_dropout_prob=0.5))
    batch = pretrain_batch(60)
    on_cuda_path(True)
    torch.manual_seed(0)
    first = model.train()(batch).mlm_loss_sum
    torch.manual_seed(1)
    assert first != model(batch).mlm_loss_sum


def evaluate(model, batch):
    with torch.no_grad():
        model.eval()(batch)
    model.train()


def test_new_batch_shapes_are_compiled_once_for_all(on_cuda_path):
    """Also where evaluation comes first and between; the compiler gives up after 8 versions of one function."""
    model = AlbertForPreTraining(tiny(max_position_embeddings=512)).train()
    on_cuda_path(True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    lengths = [
        (512, 300, 20),
        (512, 77),
        (20, 30),
        (10, 12, 9),
        (50,),
        (140, 3),
        (7, 8, 9, 10),
        (33, 44, 200),
        (300,),
    ]
    batches = [pretrain_batch(60, some) for some in lengths]
    expected = [gradients(model, batch) for batch in batches]
    model.compile_layers(backend=counter, fullgraph=True)
    compiled = []
    for batch, reference in zip(batches, expected, strict=True):
        evaluate(model, batch)
        assert worst_error(gradients(model, batch), reference) < 1e-3
        compiled.append(counter.frame_count)
    # Attention and feed-forward block, for all tokens and for those of the last layer, with and without gradients.
    assert compiled == [8] * len(batches)


def test_float8_is_compiled_no_oftener_and_gives_the_same(on_cuda_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    model = AlbertForPreTraining(tiny(**sizes, max_position_embeddings=512)).bfloat16()
    model.use_product(fp8_product("emulated", torch.device("cpu")))
    on_cuda_path(True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    batches = [pretrain_batch(60, lengths) for lengths in ((20, 30), (10, 12, 9), (50,), (7, 8, 140), (5, 5))]
    expected = [gradients(model, batch) for batch in batches]
    model.compile_layers(backend=counter, fullgraph=True)
    compiled = []
    for batch, reference in zip(batches, expected, strict=True):
        actual = gradients(model, batch)
        assert all(torch.equal(actual[name], gradient) for name, gradient in reference.items())
        compiled.append(counter.frame_count)
    assert compiled == [4] * len(batches)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_gpus_before_ampere_take_the_other_path(monkeypatch, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert attention.has_flash_kernel(gpu, torch.bfloat16, 64) is expected
    assert attention.has_flash_kernel(gpu, torch.float16, 256) is expected
    assert not attention.has_flash_kernel(gpu, torch.float32, 64)
    assert not attention.has_flash_kernel(gpu, torch.float16, 264)
    assert not attention.has_flash_kernel(cpu, torch.bfloat16, 64)
