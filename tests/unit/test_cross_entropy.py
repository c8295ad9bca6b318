"""The cross entropy over the vocabulary: torch's own value and gradients, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from albert import cross_entropy
from albert.cross_entropy import linear_cross_entropy

VOCAB, WIDTH = 50, 8


def inputs(preds: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Hidden states, weight and bias with large and small logits; the labels come last."""
    generator = torch.Generator().manual_seed(preds)
    shapes = ((preds, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    floats = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in floats] + [
        torch.randint(0, VOCAB, (preds,), generator=generator)
    ]


def of_torch(hidden, weight, bias, labels):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize("block", [1, 2 * VOCAB, 10**6])
@pytest.mark.parametrize("preds", [0, 1, 7])
def test_value_and_gradients_are_those_of_torch(monkeypatch, dtype, piece, block, preds):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_A_TIME", piece)
    monkeypatch.setattr(cross_entropy, "_CACHED_LOGITS", block)
    *floats, labels = inputs(preds, dtype)
    loss, correct = linear_cross_entropy(*floats, labels)
    expected = of_torch(*floats, labels)
    assert correct is None
    assert loss.dtype == expected.dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss, expected, rtol=min(tolerance, 1e-5), atol=1e-6)
    ours, theirs = (torch.autograd.grad(value * 0.25, floats) for value in (loss, expected))
    for actual, wanted in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rare_words_keep_their_gradients_in_16_bits(dtype):
    """Those of words that are nobody's label are sums of small probabilities. No worse than torch."""
    generator = torch.Generator().manual_seed(0)
    vocab, width, preds = 30000, 16, 24
    hidden = torch.randn(preds, width, generator=generator, dtype=torch.float64)
    weight = 1.3 * torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 100, (preds,), generator=generator)
    floats = [x.to(dtype).requires_grad_() for x in (hidden, weight, torch.zeros(vocab))]
    exact = [x.detach().double().requires_grad_() for x in floats]
    expected = torch.autograd.grad(of_torch(*exact, labels), exact)[1]
    rare = expected.norm(dim=1).argsort()[: vocab // 2]
    errors = []
    for loss in (linear_cross_entropy(*floats, labels)[0], of_torch(*floats, labels)):
        of_weight = torch.autograd.grad(loss * 4096, floats)[1].double() / 4096
        errors.append((of_weight - expected)[rare].norm() / expected[rare].norm())
    assert errors[0] < 1.1 * errors[1] < 0.03


def test_right_predictions_are_counted():
    hidden, weight, bias, labels = inputs(40)
    labels[::2] = (hidden @ weight.T + bias).argmax(1)[::2]
    expected = int(((hidden @ weight.T + bias).argmax(1) == labels).sum())
    assert 20 <= expected < 30
    with torch.no_grad():
        loss, correct = linear_cross_entropy(hidden, weight, bias, labels, with_accuracy=True)
    assert int(correct) == expected
    assert not loss.requires_grad
    counted, _ = linear_cross_entropy(hidden, weight, bias, labels, with_accuracy=True)
    plain, _ = linear_cross_entropy(hidden, weight, bias, labels)
    assert torch.equal(*(torch.autograd.grad(value, weight)[0] for value in (counted, plain)))
    assert loss.item() == pytest.approx(of_torch(hidden, weight, bias, labels).item(), rel=1e-13)


def test_nothing_of_the_size_of_the_logits_is_kept():
    hidden, weight, bias, labels = inputs(700, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_cross_entropy(hidden, weight, bias, labels)[0].backward()
    assert sorted(kept) == sorted([hidden.shape, weight.shape, bias.shape])


def test_a_second_backward_pass_is_refused():
    """The first one scales the gradients where they are."""
    *floats, labels = inputs(3)
    loss, _ = linear_cross_entropy(*floats, labels)
    torch.autograd.grad(loss, floats, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, floats)
