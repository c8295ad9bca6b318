"""The whole mission on this machine in a few minutes: `python -m launcher demo`. Imports no torch.

Gathers text, trains a tokenizer, builds shards, pretrains a small ALBERT on two ranks under ZeRO-2, stops it
half-way and resumes it, fine-tunes it on a sentence-pair task, exports it, and reports. Every stage is a command
that a user can give as well; its output goes to OUTPUT/logs. A demo that was interrupted goes on with the stage it
was in; one that was finished starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from albert.config import load_run_config
from albert.durable_files import write_file_durably
from albert.errors import AlbertError, MissingInputError, PreemptedError, UnsafeError
from albert.manifest import read_manifest
from launcher.demo_report import write_report
from launcher.local import count_gpus
from launcher.process import child_setup

STATE_NAME = "demo.json"
_DIRECTORIES = ("text", "tokenizer", "shards", "pretrain", "finetune", "huggingface", "logs")
_FILES = ("report.md", "report.png", STATE_NAME)
_SHOWN_ON_FAILURE = 12
_FINETUNE_STEPS = 300
_SEQUENCE_LENGTH = "64"
"""Tokens of a pretraining example: half of what the model takes, so that two minutes see more pairs."""
_STOPPED = PreemptedError.exit_code


@dataclass(frozen=True)
class DemoPlan:
    """What the demo runs."""

    output: Path
    corpus: str | None = None
    """A text file of the user's own; None for the documentation of the standard library."""
    num_ranks: int = 2
    pretrain_steps: int = 0
    finetune_steps: int = 0
    """0: one number of steps that suits the demo."""

    def key(self) -> dict[str, object]:
        """What has to be equal for an interrupted demo to go on."""
        return {
            "corpus": self.corpus,
            "num_ranks": self.num_ranks,
            "pretrain_steps": self.pretrain_steps,
            "finetune_steps": self.finetune_steps,
        }


@dataclass(frozen=True)
class Stage:
    """One command of the demo."""

    name: str
    headline: str
    arguments: tuple[str, ...]
    """After `python -m`."""
    fresh: tuple[str, ...] = ()
    """Directories that an interrupted attempt may have left and that the command would refuse."""
    expected: int = 0
    """Exit code of success."""
    is_sized_by_dataset: bool = False
    """Whether the model takes the vocabulary of the dataset, which small text makes smaller than the recipe's."""


class StageError(AlbertError):
    """A stage failed; carries the exit code of its command."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def add_demo_command(places: argparse._SubParsersAction) -> None:
    """Register `demo` with the launcher's command line."""
    parser = places.add_parser(
        "demo",
        help="everything once on a small scale: text, tokenizer, shards, pretraining, fine-tuning, export, report",
        epilog="examples:\n  python -m launcher demo\n  python -m launcher demo --corpus my.txt --output runs/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="where everything goes (runs/demo)"
    )
    parser.add_argument(
        "--corpus", metavar="FILE", help="your own text (documents between blank lines) or JSONL"
    )
    parser.add_argument("-n", dest="num_ranks", type=int, default=2, help="ranks (2)")
    parser.add_argument("--steps", type=int, default=0, help="pretraining steps (the recipe's)")
    parser.add_argument("--finetune-steps", type=int, default=0, help="fine-tuning steps (300)")
    parser.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    plan = DemoPlan(
        Path(options.output), options.corpus, options.num_ranks, options.steps, options.finetune_steps
    )
    run_demo(plan)
    return 0


def run_demo(plan: DemoPlan) -> None:
    """Run all stages that are not done yet, then report.

    Raises:
        MissingInputError: the corpus is not there.
        UnsafeError: the output directory holds something else.
        PreemptedError: interrupted; the same command goes on.
        StageError: a stage failed; its log is named.
    """
    if plan.corpus is not None and not Path(plan.corpus).is_file():
        raise MissingInputError(f"--corpus {plan.corpus}: no such file")
    done = _prepare_output(plan)
    began_at = time.monotonic()
    stages = demo_stages(plan)
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.headline}"
        if stage.name in done:
            _say(f"{title}: done before in {done[stage.name]:.0f} s")
            continue
        done[stage.name] = _run_stage(plan, stage, title)
        _write_state(plan, done, is_finished=False)
    _say(write_report(plan.output, done, time.monotonic() - began_at))
    _write_state(plan, done, is_finished=True)


def demo_stages(plan: DemoPlan) -> list[Stage]:
    """The commands, in their order."""
    out = plan.output
    corpus, pairs, tokenizer, shards = (
        out / "text/corpus.txt",
        out / "text/pairs",
        out / "tokenizer",
        out / "shards",
    )
    recipe = load_run_config("demo")
    steps = plan.pretrain_steps or recipe.train.num_steps
    warmup = min(recipe.schedule.warmup_steps, steps // 4)
    device = "auto" if count_gpus(os.environ) >= plan.num_ranks else "cpu"  # ranks cannot share a GPU
    pretrain = (
        "launcher", "local", "-n", str(plan.num_ranks), "pretrain", "--config", "demo",
        f"data.directory={shards}", f"train.output_dir={out / 'pretrain'}", f"train.device={device}",
        f"train.num_steps={steps}", f"schedule.warmup_steps={warmup}",
        f"eval.interval_steps={max(steps // 8, min(steps, 50))}",
    )  # fmt: skip
    finetune_steps = plan.finetune_steps or _FINETUNE_STEPS
    finetune = (
        "launcher", "local", "-n", str(plan.num_ranks), "finetune", "--task", "demo",
        "--data-dir", str(pairs), "--model", str(out / "pretrain/model"), "--output", str(out / "finetune"),
        "--do-train", "--do-eval", "--do-test", "--device", device,
        "--max-steps", str(finetune_steps), "--eval-interval-steps", str(max(1, finetune_steps // 3)),
    )  # fmt: skip
    own = ("--input", plan.corpus) if plan.corpus else ()
    question = "which of them was tampered with" if plan.corpus else "which of them comes first"
    what = f"the text of {plan.corpus}" if plan.corpus else "English text that every Python carries"
    return [
        Stage("text", f"gather {what}", ("data_prep", "demo-corpus", "--output", str(out / "text"), *own), ("text",)),
        Stage(
            "tokenizer",
            f"train a SentencePiece model with at most {recipe.model.vocab_size:,} pieces",
            ("data_prep", "tokenizer", "--input", str(corpus), "--output", str(tokenizer),
             "--vocab-size", str(recipe.model.vocab_size), "--fit"),
            ("tokenizer",),
        ),
        Stage(
            "shards",
            "build shards of n-gram-masked sentence pairs",
            ("data_prep", "build", "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(shards),
             "--max-seq-length", _SEQUENCE_LENGTH, "--dupe-factor", "8", "--eval-fraction", "0.06",
             "--workers", str(plan.num_ranks)),
            ("shards",),
        ),
        Stage("pretrain", f"pretrain with ZeRO-2 on {plan.num_ranks} ranks, and stop half-way",
              (*pretrain, f"train.stop_after_steps={steps // 2}"), expected=_STOPPED, is_sized_by_dataset=True),
        Stage("resume", "resume the pretraining and finish it", pretrain, is_sized_by_dataset=True),
        Stage("finetune", f"fine-tune on sentence pairs: {question}", finetune,
              ("finetune",)),
        Stage(
            "export",
            "export to a Hugging Face directory",
            ("albert.convert", "to-hf", str(out / "pretrain/model"), "--output", str(out / "huggingface")),
            ("huggingface",),
        ),
    ]  # fmt: skip


def _prepare_output(plan: DemoPlan) -> dict[str, float]:
    """Seconds of the stages that an interrupted demo has done; an empty directory where it starts anew."""
    output = plan.output
    if output.exists() and not output.is_dir():
        raise UnsafeError(f"--output {output}: is a file; name a directory")
    if output.is_dir() and any(output.iterdir()) and not (output / STATE_NAME).is_file():
        raise UnsafeError(f"--output {output}: holds something that is no demo; name another directory")
    done: dict[str, float] = {}
    state = _read_state(output)
    if state.get("key") == plan.key() and not state.get("is_finished"):
        done = dict(state["done"])  # type: ignore[call-overload]
    else:
        _remove_old_demo(output)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    _write_state(plan, done, is_finished=False)
    return done


def _read_state(output: Path) -> dict[str, object]:
    try:
        return dict(json.loads((output / STATE_NAME).read_bytes()))
    except (OSError, ValueError):
        return {}


def _write_state(plan: DemoPlan, done: dict[str, float], *, is_finished: bool) -> None:
    state = {"key": plan.key(), "done": done, "is_finished": is_finished}
    write_file_durably(plan.output / STATE_NAME, [json.dumps(state, indent=1).encode()])


def _remove_old_demo(output: Path) -> None:
    """Remove what a demo makes, and nothing else."""
    for name in _DIRECTORIES:
        shutil.rmtree(output / name, ignore_errors=True)
    for name in _FILES:
        (output / name).unlink(missing_ok=True)


def _run_stage(plan: DemoPlan, stage: Stage, title: str) -> float:
    """Run one command; returns its seconds."""
    for name in stage.fresh:
        shutil.rmtree(plan.output / name, ignore_errors=True)
    _say(title)
    sizes = [_vocabulary_setting(plan)] if stage.is_sized_by_dataset else []
    command = [sys.executable, "-m", *stage.arguments, *sizes]
    log = plan.output / "logs" / f"{stage.name}.log"
    began_at = time.monotonic()
    last_lines: deque[str] = deque(maxlen=_SHOWN_ON_FAILURE)
    with log.open("w", encoding="utf-8", buffering=1) as file:
        file.write(f"$ {shlex.join(['python', *command[1:]])}\n")
        code = _run_logged(command, file, last_lines)
    seconds = time.monotonic() - began_at
    if code == stage.expected or (stage.expected and code == 0):
        _say(f"      {seconds:.0f} s")
        return seconds
    if code == _STOPPED:
        raise PreemptedError(
            f"the demo was stopped in its stage '{stage.name}'; the same command goes on there"
        )
    sys.stderr.write("".join(last_lines))
    raise StageError(f"the demo's stage '{stage.name}' ended with exit code {code}; see {log}", max(code, 1))


def _vocabulary_setting(plan: DemoPlan) -> str:
    """The setting that gives the model the vocabulary of the dataset."""
    return f"model.vocab_size={read_manifest(plan.output / 'shards').tokenizer.vocab_size}"


def _run_logged(command: Sequence[str], log: IO[str], last_lines: deque[str]) -> int:
    """Run a command with its output in the log; on a terminal its newest line is shown meanwhile."""
    environment = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        preexec_fn=child_setup(),  # noqa: PLW1509 - no threads here
    )
    shows = sys.stdout.isatty()
    try:
        for line in process.stdout or ():
            log.write(line)
            last_lines.append(line)
            if shows:
                _show_line(line)
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sends Ctrl-C to the whole process group: the stage is stopping already.
        process.wait()
        raise PreemptedError("the demo was interrupted; the same command goes on where it was") from None
    finally:
        if shows:
            sys.stdout.write("\r\x1b[K")


def _show_line(line: str) -> None:
    text = line.rsplit("\r", 1)[-1].strip()
    if text:
        width = shutil.get_terminal_size().columns - 8
        sys.stdout.write(f"\r\x1b[K      {text[:width]}")
        sys.stdout.flush()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _python_path() -> str:
    """PYTHONPATH under which the commands find this project, installed or not."""
    own = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH", ""))))
