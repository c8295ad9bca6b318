"""Heads for fine-tuning: equal to Hugging Face's in logits, loss and gradients, packed and padded."""

import pytest
import torch
import transformers
from model_samples import LENGTHS, padded, perturbed, random_sequences, tiny, worst_error

from albert.batches import PretrainBatch
from albert.convert.huggingface import hugging_face_name
from albert.heads import (
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)

CONFIG = tiny(classifier_dropout_prob=0.0, initializer_range=0.2)
EQUAL = (13, 13, 13, 13)
"""Hugging Face's span head lets padding take part in the softmax; without padding the two are comparable."""


def twin_of(model, architecture, **fields):
    options = CONFIG.model_dump(exclude={"layout", "ln_type", "share_type", "final_ln"})
    twin = getattr(transformers, architecture)(transformers.AlbertConfig(**options, **fields)).double()
    twin.load_state_dict({hugging_face_name(n, 1): x for n, x in model.state_dict().items()})
    return twin


def compare(model, twin, ours, theirs, our_loss, their_loss):
    assert worst_error(ours, theirs) < 1e-12
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-12)
    our_loss.backward()
    their_loss.backward()
    gradients = {hugging_face_name(n, 1): p.grad for n, p in model.named_parameters()}
    assert worst_error(gradients, {n: p.grad for n, p in twin.named_parameters()}) < 1e-10


def their_inputs(batch):
    ids, types, mask = padded(batch)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long()}


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_sequence_classification(problem):
    num_labels = 1 if problem == "regression" else 3
    model = perturbed(AlbertForSequenceClassification(CONFIG, num_labels, problem).double())
    names = {
        "single_label": "single_label_classification",
        "multi_label": "multi_label_classification",
        "regression": "regression",
    }
    twin = twin_of(
        model, "AlbertForSequenceClassification", num_labels=num_labels, problem_type=names[problem]
    )
    batch = random_sequences(CONFIG.vocab_size)
    labels = {
        "single_label": torch.tensor([2, 0, 1, 1]),
        "multi_label": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double(),
        "regression": torch.tensor([0.5, -1.0, 2.0, 0.0]).double(),
    }[problem]
    expected = twin(**their_inputs(batch), labels=labels)
    logits = model(batch)
    both = {"packed": logits, "padded": model.forward_padded(*padded(batch))}
    loss = model.loss_sum(logits, labels) / len(LENGTHS)
    compare(model, twin, both, dict.fromkeys(both, expected.logits), loss, expected.loss)


def test_sequence_classification_ignores_missing_labels():
    model = AlbertForSequenceClassification(CONFIG, 3)
    logits = model(random_sequences(CONFIG.vocab_size))
    whole = model.loss_sum(logits, torch.tensor([2, -100, 1, -100]))
    parts = model.loss_sum(logits[[0, 2]], torch.tensor([2, 1]))
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)


def test_token_classification():
    model = perturbed(AlbertForTokenClassification(CONFIG, 5).double())
    twin = twin_of(model, "AlbertForTokenClassification", num_labels=5)
    batch = random_sequences(CONFIG.vocab_size)
    ids, types, mask = padded(batch)
    labels = torch.arange(len(batch.input_ids)) % 5
    labels[::7] = -100
    rows = torch.full_like(ids, -100)
    rows[mask] = labels
    expected = twin(**their_inputs(batch), labels=rows)
    logits = model(batch)
    both = {"packed": logits, "padded": model.forward_padded(ids, types, mask)[mask]}
    loss = model.loss_sum(logits, labels) / (labels >= 0).sum()
    compare(model, twin, both, dict.fromkeys(both, expected.logits[mask]), loss, expected.loss)


def test_question_answering():
    model = perturbed(AlbertForQuestionAnswering(CONFIG).double())
    twin = twin_of(model, "AlbertForQuestionAnswering")
    batch = random_sequences(CONFIG.vocab_size, EQUAL)
    starts, ends = torch.tensor([3, 0, 12, 5]), torch.tensor([4, 0, 12, 9])
    expected = twin(**their_inputs(batch), start_positions=starts, end_positions=ends)
    start, end = model(batch)
    padded_start, padded_end = model.forward_padded(*padded(batch))
    ours = {"s": start, "e": end, "ps": padded_start.flatten(), "pe": padded_end.flatten()}
    theirs = {"s": expected.start_logits, "e": expected.end_logits}
    theirs = {key: theirs[key[-1]].flatten() for key in ours}
    total = model.loss_sum(start, starts, EQUAL) + model.loss_sum(end, ends, EQUAL)
    compare(model, twin, ours, theirs, total / 2 / len(EQUAL), expected.loss)


def test_question_answering_softmax_is_over_the_own_sequence_only():
    model = AlbertForQuestionAnswering(CONFIG).double()
    batch = random_sequences(CONFIG.vocab_size)
    start, _ = model(batch)
    positions = torch.tensor([3, -100, 16, 0])
    rows = [row.log_softmax(0) for row in start.split(LENGTHS)]
    expected = -(rows[0][3] + rows[2][16] + rows[3][0])
    assert model.loss_sum(start, positions, LENGTHS).item() == pytest.approx(expected.item(), rel=1e-12)


def test_multiple_choice():
    model = perturbed(AlbertForMultipleChoice(CONFIG, 2).double())
    twin = twin_of(model, "AlbertForMultipleChoice")
    batch = random_sequences(CONFIG.vocab_size)
    labels = torch.tensor([1, 0])
    inputs = {name: x.view(2, 2, -1) for name, x in their_inputs(batch).items()}
    expected = twin(**inputs, labels=labels)
    logits = model(batch)
    both = {"packed": logits, "padded": model.forward_padded(*padded(batch)).view(2, 2)}
    loss = model.loss_sum(logits, labels) / 2
    compare(model, twin, both, dict.fromkeys(both, expected.logits), loss, expected.loss)


def test_pretraining_sums_do_not_depend_on_how_a_batch_is_divided():
    model = AlbertForPreTraining(tiny()).double()
    sequences = random_sequences(60)
    indices = torch.tensor([0, 3, 12, 20, 30, 46])
    labels, orders = torch.tensor([7, 8, 9, 10, 11, 12]), torch.tensor([0, 1, -100, 1])
    whole = model(PretrainBatch(sequences, indices, labels, orders), with_accuracy=True)
    totals, start = torch.zeros(4, dtype=torch.float64), 0
    for row, (length, order) in enumerate(zip(LENGTHS, orders, strict=True)):
        part = random_sequences(60)
        inside = (indices >= start) & (indices < start + length)
        ids, types = part.input_ids[start : start + length], part.token_type_ids[start : start + length]
        single = PretrainBatch(
            type(part)(ids, types, torch.arange(length), torch.tensor([0, length]).int(), (length,)),
            indices[inside] - start,
            labels[inside],
            order[None],
        )
        output = model(single, with_accuracy=True)
        totals += torch.stack([x.double().detach() for x in output])
        start += length
        assert row < len(LENGTHS)
    torch.testing.assert_close(totals, torch.stack([x.double().detach() for x in whole]), rtol=1e-12, atol=0)


def test_a_batch_without_any_target_costs_nothing():
    model = AlbertForPreTraining(tiny())
    none = torch.zeros(0, dtype=torch.int64)
    output = model(PretrainBatch(random_sequences(60), none, none, torch.full((4,), -100)))
    assert (output.mlm_loss_sum.item(), output.sop_loss_sum.item()) == (0.0, 0.0)
    assert output.mlm_correct is None
    (output.mlm_loss_sum + output.sop_loss_sum).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "brightmart", "ln_type": "preln", "final_ln": True, "share_type": "none"},
        {"inner_group_num": 2},
        {"num_hidden_layers": 1},
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_on_the_needed_tokens_alone_gives_the_same(options, checkpointing):
    torch.manual_seed(0)
    model = perturbed(AlbertForSequenceClassification(tiny(**options), 3))
    model.activation_checkpointing = checkpointing
    batch = random_sequences(60)
    for needed in (torch.tensor([], dtype=torch.int64), torch.tensor([3, 1, len(batch.input_ids) - 1, 5])):
        results = []
        for argument in (None, needed):
            model.zero_grad()
            hidden, pooled = model.albert(batch, needed=argument)
            hidden = hidden[needed] if argument is None else hidden
            (hidden.square().sum() + pooled.sum()).backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append({"hidden": hidden.detach(), "pooled": pooled.detach(), **gradients})
        whole, part = results
        assert part.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(part[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
