"""What the demo achieved, as text, Markdown and a picture. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert.durable_files import write_file_durably

_COLOURS = {"train": "#9ecae1", "eval": "#08519c", "order": "#d94801", "resume": "#636363"}


@dataclass(frozen=True)
class Curves:
    """Metrics of the pretraining, read from its metrics.jsonl."""

    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    resumed_at: list[int]
    """Steps from which a stopped run went on."""

    @property
    def first(self) -> dict[str, Any]:
        """Held-out evaluation of the untrained model."""
        return self.eval[0]

    @property
    def last(self) -> dict[str, Any]:
        """Held-out evaluation of the trained model."""
        return self.eval[-1]


def read_curves(run_directory: Path) -> Curves:
    """Read what a pretraining run logged."""
    text = (run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return Curves(
        train=[line for line in lines if line["kind"] == "train"],
        eval=[line for line in lines if line["kind"] == "eval"],
        resumed_at=[
            int(line["step"]) for line in lines if line["kind"] == "event" and "resumed" in line["message"]
        ],
    )


def write_report(output: Path, seconds: Mapping[str, float], wall_s: float) -> str:
    """Write OUTPUT/report.md and OUTPUT/report.png; returns the text for the terminal.

    Args:
        output: directory of the demo.
        seconds: of every stage.
        wall_s: of this run of the demo, which may have gone on from an earlier one.
    """
    curves = read_curves(output / "pretrain")
    results = json.loads((output / "finetune/results.json").read_bytes())
    draw_curves(curves, output / "report.png")
    rows = _result_rows(curves, results)
    places = _places(output)
    write_file_durably(output / "report.md", [_markdown(rows, places, seconds, output).encode()])
    width = max(len(row[0]) for row in rows)
    lines = ["", "what was learned".ljust(width + 4) + f"{'before':>10}{'after':>10}"]
    lines += [f"  {name.ljust(width)}  {before:>10}{after:>10}" for name, before, after in rows]
    path_width = max(len(path) for path, _ in places)
    lines += ["", "where everything lies", *(f"  {path.ljust(path_width)}  {what}" for path, what in places)]
    lines += ["", "what to try next", *(f"  {command}" for command in _next_commands(output))]
    total = sum(seconds.values())
    lines += ["", f"{len(seconds)} stages took {total:.0f} s ({wall_s:.0f} s in this run)"]
    return "\n".join(lines)


def _result_rows(curves: Curves, results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) as text."""
    first, last = curves.first, curves.last
    test = results["splits"]["test"]
    return [
        ("held-out MLM loss (nats)", f"{first['mlm_loss']:.3f}", f"{last['mlm_loss']:.3f}"),
        ("held-out MLM accuracy", f"{first['mlm_accuracy']:.3f}", f"{last['mlm_accuracy']:.3f}"),
        ("held-out SOP accuracy", f"{first['sop_accuracy']:.3f}", f"{last['sop_accuracy']:.3f}"),
        (
            "sentence pairs, test accuracy (before: majority class)",
            f"{test['majority_accuracy']:.3f}",
            f"{test['accuracy']:.3f}",
        ),
    ]


def _places(output: Path) -> list[tuple[str, str]]:
    return [
        (f"{output}/report.md, report.png", "this report and the loss curves"),
        (f"{output}/shards", "the dataset: python -m data_prep audit, show, verify"),
        (f"{output}/pretrain", "checkpoints, metrics.jsonl, the pretrained model in model/"),
        (f"{output}/finetune", "results.json, predictions, the fine-tuned model in model/"),
        (f"{output}/huggingface", "the pretrained model for transformers"),
        (f"{output}/logs", "everything that the stages printed"),
    ]


def _next_commands(output: Path) -> list[str]:
    return [
        f"tensorboard --logdir {output}",
        f"python -m data_prep show {output}/shards",
        "python -m launcher demo --corpus YOUR_TEXT.txt --output runs/mine",
        "python -m albert.pretrain --config base --show",
        "python -m albert.finetune --list-tasks",
    ]


def _markdown(
    rows: list[tuple[str, str, str]],
    places: list[tuple[str, str]],
    seconds: Mapping[str, float],
    output: Path,
) -> str:
    lines = [
        "# The demo's report",
        "",
        "![loss curves](report.png)",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {before} | {after} |" for name, before, after in rows]
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {name} | {duration:.1f} |" for name, duration in seconds.items()]
    lines += [f"| together | {sum(seconds.values()):.1f} |"]
    lines += ["", "| where | what |", "|---|---|", *(f"| `{path}` | {what} |" for path, what in places)]
    lines += ["", "What to try next:", "", "```", *_next_commands(output), "```", ""]
    return "\n".join(lines)


def draw_curves(curves: Curves, path: Path) -> None:
    """Draw the MLM loss and the SOP accuracy over the steps, with the resume marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    left.plot(*_series(curves.train, "mlm_loss"), color=_COLOURS["train"], label="training")
    left.plot(*_series(curves.eval, "mlm_loss"), "o-", color=_COLOURS["eval"], label="held out")
    left.set(xlabel="step", ylabel="MLM loss (nats)", title="Masked language modelling")
    right.plot(*_series(curves.train, "sop_accuracy"), color=_COLOURS["train"], label="training")
    right.plot(*_series(curves.eval, "sop_accuracy"), "o-", color=_COLOURS["order"], label="held out")
    right.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    right.set(xlabel="step", ylabel="accuracy", title="Sentence order")
    for axes in (left, right):
        for step in curves.resumed_at:
            axes.axvline(
                step, color=_COLOURS["resume"], linestyle="--", linewidth=1, label="stopped, resumed"
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    # A temporary name, so that an interruption leaves no half picture; the suffix names the format.
    temporary = path.with_name(f"tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric where it was logged."""
    chosen = [(int(line["step"]), float(line[name])) for line in lines if name in line]
    return [step for step, _ in chosen], [value for _, value in chosen]
