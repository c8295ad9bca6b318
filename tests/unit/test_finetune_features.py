"""Examples -> packed batches, for every kind of task, and outputs -> predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from albert.errors import ConfigError
from albert.finetune.alignment import align
from albert.finetune.batching import BatchOrder, evaluation_batches
from albert.finetune.examples import ChoiceExample, SpanExample, TagExample, TextExample
from albert.finetune.features import make_sequences, truncated_lengths
from albert.finetune.reading import Split
from albert.finetune.review import write_review
from albert.finetune.span_data import SpanData, first_literal_answer
from albert.finetune.task_data import make_task_data
from albert.finetune.tasks import find_task
from albert.tokenization import load_tokenizer

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_HAN = "北京大学在中国首都是的人口多少年建立了哪里谁"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    pieces = [
        *_SPECIAL,
        *_LETTERS,
        *(f"##{c}" for c in _LETTERS),
        "the",
        "##ing",
        *dict.fromkeys(_HAN),
        ".",
        ",",
        "?",
    ]
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return load_tokenizer(path)


def _truncate_by_popping(first, second, budget):
    """Google's `_truncate_seq_pair`, token by token."""
    while first + second > budget:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_truncation_equals_popping_token_by_token():
    lengths = np.array([(a, b) for a in range(15) for b in range(15)])
    for budget in (1, 2, 7, 8, 13, 40):
        kept = truncated_lengths(lengths[:, 0], lengths[:, 1], budget)
        expected = [_truncate_by_popping(int(a), int(b), budget) for a, b in lengths]
        np.testing.assert_array_equal(np.stack(kept, axis=1), expected)


def test_pairs_are_packed_without_padding(tokenizer):
    sequences = make_sequences(tokenizer, ["a b", "c"], ["d", "e f g"], 7)
    batch = sequences.pack(np.array([1, 0]))
    assert tokenizer.pieces(batch.input_ids.tolist()) == [
        *("[CLS]", "c", "[SEP]", "e", "f", "g", "[SEP]"),
        *("[CLS]", "a", "b", "[SEP]", "d", "[SEP]"),
    ]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert batch.position_ids.tolist() == [*range(7), *range(6)]
    assert (batch.cu_seqlens.tolist(), batch.lengths) == ([0, 7, 13], (7, 6))
    assert sequences.num_truncated == 0
    short = make_sequences(tokenizer, ["a b c d e"], None, 4)
    assert tokenizer.pieces(short.pack(np.array([0])).input_ids.tolist()) == ["[CLS]", "a", "b", "[SEP]"]
    assert short.num_truncated == 1


def _text_data(tokenizer, task, examples, labels=("0", "1"), length=32):
    return make_task_data(
        find_task(task), Split("dev", Path("f"), tuple(examples)), labels, tokenizer, length
    )


def test_classification_targets_predictions_and_scores(tokenizer):
    examples = [TextExample("x", "a", "b", "1"), TextExample("y", "c", "d", "0")]
    data = _text_data(tokenizer, "lcqmc", examples)
    assert data.batch(np.array([1, 0])).labels.tolist() == [0, 1]
    rows = np.array([[0.0, 1.0], [2.0, 3.0]], dtype=np.float32)
    predictions = data.predictions(rows)
    assert [(p["id"], p["prediction"], p["label"]) for p in predictions] == [("x", "1", "1"), ("y", "1", "0")]
    assert predictions[0]["probabilities"]["1"] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)
    assert data.scores(rows)["accuracy"] == 0.5


def test_regression_targets(tokenizer):
    data = _text_data(
        tokenizer, "sts-b", [TextExample("x", "a", "b", "2.5"), TextExample("y", "c", "d", "1")], ()
    )
    assert data.batch(np.array([0, 1])).labels.tolist() == [2.5, 1.0]
    assert data.scores(np.array([[5.0], [2.0]], dtype=np.float32))["pearson"] == pytest.approx(1.0)


def test_choices_of_different_number(tokenizer):
    examples = [
        ChoiceExample("x", "a b c d e f g h", "q", ("u", "v"), 1),
        ChoiceExample("y", "a", "q", ("u", "v", "w"), 2),
    ]
    data = _text_data(tokenizer, "c3", examples, (), 10)
    batch = data.batch(np.array([0, 1]))
    assert (batch.group_sizes, batch.labels.tolist()) == ((2, 3), [1, 2])
    pieces = tokenizer.pieces(batch.sequences.input_ids.tolist())
    assert pieces[:10] == ["[CLS]", *"abcde", "[SEP]", "q", "u", "[SEP]"]
    assert len(batch.sequences.lengths) == 5
    rows = data.rows(torch.tensor([[1.0], [2.0], [3.0], [5.0], [4.0]]), batch, np.array([0, 1]))
    assert rows.tolist() == [[1.0, 2.0, float("-inf")], [3.0, 5.0, 4.0]]
    assert [p["option"] for p in data.predictions(rows)] == ["v", "v"]
    assert data.scores(rows)["accuracy"] == 0.5


def test_tags_stand_at_the_first_token_of_each_word(tokenizer):
    examples = [
        TagExample("x", ("ab", "\u200b", "c"), ("B-X", "O", "I-X")),
        TagExample("y", ("c",) * 9, ("O",) * 9),
    ]
    data = _text_data(tokenizer, "conll-ner", examples, ("O", "B-X", "I-X"), 7)
    batch = data.batch(np.array([0, 1]))
    assert tokenizer.pieces(batch.sequences.input_ids.tolist())[:6] == [
        "[CLS]",
        "a",
        "##b",
        "[UNK]",
        "c",
        "[SEP]",
    ]
    assert batch.labels.tolist() == [-100, 1, -100, 0, 2, -100, -100, 0, 0, 0, 0, 0, -100]
    assert data.loss_counts.tolist() == [3, 5]
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 0, 2, 0, 0, 2, 0, 0, 0, 0, 0]), 3).float()
    rows = data.rows(logits, batch, np.array([0, 1]))
    assert rows[0].tolist() == [1, 0, 2, -1, -1, -1, -1, -1, -1]
    assert [p["prediction"] for p in data.predictions(rows)] == [["B-X", "O", "I-X"], ["I-X", *["O"] * 8]]


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("The cat", ["▁the", "▁c", "at"], ["The", "c", "at"]),
        ("Thé cat", ["the", "c", "##at"], ["Thé", "c", "at"]),
        ("在 NBA 打", ["在", "[UNK]", "打"], ["在", "NBA", "打"]),
        ("a ☃☃ b", ["▁a", "▁", "<unk>", "▁b"], ["a", "☃", "☃", "b"]),
        ("ﬁne", ["fi", "##ne"], ["ﬁ", "ne"]),
        ("cafe\u0301 au", ["caf", "##e", "au"], ["caf", "e\u0301", "au"]),
    ],
)
def test_alignment(text, pieces, expected):
    assert [text[start:end] for start, end in align(text, pieces)] == expected


def _oracle_rows(data: SpanData) -> np.ndarray:
    """Outputs of a model that knows the targets."""
    rows = []
    for unit in range(len(data.windows)):
        batch = data.batch(np.array([unit]))
        length = batch.sequences.lengths[0]
        start, end = torch.full((length,), -5.0), torch.full((length,), -5.0)
        start[batch.labels[0, 0]] = end[batch.labels[0, 1]] = 5.0
        rows.append(data.rows((start, end), batch, np.array([unit]))[0])
    return np.stack(rows)


def test_spans_with_sliding_windows_give_an_exact_oracle(tokenizer):
    context = "北京 is the capital. 人口 21 million, 建立 in 1045 BC. Running cafés: 多少"
    answers = ["北京", "capital", "21 million", "1045 BC", "cafés"]
    examples = [
        SpanExample(str(n), f"谁 {n}?", context, ((answer, context.index(answer)),))
        for n, answer in enumerate(answers)
    ]
    task = find_task("cmrc2018")
    for max_length, stride in ((28, 8), (40, 10), (128, 64)):
        task_options = {**task.options, "doc_stride": stride}
        changed = type(task)(**{**task.__dict__, "options": task_options})
        data = make_task_data(changed, Split("dev", Path("f"), tuple(examples)), (), tokenizer, max_length)
        assert max(data.lengths) <= max_length
        assert data.notes["answers split by a window"] == 0
        rows = _oracle_rows(data)
        assert data.scores(rows)["exact_match"] == 100.0, [p["prediction"] for p in data.predictions(rows)]


def test_unanswerable_questions_need_the_margin(tokenizer):
    example = SpanExample("q", "谁?", "北京 in 中国", (), is_impossible=True)
    rows = np.array([[1.0, 0.5, 0, 0]], dtype=np.float32)
    for task, text in (("squad2", ""), ("squad", "北")):
        data = make_task_data(find_task(task), Split("dev", Path("f"), (example,)), (), tokenizer, 32)
        assert data.predictions(rows)[0]["prediction"] == text


def test_misaligned_answers_are_found_again_or_dropped_with_a_count(tokenizer):
    moved = SpanExample("a", "q", "在北京大学", (("北京", 3),))
    absent = SpanExample("b", "q", "在北京大学", (("上海", 1),))
    assert first_literal_answer(moved) == (1, 3)
    data = make_task_data(
        find_task("cmrc2018"), Split("train", Path("f"), (moved, absent)), (), tokenizer, 32
    )
    assert [e.guid for e in data.examples] == ["a"]
    assert data.notes["misaligned answers"] == 1


def test_a_window_that_is_too_small_is_refused(tokenizer):
    example = SpanExample("a", "a b c d e f g", "在北京大学", (("北京", 1),))
    with pytest.raises(
        ConfigError, match=r"--max-seq-length 16 leaves 6 tokens .* question of 7; at least 18"
    ):
        make_task_data(find_task("squad"), Split("train", Path("f"), (example,)), (), tokenizer, 16)


def test_every_epoch_sees_every_unit_once_and_ranks_share_the_batch():
    order = BatchOrder(num_units=10, batch_size=4, seed=3)
    seen = np.concatenate([order.global_batch(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:20])
    lengths = np.arange(10)[::-1].copy()
    for step in range(5):
        parts = [
            np.concatenate(list(order.micro_batches(step, rank, 2, 1, lengths))).tolist() for rank in range(2)
        ]
        assert sorted(parts[0] + parts[1]) == sorted(order.global_batch(step).tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_covers_all_units_with_equal_batches(world_size):
    lengths = np.array([3, 9, 4, 1, 7, 7, 2])
    shares = [evaluation_batches(lengths, rank, world_size, 2) for rank in range(world_size)]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    assert set(np.concatenate([np.concatenate(share) for share in shares])) == set(range(7))


def test_predictions_can_be_written_as_json(tokenizer):
    data = _text_data(tokenizer, "lcqmc", [TextExample("x", "a", "b", None)])
    assert not data.is_labelled
    assert json.loads(json.dumps(data.predictions(np.zeros((1, 2), dtype=np.float32))))[0]["label"] is None


def test_the_review_shows_the_confusion_and_the_worst_mistakes_first(tokenizer, tmp_path):
    golds = ["1", "0", "1", "0"]
    data = _text_data(
        tokenizer, "lcqmc", [TextExample(f"n{i}", "a|b", "c", gold) for i, gold in enumerate(golds)]
    )
    rows = np.array([[1, 0], [0, 3], [0, 1], [1, 0]], dtype=np.float32)
    text = write_review(tmp_path, data, rows).read_text()
    assert "| **0** | 1 | 1 |\n| **1** | 1 | 1 |" in text
    mistakes = [line for line in text.splitlines() if "‖" in line]
    assert mistakes == [
        f"| {1 / (1 + np.exp(3)):.4f} | 0 | 1 | n1 | a\\|b ‖ c |",
        f"| {1 / (1 + np.exp(1)):.4f} | 1 | 0 | n0 | a\\|b ‖ c |",
    ]
