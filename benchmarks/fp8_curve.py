"""Loss curves of a small pretraining with float8 products beside those with bf16: `train.fp8` on a GPU, or emulated.

    python -m benchmarks.fp8_curve [--output runs/fp8] [--steps 1500] [--seeds 2] [section.key=value ...]

1. Text: the demo's corpus (what every Python carries); a SentencePiece model of 500 pieces and shards of it.
2. Each seed is pretrained twice, on the same examples from the same weights, in bf16 and with float8 products: real
   ones where a GPU has them, elsewhere emulated ones, which say nothing about speed. The model (hidden 64, 2 layers,
   64 tokens) is small enough to learn more than the frequencies of pieces in minutes; overrides choose another one.
3. The figure is the difference of the losses (MLM + SOP) at the end, float8 minus bf16: the mean of the last tenth of
   the steps, for each seed. `is_within_seeds` says whether its mean is at most the spread of the seeds, which is the
   larger one of both precisions. The same is said of the loss on held-out examples.

Runs that are finished are not repeated. Prints one JSON line and draws OUTPUT/fp8-curve.svg.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from albert.fp8 import has_fp8
from albert.monitoring import read_metrics
from benchmarks.figure import print_figure, svg_axes
from benchmarks.learning import run

_VOCAB_SIZE, _LENGTH = 500, 64
_LOG_INTERVAL = 10
_SETTINGS = (
    f"model.vocab_size={_VOCAB_SIZE}", "model.hidden_size=64", "model.num_attention_heads=2",
    "model.intermediate_size=256", "model.num_hidden_layers=2", "model.initializer_range=0.12",
    "model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0", "optimizer.learning_rate=0.005",
    "data.remask=true", "train.precision=bf16", "train.global_batch_size=16", "train.micro_batch_size=16",
    "deepspeed.config=zero1", f"log.interval_steps={_LOG_INTERVAL}", "log.tensorboard=false", "log.progress=off",
    "eval.num_examples=512", "checkpoint.keep_last=1",
)  # fmt: skip

Losses = dict[str, list[float]]
"""Of each precision, a value for each seed."""


def prepare(output: Path) -> None:
    """Text, tokenizer and shards."""
    text, tokenizer, shards = (output / name for name in ("text", "tokenizer", "shards"))
    if (shards / "manifest.json").is_file():
        return
    run("data_prep", "demo-corpus", "--output", str(text))
    corpus = str(text / "corpus.txt")
    run(
        "data_prep", "tokenizer", "--input", corpus, "--output", str(tokenizer),
        "--vocab-size", str(_VOCAB_SIZE),
    )  # fmt: skip
    run(
        "data_prep", "build", "--input", corpus, "--tokenizer", str(tokenizer), "--output", str(shards),
        "--max-seq-length", str(_LENGTH), "--max-ngram", "1", "--eval-fraction", "0.06",
    )  # fmt: skip


def pretrain(directory: Path, shards: Path, mode: str, seed: int, options: argparse.Namespace) -> None:
    """One run; `mode` is the value of train.fp8."""
    if (directory / "model").is_dir():
        return
    run(
        "albert.pretrain", "--config", "demo", *_SETTINGS,
        f"data.directory={shards}", f"train.output_dir={directory}", f"train.fp8={mode}", f"seed={seed}",
        f"train.num_steps={options.steps}", f"schedule.warmup_steps={options.steps // 10}",
        f"eval.interval_steps={options.steps}", f"checkpoint.interval_steps={options.steps}", *options.overrides,
    )  # fmt: skip


def curve(directory: Path) -> tuple[list[int], list[float]]:
    """Steps, and the mean loss of the steps since the one before."""
    lines = read_metrics(directory, "train")
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def final_loss(directory: Path) -> float:
    """Mean of the last tenth of the steps."""
    losses = curve(directory)[1]
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def held_out_loss(directory: Path) -> float:
    """At the end, MLM + SOP."""
    last = read_metrics(directory, "eval")[-1]
    return float(last["mlm_loss"] + last["sop_loss"])


def compare(losses: Losses) -> dict[str, Any]:
    """What is said of the losses of `bf16` and `fp8`."""
    difference = statistics.mean(losses["fp8"]) - statistics.mean(losses["bf16"])
    spread = max(max(values) - min(values) for values in losses.values())
    return {
        **{precision: [round(value, 4) for value in values] for precision, values in losses.items()},
        "difference": round(difference, 4),
        "spread_of_seeds": round(spread, 4),
        "is_within_seeds": abs(difference) <= spread,
    }


def draw(runs: Mapping[str, list[Path]], path: Path) -> None:
    """All curves."""
    styles = {"bf16": ("-", ("C0", "C2")), "fp8": ("--", ("C1", "C3"))}
    with svg_axes(path, "pretraining steps", "loss (MLM + SOP), nats") as axes:
        for precision, (line, colours) in styles.items():
            for seed, directory in enumerate(runs[precision]):
                label = f"{precision}, seed {seed}"
                axes.plot(
                    *curve(directory), line, color=colours[seed % len(colours)], linewidth=1, label=label
                )


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the runs")
    options = parser.parse_intermixed_args()
    is_real = torch.cuda.is_available() and has_fp8(torch.device("cuda"))
    modes = {"bf16": "off", "fp8": "on" if is_real else "emulated"}
    prepare(options.output)
    runs = {
        precision: [options.output / f"{precision}-{seed}" for seed in range(options.seeds)]
        for precision in modes
    }
    for seed in range(options.seeds):
        for precision, mode in modes.items():
            pretrain(runs[precision][seed], options.output / "shards", mode, seed, options)
    final, held_out = (
        {
            precision: [loss_of(directory) for directory in directories]
            for precision, directories in runs.items()
        }
        for loss_of in (final_loss, held_out_loss)
    )
    draw(runs, options.output / "fp8-curve.svg")
    print_figure(
        "fp8_final_loss", [a - b for a, b in zip(final["fp8"], final["bf16"], strict=True)], "nats over bf16",
        fp8=modes["fp8"], steps=options.steps, final_loss=compare(final), held_out_loss=compare(held_out),
        overrides=options.overrides,
    )  # fmt: skip


if __name__ == "__main__":
    main()
