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
one JSON line and draws OUTPUT/curve.svg.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from albert.checkpoint import list_steps, step_directory
from albert.config import load_run_config
from albert.heads import AlbertForPreTraining
from albert.pretrained import save_pretrained
from benchmarks.figure import print_figure

_KEEP_EVERY = 500
_MODEL = {
    "preset": "base", "vocab_size": 21128, "embedding_size": 128, "hidden_size": 192, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 768, "max_position_embeddings": 128,
    "initializer_range": 0.06,  # about 1 / sqrt(hidden_size)
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_BUILD = ("--max-seq-length", "64", "--eval-fraction", "0.005", "--max-ngram", "1")
"""Masks of single characters are the easier beginning for so short a pretraining."""
_FINETUNE = (
    "--epochs", "3", "--batch-size", "32", "--max-seq-length", "64", "--learning-rates", "2e-4", "--reinit-pooler",
)  # fmt: skip
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


def write_documents(sources: Sequence[Path], target: Path) -> None:
    """Every pair as a document of two sentences."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = (line for source in sources for line in source.read_text(encoding="utf-8").splitlines())
    documents = ("\n".join(line.split("\t")[:2]) for line in lines)
    target.write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def build_shards(options: argparse.Namespace) -> None:
    """The data set of the pretraining."""
    text = options.output / "text"
    write_documents(
        [options.output / "lcqmc" / f"{name}.tsv" for name in ("train", "dev")], text / "train.txt"
    )
    write_documents(options.pairs, text / "pairs.txt")
    weights = ("--weight", "*/text/train.txt=6", "--weight", "*/text/pairs.txt=3")
    inputs = [str(path) for path in (text / "train.txt", text / "pairs.txt", *options.text)]
    arguments = (
        "--input",
        *inputs,
        "--tokenizer",
        str(options.vocab),
        "--output",
        str(options.output / "shards"),
    )
    _run("data_prep", "build", *arguments, *weights, *_BUILD)


def write_config(options: argparse.Namespace) -> Path:
    """The pretraining's configuration."""
    path = options.output / "pretrain.yaml"
    shards, output = options.output / "shards", options.output / "pretrain"
    config = {
        "model": _MODEL,
        "data": {"directory": str(shards), "num_workers": 0, "remask": True},
        "train": {
            "output_dir": str(output), "num_steps": options.steps, "global_batch_size": 48,
            "micro_batch_size": 24, "precision": "fp32",
        },
        "optimizer": {"name": "adamw", "learning_rate": 0.001, "beta2": 0.98},
        "schedule": {"name": "wsd", "warmup_steps": 100, "decay_steps": min(400, options.steps // 4)},
        "eval": {"interval_steps": _KEEP_EVERY, "num_examples": 256, "micro_batch_size": 64},
        "checkpoint": {"interval_steps": 250, "keep_last": 1, "keep_every": _KEEP_EVERY},
        "deepspeed": {"config": "zero0"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def finetune(options: argparse.Namespace, step: int, model: Path) -> tuple[float, float]:
    """Mean and deviation of the test accuracy over the seeds."""
    output = options.output / "finetune" / f"step-{step}"
    arguments = ("--data-dir", str(options.output / "lcqmc"), "--model", str(model), "--output", str(output))
    actions = ("--do-train", "--do-eval", "--do-test", "--seeds", str(options.seeds), "--no-tensorboard")
    _run("albert.finetune", "--task", "lcqmc", *arguments, *actions, *_FINETUNE)
    (row,) = json.loads((output / "sweep.json").read_bytes())["by_learning_rate"]
    return row["test"]["mean"], row["test"]["deviation"]


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


def draw(curve: dict[int, tuple[float, float]], baselines: dict[str, float], path: Path) -> None:
    """Accuracy against steps as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "curve", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    steps = sorted(curve)
    means, deviations = zip(*(curve[step] for step in steps), strict=True)
    axes.errorbar(steps, means, yerr=deviations, marker="o", capsize=3, label="fine-tuned")
    for (name, value), style in zip(baselines.items(), (":", "--"), strict=False):
        axes.axhline(value, linestyle=style, color="grey", label=name)
    axes.set(xlabel="pretraining steps", ylabel="test accuracy")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def _run(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lcqmc", type=Path, help="labelled pairs: text TAB text TAB label")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[], help="more pairs; labels are not read")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="running text")
    parser.add_argument("--vocab", type=Path, help="BERT's Chinese vocab.txt")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--steps", type=int, default=3000, help="pretraining steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    if options.lcqmc is None or options.vocab is None:
        sys.stderr.write("finetune_learning: left out; it needs --lcqmc and --vocab, see --help\n")
        return
    split_pairs(options.lcqmc, options.output / "lcqmc")
    if not (options.output / "shards" / "manifest.json").is_file():
        build_shards(options)
    config_path = write_config(options)
    config = load_run_config(str(config_path))
    fresh, pretrain = options.output / "fresh", Path(config.train.output_dir)
    save_pretrained(
        fresh, config.model, AlbertForPreTraining(config.model, seed=config.seed).state_dict(),
        options.output / "shards" / "tokenizer",
    )  # fmt: skip
    if not (pretrain / "model").is_dir():
        _run("launcher", "local", "-n", str(options.ranks), "pretrain", "--config", str(config_path))
    curve = {0: finetune(options, 0, fresh)}
    for step in list_steps(pretrain / "checkpoints"):
        curve[step] = finetune(options, step, step_directory(pretrain / "checkpoints", step))
    baselines = {
        "overlap of characters": baseline(options.output / "lcqmc", False),
        "overlap and lengths": baseline(options.output / "lcqmc", True),
    }
    draw(curve, baselines, options.output / "curve.svg")
    best, _ = curve[max(curve)]
    print_figure(
        "lcqmc_accuracy_over_character_overlap", [100 * (best - baselines["overlap of characters"])], "points",
        curve={step: [round(value, 4) for value in curve[step]] for step in curve}, seeds=options.seeds,
        baselines={name: round(value, 4) for name, value in baselines.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
