r"""What a pretraining of an hour on a CPU is worth: accuracy on LCQMC's form of data against pretraining steps.

    python -m benchmarks.finetune_learning --lcqmc dev.txt --pairs afqmc/train.txt --text novels.txt cmrc.txt \
        --vocab vocab.txt --output runs/learning [--steps 3000] [--ranks 2] [--seeds 2]

1. The labelled pairs are split 7:3 into train and test; a tenth of train is dev, which chooses the best weights.
2. Text: the pairs of train and of --pairs, without labels and as documents of two sentences, and --text as it is.
   Nothing of test is ever read before the end.
3. A small ALBERT (hidden 192, 4 layers, 64 tokens) is pretrained; every 500th checkpoint is kept.
4. Each of them, and the fresh weights, are fine-tuned with --seeds seeds.
5. Logistic regressions on the overlap of characters, alone and with the lengths of both texts, are the baselines.

Stages that are done are not repeated, and one that was stopped goes on, so the command can be given again. Prints
one JSON line and draws OUTPUT/lcqmc-curve.svg.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.figure import print_figure
from benchmarks.learning import Study, add_study_options, write_documents

_VOCAB_SIZE = 21128
_FINETUNE = ("--epochs", "3", "--batch-size", "32", "--learning-rates", "2e-4", "--reinit-pooler")
"""The pooler has learned nothing: no order of two questions is the right one."""


def split_pairs(source: Path, directory: Path) -> None:
    """train.tsv, dev.tsv and test.tsv: 63, 7 and 30 % of the rows in a fixed random order."""
    rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
    order = np.random.default_rng(0).permutation(len(rows))
    end = len(rows) * 7 // 10
    directory.mkdir(parents=True, exist_ok=True)
    for name, chosen in (
        ("dev", order[: end // 10]),
        ("train", order[end // 10 : end]),
        ("test", order[end:]),
    ):
        (directory / f"{name}.tsv").write_text("".join(rows[i] for i in chosen), encoding="utf-8")


def read_pairs(*sources: Path) -> list[tuple[str, str]]:
    """The first two columns of all rows."""
    lines = (line for source in sources for line in source.read_text(encoding="utf-8").splitlines())
    return [(columns[0], columns[1]) for columns in (line.split("\t") for line in lines)]


def baseline(directory: Path, with_lengths: bool) -> float:
    """Test accuracy of a logistic regression on the share of common characters, and perhaps on the lengths."""
    parts = {name: _features(directory / f"{name}.tsv", with_lengths) for name in ("train", "dev", "test")}
    features, labels = (np.concatenate([parts["train"][i], parts["dev"][i]]) for i in (0, 1))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100.0)).fit(features, labels)
    return float(model.score(*parts["test"]))


def _features(path: Path, with_lengths: bool) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    values = []
    for first, second, _ in rows:
        common = set(first) & set(second)
        overlap = [len(common) / len(set(part)) for part in (first + second, first, second)]
        sizes = [abs(len(first) - len(second)), len(first), len(second), len(common)]
        values.append([*overlap, *(sizes if with_lengths else ())])
    return np.array(values, dtype=np.float64), np.array([int(row[2]) for row in rows])


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lcqmc", type=Path, help="labelled pairs: text TAB text TAB label")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[], help="more pairs; labels are not read")
    parser.add_argument("--vocab", type=Path, help="BERT's Chinese vocab.txt")
    add_study_options(parser, "runs/learning", steps=3000)
    options = parser.parse_args()
    if options.lcqmc is None or options.vocab is None:
        sys.stderr.write("finetune_learning: left out; it needs --lcqmc and --vocab, see --help\n")
        return
    study = Study(options.output, _VOCAB_SIZE, 64, options.steps, 500, options.ranks, options.seeds)
    lcqmc, text = study.output / "lcqmc", study.output / "text"
    split_pairs(options.lcqmc, lcqmc)
    write_documents(read_pairs(lcqmc / "train.tsv", lcqmc / "dev.tsv"), text / "train.txt")
    write_documents(read_pairs(*options.pairs), text / "pairs.txt")
    inputs = (text / "train.txt", text / "pairs.txt", *options.text)
    study.build_shards(inputs, {"text/train.txt": 6, "text/pairs.txt": 3}, options.vocab)
    models = study.pretrain()
    baselines = {
        "overlap of characters": baseline(lcqmc, False),
        "overlap and lengths": baseline(lcqmc, True),
    }
    best, conditions = study.compare("lcqmc", "accuracy", models, _FINETUNE, baselines)
    points = 100 * (best - baselines["overlap of characters"])
    print_figure("lcqmc_accuracy_over_character_overlap", [points], "points", **conditions)


if __name__ == "__main__":
    main()
