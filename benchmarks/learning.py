"""What the studies of little pretraining share: text to shards, a small ALBERT, one fine-tuning of a checkpoint."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from albert.checkpoint import list_steps, step_directory
from albert.config import load_run_config
from albert.heads import AlbertForPreTraining
from albert.pretrained import save_pretrained
from benchmarks.figure import svg_axes

_BUILD = ("--eval-fraction", "0.005", "--max-ngram", "1")
"""Masks of single characters or words are the easier beginning for so short a pretraining."""


@dataclass(frozen=True)
class Study:
    """One pretraining whose checkpoints are compared."""

    output: Path
    vocab_size: int
    max_seq_length: int
    steps: int
    keep_every: int
    """Steps between the checkpoints that are compared."""
    ranks: int
    seeds: int

    def build_shards(self, inputs: Sequence[Path], weights: Mapping[str, int], tokenizer: Path) -> None:
        """The data set of the pretraining; `weights` says how many times the files of a name are read."""
        if (self.output / "shards" / "manifest.json").is_file():
            return
        options = [item for name, weight in weights.items() for item in ("--weight", f"*/{name}={weight}")]
        run(
            "data_prep", "build", "--input", *map(str, inputs), "--tokenizer", str(tokenizer), "--output",
            str(self.output / "shards"), "--max-seq-length", str(self.max_seq_length), *options, *_BUILD,
        )  # fmt: skip

    def pretrain(self) -> dict[int, Path]:
        """Model directories by step; step 0 has fresh weights."""
        config_path = self._write_config()
        config = load_run_config(str(config_path))
        fresh, directory = self.output / "fresh", Path(config.train.output_dir)
        weights = AlbertForPreTraining(config.model, seed=config.seed).state_dict()
        save_pretrained(fresh, config.model, weights, self.output / "shards" / "tokenizer")
        if not (directory / "model").is_dir():
            run("launcher", "local", "-n", str(self.ranks), "pretrain", "--config", str(config_path))
        checkpoints = directory / "checkpoints"
        return {0: fresh} | {step: step_directory(checkpoints, step) for step in list_steps(checkpoints)}

    def _write_config(self) -> Path:
        path = self.output / "pretrain.yaml"
        config = {
            "model": {
                "preset": "base", "vocab_size": self.vocab_size, "embedding_size": 128, "hidden_size": 192,
                "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768,
                "max_position_embeddings": 128,
                "initializer_range": 0.06,  # about 1 / sqrt(hidden_size)
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            },
            "data": {"directory": str(self.output / "shards"), "num_workers": 0, "remask": True},
            "train": {
                "output_dir": str(self.output / "pretrain"), "num_steps": self.steps, "global_batch_size": 48,
                "micro_batch_size": 24, "precision": "fp32",
            },
            "optimizer": {"name": "adamw", "learning_rate": 0.001, "beta2": 0.98},
            "schedule": {"name": "wsd", "warmup_steps": 100, "decay_steps": min(400, self.steps // 4)},
            "eval": {"interval_steps": 500, "num_examples": 256, "micro_batch_size": 64},
            "checkpoint": {"interval_steps": 250, "keep_last": 1, "keep_every": self.keep_every},
            "deepspeed": {"config": "zero0"},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    def finetune(self, task: str, step: int, model: Path, options: Sequence[str]) -> tuple[float, float]:
        """Mean and deviation over the seeds of the task's metric on the test rows."""
        output = self.output / f"finetune-{task}" / f"step-{step}"
        run(
            "albert.finetune", "--task", task, "--data-dir", str(self.output / task), "--model", str(model),
            "--output", str(output), "--do-train", "--do-eval", "--do-test", "--seeds", str(self.seeds),
            "--no-tensorboard", "--max-seq-length", str(self.max_seq_length), *options,
        )  # fmt: skip
        (row,) = json.loads((output / "sweep.json").read_bytes())["by_learning_rate"]
        return row["test"]["mean"], row["test"]["deviation"]

    def compare(
        self,
        task: str,
        metric: str,
        models: Mapping[int, Path],
        options: Sequence[str],
        baselines: Mapping[str, float],
    ) -> tuple[float, dict[str, Any]]:
        """Fine-tune all checkpoints on a task and draw OUTPUT/TASK-curve.svg.

        Returns:
            The mean of the last checkpoint, and what a figure says of the others.
        """
        curve = {step: self.finetune(task, step, model, options) for step, model in models.items()}
        _draw(curve, baselines, f"test {metric}", self.output / f"{task}-curve.svg")
        conditions = {
            "curve": {step: [round(value, 4) for value in values] for step, values in curve.items()},
            "seeds": self.seeds,
            "baselines": {name: round(value, 4) for name, value in baselines.items()},
        }
        return curve[max(curve)][0], conditions


def add_study_options(parser: argparse.ArgumentParser, output: str, steps: int) -> None:
    """Options that both languages have, with their defaults."""
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="running text")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--steps", type=int, default=steps, help="pretraining steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)


def write_documents(pairs: Sequence[tuple[str, str]], target: Path) -> None:
    """Every pair as a document of two sentences."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n".join("\n".join(pair) for pair in pairs) + "\n", encoding="utf-8")


def _draw(
    curve: Mapping[int, tuple[float, float]], baselines: Mapping[str, float], metric: str, path: Path
) -> None:
    """The metric against pretraining steps, as SVG."""
    with svg_axes(path, "pretraining steps", metric) as axes:
        steps = sorted(curve)
        means, deviations = zip(*(curve[step] for step in steps), strict=True)
        axes.errorbar(steps, means, yerr=deviations, marker="o", capsize=3, label="fine-tuned")
        for (name, value), style in zip(baselines.items(), (":", "--"), strict=False):
            axes.axhline(value, linestyle=style, color="grey", label=name)


def run(*arguments: str) -> None:
    """One of the project's commands; its failure ends the study."""
    code = subprocess.run([sys.executable, "-m", *arguments], check=False).returncode
    if code:
        sys.exit(code)
