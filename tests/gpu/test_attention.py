"""The flash path of packed attention on CUDA, against the path that the CPU takes."""

import pytest
import torch

from albert.attention import PackedLayout, attend
from albert.batches import PretrainBatch, pack
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("head_dim", [64, 26, 128])
def test_flash_equals_one_call_per_sequence(head_dim):
    lengths = (17, 128, 1, 200)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 4, head_dim, generator=generator).cuda().bfloat16()
    bounds = torch.tensor([0, 17, 145, 146, 346], dtype=torch.int32).cuda()
    layout = PackedLayout(bounds, 256, tuple((1, n) for n in lengths))
    outputs, gradients = [], []
    for values in (qkv, qkv.double()):  # 64-bit values take the other path
        source = values.clone().requires_grad_()
        output = attend(source, layout)
        output.backward(torch.ones_like(output))
        outputs.append(output.detach().double())
        gradients.append(source.grad.double())
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("preset", ["tiny_zh", "base"])
def test_compiled_bf16_step_equals_fp32(preset):
    config = MODEL_PRESETS[preset].model_copy(update={"num_hidden_layers": 3})
    model = AlbertForPreTraining(config).cuda()
    lengths = (40, 128, 77)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (sum(lengths),), generator=generator)
    batch = PretrainBatch(
        pack(ids, torch.zeros_like(ids), lengths),
        torch.arange(0, sum(lengths), 7),
        ids[::7],
        torch.tensor([0, 1, -100]),
    ).to("cuda")
    expected = model(batch).mlm_loss_sum.item()
    torch.compiler.reset()  # tests share code, and the compiler keeps few versions of it
    model.bfloat16().compile_layers()
    output = model(batch)
    output.mlm_loss_sum.backward()
    assert output.mlm_loss_sum.item() == pytest.approx(expected, rel=1e-2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
