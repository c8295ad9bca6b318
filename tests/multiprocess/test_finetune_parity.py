"""Five training steps of every kind of head equal Hugging Face's model under torch's AdamW."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from albert.batches import pack
from albert.convert.huggingface import hugging_face_name
from albert.convert.huggingface_export import hugging_face_config
from albert.distributed import close_world, init_world
from albert.finetune.features import LabelledBatch
from albert.finetune.settings import settings_for
from albert.finetune.task_model import build_model, loss_sum
from albert.finetune.tasks import find_task
from albert.finetune.training import build_engine
from albert.model_config import ModelConfig
from albert.optim.groups import is_excluded
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiprocess
_STEPS = 5
_RATE = 1e-3
_SHIFTS = ("span_classifier.bias", "choice_classifier.bias")
"""A softmax is blind to these; their gradient is rounding noise, which Adam blows up to a part of its step."""
_CONFIG = ModelConfig(
    vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=32, initializer_range=0.1, classifier_dropout_prob=0.0,
)  # fmt: skip
_KINDS = {
    "classification": ("lcqmc", "AlbertForSequenceClassification", 2),
    "regression": ("sts-b", "AlbertForSequenceClassification", 1),
    "span": ("squad", "AlbertForQuestionAnswering", 2),
    "choice": ("race", "AlbertForMultipleChoice", 1),
    "tagging": ("conll-ner", "AlbertForTokenClassification", 3),
}


def _draw(kind: str, rng: np.random.Generator) -> tuple[list[np.ndarray], torch.Tensor]:
    """Sequences and labels; spans get equal lengths, since Hugging Face's softmax runs over the padding too."""
    count = 8
    lengths = np.full(count, 12) if kind == "span" else rng.integers(4, 16, count)
    sequences = [rng.integers(5, 50, length) for length in lengths]
    if kind == "classification":
        return sequences, torch.from_numpy(rng.integers(0, 2, count))
    if kind == "regression":
        return sequences, torch.from_numpy(rng.random(count).astype(np.float32) * 5)
    if kind == "span":
        return sequences, torch.from_numpy(np.sort(rng.integers(0, 12, (count, 2)), axis=1))
    if kind == "choice":
        return sequences, torch.from_numpy(rng.integers(0, 4, count // 4))
    labels = rng.integers(0, 3, int(lengths.sum()))
    labels[rng.random(len(labels)) < 0.3] = -100
    return sequences, torch.from_numpy(labels)


def _ours(kind: str, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and final weights of our model under the engine."""
    task = find_task(_KINDS[kind][0])
    settings = settings_for(
        task, {"learning_rate": _RATE, "batch_size": 8, "epochs": 1.0, "max_grad_norm": 1.0}
    )
    world = init_world("cpu", 60.0)
    try:
        model = build_model(task, ("a", "b", "c")[: _KINDS[kind][2]], _CONFIG, seed=1)
        engine = build_engine(model, settings, world)
        rng, losses = np.random.default_rng(5), []
        for _ in range(steps):
            sequences, labels = _draw(kind, rng)
            lengths = tuple(map(len, sequences))
            ids = torch.from_numpy(np.concatenate(sequences))
            groups = (4,) * 2 if kind == "choice" else ()
            batch = LabelledBatch(pack(ids, torch.zeros_like(ids), lengths), labels, groups)
            count = int((labels != -100).sum()) if kind == "tagging" else len(labels)
            loss = loss_sum(engine.model, engine.forward(batch.sequences), batch) / count
            engine.backward(loss)
            engine.step(_RATE)
            losses.append(float(loss))
        weights = {
            name: tensor.numpy().copy() for part, name, tensor in engine.gather_state() if part == "weights"
        }
    finally:
        close_world()
    return losses, weights


def _theirs(kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same of Hugging Face's model, from the same initial weights."""
    task_name, architecture, num_labels = _KINDS[kind]
    start = build_model(find_task(task_name), ("a", "b", "c")[:num_labels], _CONFIG, seed=1).state_dict()
    config = transformers.AlbertConfig(
        **{**hugging_face_config(_CONFIG, architecture), "num_labels": num_labels}
    )
    if kind == "regression":
        config.problem_type = "regression"
    model = getattr(transformers, architecture)(config)
    missing, unexpected = model.load_state_dict(
        {hugging_face_name(name, 1): tensor for name, tensor in start.items()}, strict=False
    )
    assert not unexpected
    assert all("position_ids" in name or "pooler" in name for name in missing)
    named = [(name, p) for name, p in model.named_parameters()]
    groups = [
        {"params": [p for n, p in named if _is_excluded(n) == flag], "weight_decay": 0.0 if flag else 0.01}
        for flag in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.999), eps=1e-6)
    rng, losses = np.random.default_rng(5), []
    for _ in range(_STEPS):
        loss = model(**_padded(kind, *_draw(kind, rng))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses, model.state_dict()


def _is_excluded(name: str) -> bool:
    return is_excluded(name) or "layer_norm" in name


def _padded(kind: str, sequences: list[np.ndarray], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch as Hugging Face takes it."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    tags = torch.full_like(ids, -100)
    position = 0
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
        if kind == "tagging":
            tags[row, : len(sequence)] = labels[position : position + len(sequence)]
            position += len(sequence)
    if kind == "choice":
        return {"input_ids": ids.view(2, 4, -1), "attention_mask": mask.view(2, 4, -1), "labels": labels}
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "span":
        return {**batch, "start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    return {**batch, "labels": tags if kind == "tagging" else labels}


@pytest.mark.parametrize("kind", _KINDS)
def test_five_steps_equal_hugging_face(kind):
    losses, weights = run_ranks(1, _ours, kind, _STEPS)[0]
    their_losses, their_weights = _theirs(kind)
    assert losses == pytest.approx(their_losses, rel=1e-5)
    for name, tensor in weights.items():
        expected = their_weights[hugging_face_name(name, 1)].numpy()
        bound = 1e-4 if name in _SHIFTS else 1e-5
        assert np.abs(tensor - expected).max() < bound, name


_DECAY = 0.5
_UNSHARED = _CONFIG.model_copy(update={"share_type": "none"})
_RATES = {
    "albert.embeddings.": _DECAY**4,
    "albert.encoder.embedding_hidden_mapping_in.": _DECAY**4,
    **{f"albert.encoder.{block}.{layer}.": _DECAY ** (3 - layer) for block in ("attention", "feed_forward")
       for layer in range(3)},
    "albert.pooler.": 1.0,
    "classifier.": 1.0,
}  # fmt: skip
"""Of three layers of their own: head 1, layers 1/2, 1/4, 1/8 from the top, embeddings 1/16."""


def _decayed(steps: int) -> dict[str, np.ndarray]:
    changes = {
        "learning_rate": _RATE,
        "batch_size": 8,
        "epochs": 1.0,
        "layer_decay": _DECAY,
        "deepspeed": "zero1",
    }
    settings = settings_for(find_task("lcqmc"), changes)
    world = init_world("cpu", 60.0)
    try:
        engine = build_engine(build_model(find_task("lcqmc"), ("a", "b"), _UNSHARED, seed=1), settings, world)
        rng = np.random.default_rng(5)
        for _ in range(steps):
            sequences, labels = _draw("classification", rng)
            mine = range(world.rank, 8, world.size)
            ids = torch.from_numpy(np.concatenate([sequences[i] for i in mine]))
            packed = pack(ids, torch.zeros_like(ids), tuple(len(sequences[i]) for i in mine))
            batch = LabelledBatch(packed, labels[list(mine)])
            engine.backward(loss_sum(engine.model, engine.forward(packed), batch) / 8)
            engine.step(_RATE)
        return {
            name: value.numpy().copy() for part, name, value in engine.gather_state() if part == "weights"
        }
    finally:
        close_world()


def test_layer_decay_equals_torch_adamw_with_a_group_for_every_level():
    weights = run_ranks(2, _decayed, _STEPS)[0]
    model = build_model(find_task("lcqmc"), ("a", "b"), _UNSHARED, seed=1)
    groups = [
        {
            "params": [parameter],
            "lr": _RATE * next(rate for prefix, rate in _RATES.items() if name.startswith(prefix)),
            "weight_decay": 0.0 if is_excluded(name) else 0.01,
        }
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
    rng = np.random.default_rng(5)
    for _ in range(_STEPS):
        sequences, labels = _draw("classification", rng)
        ids = torch.from_numpy(np.concatenate(sequences))
        packed = pack(ids, torch.zeros_like(ids), tuple(map(len, sequences)))
        optimizer.zero_grad()
        (loss_sum(model, model(packed), LabelledBatch(packed, labels)) / 8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert np.abs(weights[name] - parameter.detach().numpy()).max() < 1e-5, name
