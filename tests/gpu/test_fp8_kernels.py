"""Products in float8 on a GPU that has it, against the emulation, and a compiled step against bf16."""

import pytest
import torch

from albert.batches import PretrainBatch, pack
from albert.fp8 import COMPILE_OPTIONS, fp8_product, has_fp8
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not has_fp8(DEVICE), reason="no CUDA device that computes in float8"
    ),
]


@pytest.mark.parametrize("tokens", [1, 16, 245, 4096])
def test_products_equal_the_emulated_ones(tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, 768), (2304, 768), (2304,), (tokens, 2304))
    rows, weight, bias, gradient = (
        torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for shape in shapes
    )
    results = []
    for mode in ("on", "emulated"):
        leaves = [x.clone().requires_grad_() for x in (rows, 0.02 * weight, bias)]
        output = fp8_product(mode, DEVICE)(*leaves)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, gradient)])
    for ours, theirs in zip(*results, strict=True):
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        # bf16 results of sums in another order; the forward product adds up in less than fp32.
        assert difference < 5e-3


def packed_batch(vocab_size: int, lengths: tuple[int, ...]) -> PretrainBatch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (sum(lengths),), generator=generator)
    return PretrainBatch(
        pack(ids, torch.zeros_like(ids), lengths),
        torch.arange(0, sum(lengths), 7),
        ids[::7],
        torch.arange(len(lengths)) % 2,
    ).to("cuda")


def step(model: AlbertForPreTraining, batch: PretrainBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(batch).mlm_loss_sum
    loss.backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    differences = sum((ours[name] - x).square().sum() for name, x in theirs.items())
    return (differences / sum(x.square().sum() for x in theirs.values())).sqrt().item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_steps_of_several_shapes_are_near_bf16_and_those_not_compiled(checkpointing):
    config = MODEL_PRESETS["base"].model_copy(update={"num_hidden_layers": 3})
    model = AlbertForPreTraining(config).cuda().bfloat16().train()
    batches = [packed_batch(config.vocab_size, lengths) for lengths in ((40, 128, 77), (200,), (3, 5, 7, 9))]
    in_bf16 = [step(model, batch) for batch in batches]
    model.use_product(fp8_product("on", DEVICE))
    in_float8 = [step(model, batch) for batch in batches]
    model.activation_checkpointing = checkpointing
    torch.compiler.reset()
    model.compile_layers(**COMPILE_OPTIONS)
    for batch, bf16, float8 in zip(batches, in_bf16, in_float8, strict=True):
        compiled = step(model, batch)
        assert compiled[0] == pytest.approx(bf16[0], rel=1e-2)
        assert 1e-3 < difference(compiled[1], bf16[1]) < 0.1
        assert difference(compiled[1], float8[1]) < 0.05
