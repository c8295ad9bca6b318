"""The path that CUDA takes, with PyTorch's kernel replaced by its definition: the real one needs a GPU.

Checks what is ours in it: bounds, padded head sizes, gradients, and that new batch shapes do not compile again.
tests/gpu/test_attention.py runs the real kernel.
"""

import pytest
import torch
from model_samples import pretrain_batch, tiny, worst_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from albert.fp8 import fp8_product
from albert.heads import AlbertForPreTraining


def varlen_by_definition(query, key, value, cu_query, cu_key, max_query, max_key):
    """Attention inside the spans that the bounds give; [tokens, heads, head_dim], scaled by the head size."""
    assert query.shape[-1] % 8 == 0
    assert cu_query.dtype == cu_key.dtype == torch.int32
    spans = [
        torch.bucketize(torch.arange(len(rows)), bounds[1:].long(), right=True)
        for rows, bounds in ((query, cu_query), (key, cu_key))
    ]
    inside = spans[0][:, None] == spans[1][None, :]
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=inside).transpose(0, 1)


@pytest.fixture
def on_cuda_path(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)

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


def test_new_batch_shapes_are_compiled_a_few_times_and_then_never(on_cuda_path):
    model = AlbertForPreTraining(tiny(max_position_embeddings=512))
    on_cuda_path(True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    shapes = [
        (20, 30),
        (10, 12, 9),
        (50,),
        (140, 3),
        (7, 8, 9, 10),
        (33, 44, 200),
        (61, 2),
        (300,),
        (5, 5, 5),
    ]
    batches = [pretrain_batch(60, lengths) for lengths in shapes]
    expected = [gradients(model, batch) for batch in batches]
    model.compile_layers(backend=counter, fullgraph=True)
    compiled = []
    for batch, reference in zip(batches, expected, strict=True):
        assert worst_error(gradients(model, batch), reference) < 1e-3
        compiled.append(counter.frame_count)
    assert (
        compiled[0] == 4
    )  # attention and feed-forward block, for all tokens and for those of the last layer
    assert compiled[-1] <= 10
    assert compiled[-1] == compiled[3]  # nothing new once lengths over 128 were seen


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
    assert compiled[0] == 4
    assert compiled[-1] == compiled[2] <= 10
