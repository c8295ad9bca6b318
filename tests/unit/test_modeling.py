"""The encoder and the pretraining head: parity with Hugging Face and with a plain reference."""

import itertools

import pytest
import torch
import transformers
from model_samples import (
    LENGTHS,
    padded,
    perturbed,
    pretrain_batch,
    scaled_down,
    tiny,
    worst_error,
)
from plain_albert import PlainAlbert

from albert.convert.huggingface import hugging_face_name
from albert.heads import AlbertForPreTraining
from albert.linear import linear
from albert.model_config import MODEL_PRESETS


def hugging_face_twin(model: AlbertForPreTraining) -> transformers.AlbertForPreTraining:
    fields = model.config.model_dump(exclude={"layout", "ln_type", "share_type", "final_ln"})
    twin = transformers.AlbertForPreTraining(
        transformers.AlbertConfig(**fields, num_labels=2, attn_implementation="sdpa")
    )
    state = {hugging_face_name(n, model.config.inner_group_num): x for n, x in model.state_dict().items()}
    state["predictions.decoder.weight"] = state["albert.embeddings.word_embeddings.weight"]
    state["predictions.decoder.bias"] = state["predictions.bias"]
    twin.to(next(model.parameters()).dtype).load_state_dict(state)
    return twin.eval()


GOOGLE_PRESETS = [name for name, config in MODEL_PRESETS.items() if config.layout == "google"]
GROUPED = {
    "groups": tiny(num_hidden_layers=6, num_hidden_groups=3, initializer_range=0.1),
    "inner": tiny(num_hidden_groups=2, inner_group_num=2, initializer_range=0.1),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", [*GOOGLE_PRESETS, *GROUPED])
def test_logits_loss_and_gradients_equal_hugging_face(name, dtype, bound):
    config = GROUPED.get(name) or scaled_down(MODEL_PRESETS[name])
    model = perturbed(AlbertForPreTraining(config).to(dtype))
    twin = hugging_face_twin(model)
    batch = pretrain_batch(config.vocab_size)
    ids, types, mask = padded(batch.sequences)
    labels = torch.full((mask.sum(),), -100)
    labels[batch.masked_lm_indices] = batch.masked_lm_labels
    label_rows = torch.full_like(ids, -100)
    label_rows[mask] = labels

    expected = twin(
        input_ids=ids,
        token_type_ids=types,
        attention_mask=mask.long(),
        labels=label_rows,
        sentence_order_label=batch.sentence_order_labels,
    )
    expected.loss.backward()
    output = model(batch, with_accuracy=True)
    preds, rows = len(batch.masked_lm_labels), len(LENGTHS)
    (output.mlm_loss_sum / preds + output.sop_loss_sum / rows).backward()

    hidden, _ = model.albert(batch.sequences)
    mlm, sop = model.forward_padded(ids, types, mask)
    logits = {
        "packed": model.mlm_logits(hidden),
        "padded": mlm[mask],
        "sop": sop,
    }
    reference = expected.prediction_logits[mask]
    assert worst_error(logits, {"packed": reference, "padded": reference, "sop": expected.sop_logits}) < bound
    loss = output.mlm_loss_sum / preds + output.sop_loss_sum / rows
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6 if dtype is torch.float32 else 1e-7)
    theirs = {n: p.grad for n, p in twin.named_parameters()}
    ours = {hugging_face_name(n, config.inner_group_num): p.grad for n, p in model.named_parameters()}
    assert worst_error(ours, theirs) < bound
    assert int(output.mlm_correct) == int((reference.argmax(-1) == labels).sum())
    assert int(output.sop_correct) == int(
        (expected.sop_logits.argmax(-1) == batch.sentence_order_labels).sum()
    )


def grid():
    shares = ("all", "ffn", "attention", "none")
    for layout, ln_type, share_type in itertools.product(
        ("google", "brightmart"), ("postln", "preln"), shares
    ):
        yield {"layout": layout, "ln_type": ln_type, "share_type": share_type}
        if ln_type == "preln":
            yield {"layout": layout, "ln_type": ln_type, "share_type": share_type, "final_ln": True}
    for layout, ln_type in itertools.product(("google", "brightmart"), ("postln", "preln")):
        yield {"layout": layout, "ln_type": ln_type, "embedding_size": 24}
        yield {"layout": layout, "ln_type": ln_type, "num_hidden_groups": 2, "inner_group_num": 2}
    yield {"hidden_act": "relu"}
    yield {"hidden_act": "gelu", "layout": "brightmart"}


@pytest.mark.parametrize("options", list(grid()), ids=lambda o: "-".join(map(str, o.values())))
def test_every_combination_equals_the_formulas(options):
    config = tiny(**options)
    model = perturbed(AlbertForPreTraining(config).double())
    plain = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    batch = pretrain_batch(config.vocab_size)
    ids, types, mask = padded(batch.sequences)

    mlm, sop = PlainAlbert(config, plain).logits(ids, types, mask)
    chosen = mlm[mask][batch.masked_lm_indices]
    mlm_loss = -chosen.log_softmax(-1).gather(1, batch.masked_lm_labels[:, None]).sum()
    sop_loss = -sop.log_softmax(-1).gather(1, batch.sentence_order_labels[:, None]).sum()
    (mlm_loss + sop_loss).backward()
    hidden, _ = model.albert(batch.sequences)
    packed_mlm = model.mlm_logits(hidden)
    padded_mlm, padded_sop = model.forward_padded(ids, types, mask)
    assert (
        worst_error(
            {"packed": packed_mlm, "padded": padded_mlm[mask], "sop": padded_sop},
            {"packed": mlm[mask], "padded": mlm[mask], "sop": sop},
        )
        < 1e-12
    )

    output = model(batch)
    (output.mlm_loss_sum + output.sop_loss_sum).backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    assert worst_error(ours, {n: p.grad for n, p in plain.items()}) < 1e-10


@pytest.mark.parametrize("rows", [1, 37])
def test_products_of_a_training_cpu_equal_those_in_64_bits(rows):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 48), (80, 48), (80,), (rows, 80))
    *inputs, weights = (torch.randn(*shape, generator=generator) for shape in shapes)
    results = []
    for dtype in (torch.float32, torch.float64):  # 64-bit values take torch's own way
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        output = linear(*leaves)
        (output * weights.to(dtype)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    single, double = results
    assert single[0].dtype == torch.float32
    for ours, exact in zip(single, double, strict=True):
        assert (ours - exact).abs().max() < 2e-6 * exact.abs().max()
