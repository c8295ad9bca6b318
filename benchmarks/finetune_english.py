r"""What a pretraining of an hour on a CPU is worth in English: MRPC F1 and STS-B Pearson against pretraining steps.

    python -m benchmarks.finetune_english --mrpc MRPC --sts-b STS-B --text speeches.txt \
        --output runs/english [--steps 4000] [--ranks 2] [--seeds 2]

MRPC is the directory of msr_paraphrase_train.txt and msr_paraphrase_test.txt, STS-B that of train.tsv and dev.tsv in
GLUE's form.

1. A tenth of each task's train rows is dev, which chooses the best weights; test is MRPC's test and STS-B's dev.
2. Text: the train rows without labels, as documents of two sentences, --text, and the demo's corpus (what every
   Python carries). Nothing of test is read before the end. A SentencePiece model of 8,000 pieces is trained on it.
3. A small ALBERT (hidden 192, 4 layers, 96 tokens) is pretrained; every 2,000th checkpoint is kept.
4. Each of them, and the fresh weights, are fine-tuned on both tasks with --seeds seeds.
5. The baselines: for MRPC the majority's F1, for STS-B the correlation with the share of common words.

Stages that are done are not repeated, and one that was stopped goes on, so the command can be given again. Prints
one JSON line for each task and draws OUTPUT/mrpc-curve.svg and OUTPUT/sts-b-curve.svg.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from benchmarks.figure import print_figure
from benchmarks.learning import Study, add_study_options, run, write_documents

_VOCAB_SIZE = 8000
_COLUMNS = {"mrpc": (3, 4, 0), "sts-b": (7, 8, 9)}
"""First text, second text and label."""
_FINETUNE = ("--epochs", "4", "--batch-size", "32", "--learning-rates", "2e-4", "--reinit-pooler")
"""The pooler has learned nothing: no order of two paraphrases is the right one."""


def split_rows(train: Path, test: Path, directory: Path) -> None:
    """train.tsv, dev.tsv (a tenth of the rows of `train`, at random) and test.tsv, each with the header."""
    header, *rows = train.read_text(encoding="utf-8-sig").splitlines()
    order = np.random.default_rng(0).permutation(len(rows))
    parts = {"dev": order[: len(rows) // 10], "train": order[len(rows) // 10 :]}
    directory.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        lines = [header, *(rows[i] for i in chosen)]
        (directory / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "test.tsv").write_text(test.read_text(encoding="utf-8-sig"), encoding="utf-8")


def read_rows(path: Path, task: str) -> list[tuple[str, str, float]]:
    """First text, second text and label of every row."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    first, second, label = _COLUMNS[task]
    return [(row[first], row[second], float(row[label])) for row in rows]


def majority_f1(labels: list[float]) -> float:
    """F1 of a model that calls every pair a paraphrase."""
    share = float(np.mean(labels))
    return 2 * share / (1 + share)


def overlap_pearson(rows: list[tuple[str, str, float]]) -> float:
    """Correlation of the scores with the share of common words; nothing is learned."""
    words = [[set(re.findall(r"\w+", text.lower())) for text in row[:2]] for row in rows]
    shares = [len(first & second) / max(1, len(first | second)) for first, second in words]
    return float(np.corrcoef(shares, [row[2] for row in rows])[0, 1])


def prepare(options: argparse.Namespace, study: Study) -> None:
    """Splits, text, tokenizer and shards."""
    split_rows(
        options.mrpc / "msr_paraphrase_train.txt",
        options.mrpc / "msr_paraphrase_test.txt",
        study.output / "mrpc",
    )
    split_rows(options.sts_b / "train.tsv", options.sts_b / "dev.tsv", study.output / "sts-b")
    text, demo, tokenizer = (study.output / name for name in ("text", "demo", "tokenizer"))
    for task in _COLUMNS:
        rows = [
            row[:2]
            for name in ("train", "dev")
            for row in read_rows(study.output / task / f"{name}.tsv", task)
        ]
        write_documents(rows, text / f"{task}.txt")
    if not (demo / "corpus.txt").is_file():
        run("data_prep", "demo-corpus", "--output", str(demo))
    inputs = [*(text / f"{task}.txt" for task in _COLUMNS), demo / "corpus.txt", *options.text]
    if not (tokenizer / "spiece.model").is_file():
        run(
            "data_prep", "tokenizer", "--input", *map(str, inputs), "--output", str(tokenizer),
            "--vocab-size", str(_VOCAB_SIZE),
        )  # fmt: skip
    study.build_shards(inputs, {f"text/{task}.txt": 4 for task in _COLUMNS}, tokenizer / "spiece.model")


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mrpc", type=Path, help="directory of MRPC's two files")
    parser.add_argument("--sts-b", type=Path, help="directory of STS-B in GLUE's form")
    add_study_options(parser, "runs/english", steps=4000)
    options = parser.parse_args()
    if options.mrpc is None or options.sts_b is None:
        sys.stderr.write("finetune_english: left out; it needs --mrpc and --sts-b, see --help\n")
        return
    study = Study(options.output, _VOCAB_SIZE, 96, options.steps, 2000, options.ranks, options.seeds)
    prepare(options, study)
    models = study.pretrain()
    tests = {task: read_rows(study.output / task / "test.tsv", task) for task in _COLUMNS}
    baselines = {
        "mrpc": {"majority": majority_f1([label for *_, label in tests["mrpc"]])},
        "sts-b": {"share of common words": overlap_pearson(tests["sts-b"])},
    }
    for task, metric in (("mrpc", "F1"), ("sts-b", "Pearson")):
        best, conditions = study.compare(task, metric, models, _FINETUNE, baselines[task])
        print_figure(f"{task}_{metric.lower()}", [best], metric, **conditions)


if __name__ == "__main__":
    main()
