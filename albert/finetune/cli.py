"""Command line of fine-tuning: `python -m albert.finetune --task NAME --data-dir DIR --model DIR --output DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from albert.command_line import CommandParser
from albert.errors import AlbertError, ConfigError, end_rank, run_command
from albert.finetune.custom import read_task
from albert.finetune.request import Request
from albert.finetune.settings import FinetuneSettings, settings_for
from albert.finetune.task_definition import METRICS_OF_KIND, Task
from albert.finetune.tasks import TASKS, find_task
from albert.run_lock import lock_for_all_ranks
from albert.stopping import StopRequest

_EXAMPLES = """examples:
  python -m albert.finetune --list-tasks
  python -m albert.finetune --task lcqmc --data-dir data/lcqmc --model runs/base_zh/model --output runs/lcqmc \\
      --do-train --do-eval --do-test
  python -m albert.finetune --task sst-2 --data-dir data/SST-2 --model albert-base-v2 --output runs/sst2 \\
      --do-train --do-eval --do-predict --epochs 3 --batch-size 32 --learning-rate 2e-5 --max-seq-length 128
  python -m albert.finetune --task lcqmc --data-dir data/lcqmc --model runs/lcqmc/model --output runs/again --do-test
  python -m albert.finetune predict --model runs/lcqmc/model < pairs.jsonl > answers.jsonl
  python -m launcher local -n 2 finetune --task mnli ...       (several ranks on one machine)
  python -m albert.finetune --task rte ... --do-train --do-eval --seeds 5 --learning-rates 1e-5 2e-5 3e-5
  python -m albert.finetune --task custom --task-file mine.yaml --data-dir data/mine ...

data: DIR holds train, dev and test as .tsv, .txt, .csv, .json or .jsonl (or under the benchmark's own names);
      LCQMC form is one pair per line: text <TAB> text <TAB> label. Only a test file may be without labels.
output: model/ (the best weights by --metric on dev; --model reads it again), results.json, predictions-SPLIT.jsonl,
      review-SPLIT.md (confusion table and worst mistakes), metrics.jsonl, tensorboard/, config.yaml, and with
      --do-predict the benchmark's submission file. --seeds and --learning-rates add sweep.json and sweep.md.
A training that was stopped or killed goes on where it was when the same command is given again.
exit codes: 0 done, 65 bad data, 66 missing input, 70 non-finite, 74 disk, 75 stopped by a signal with the checkpoint
committed (start it again), 76 another rank died or hangs (start it again), 77 refused as unsafe, 78 configuration"""

_SETTINGS: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "peak learning rate"),
    "batch_size": (int, "examples per optimizer step over all ranks"),
    "micro_batch_size": (int, "examples per forward pass of one rank (default: the rank's share)"),
    "eval_batch_size": (int, "examples per forward pass of evaluation"),
    "epochs": (float, "passes over the training data"),
    "max_steps": (int, "optimizer steps, instead of --epochs"),
    "warmup_steps": (int, "steps of rising learning rate (default: a tenth)"),
    "max_seq_length": (int, "longest sequence in tokens; longer ones are cut"),
    "layer_decay": (float, "factor of the rate for each layer below the head, e.g. 0.9 (default: 1)"),
    "weight_decay": (float, "AdamW's, not on biases and LayerNorms"),
    "max_grad_norm": (float, "clip the gradient norm; 0 for no clipping"),
    "dropout": (float, "dropout of hidden states and attention (default: the model's)"),
    "classifier_dropout": (float, "dropout before the head (default: the model's, 0.1)"),
    "eval_interval_steps": (int, "steps between evaluations on dev (default: once per epoch)"),
    "checkpoint_interval_steps": (
        int,
        "steps between checkpoints to go on from (default: at every evaluation; 0: only when stopped)",
    ),
    "early_stopping": (int, "stop after so many evaluations without a better one"),
    "seed": (int, "initial head, order and dropout"),
    "log_interval_steps": (int, "steps between lines of metrics"),
    "hang_timeout_s": (
        float,
        "end with 76 when a rank is silent or stuck in a step for so long (10; 0: never)",
    ),
    "peer_timeout_s": (float, "the same for evaluation, saving and the first steps (600)"),
}
_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "schedule": (("linear", "cosine", "constant"), "learning rate after the warm-up"),
    "precision": (("auto", "bf16", "fp16", "fp32"), "auto: bf16 on CUDA (fp16 before Ampere), fp32 on CPU"),
    "device": (("auto", "cpu", "cuda"), "auto takes CUDA where there is one"),
    "progress": (("auto", "on", "off"), "progress bar; auto: on a terminal"),
}


def main() -> None:
    """Console entry point."""
    end_rank(run_command(_main))


def _main() -> None:
    if sys.argv[1:2] == ["predict"]:
        from albert.finetune.predict import run_predict

        run_predict(sys.argv[2:])
        return
    stop = StopRequest()
    arguments = _parse(sys.argv[1:])
    if arguments.list_tasks:
        print(task_table())
        return
    request = _request(arguments)
    task = _find_task(request)
    settings = settings_for(task, request.overrides)
    _check_output(Path(request.output))
    _run(request, task, settings, stop)


def _run(request: Request, task: Task, settings: FinetuneSettings, stop: StopRequest) -> None:
    """Import torch only once the command line is known to make sense, and DeepSpeed once the device is chosen."""
    from albert.distributed import barrier, close_world, init_world, peer_errors
    from albert.finetune.preparation import prepare
    from albert.watchdog import SLOW_PHASES, Watchdog

    stop.install()
    prepared = prepare(request, task, settings)
    with peer_errors():
        world = init_world(settings.device, settings.peer_timeout_s)
        from albert.finetune.run import run_once
        from albert.finetune.sweep import run_sweep

        # Ranks wait for the one that evaluates most slowly.
        slow = (*SLOW_PHASES, "evaluate")
        try:
            lock = lock_for_all_ranks(Path(request.output), "--output", world)
            with Watchdog(
                world, settings.hang_timeout_s, settings.peer_timeout_s, slow, "--hang-timeout-s"
            ) as watchdog:
                if request.is_sweep:
                    run_sweep(prepared, request, settings, world, stop, watchdog)
                else:
                    run_once(prepared, request, settings, Path(request.output), world, stop, watchdog)
                barrier()  # a rank that has left is as silent as a lost one
        except AlbertError:
            close_world()  # all ranks are here
            raise
        close_world()
    if lock:
        lock.close()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m albert.finetune",
        description="Fine-tune an ALBERT on a task, keep the best weights, evaluate and predict.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list-tasks", action="store_true", help="print the table of tasks and stop")
    parser.add_argument("--task", help="a task of --list-tasks, or custom with --task-file")
    parser.add_argument("--task-file", help="YAML file of a task of your own (--task custom)")
    parser.add_argument("--data-dir", help="directory of the data files")
    parser.add_argument(
        "--model", help="pretrained or fine-tuned model, Hugging Face directory, checkpoint, or run"
    )
    parser.add_argument("--output", help="directory of this run")
    parser.add_argument("--tokenizer", help="spiece.model or vocab.txt (default: the model's)")
    for name, text in _ACTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    group = parser.add_argument_group("settings (default: the task's published recipe, see --list-tasks)")
    for name, (kind, text) in _SETTINGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    for name, (choices, text) in _CHOICES.items():
        group.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=text)
    group.add_argument("--metric", help="metric that chooses the best weights")
    group.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="train N times with seeds --seed, +1, ..."
    )
    group.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[],
        metavar="RATE",
        help="a grid: train with each rate",
    )
    group.add_argument(
        "--deepspeed", help="placement of ds_configs (zero0 zero1 zero2 zero3 ...) or a JSON file"
    )
    group.add_argument("--reinit-pooler", action="store_true", default=None, help="start with a new pooler")
    group.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", default=None)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args(argv)


_ACTIONS = {
    "do_train": "train on train, keep the best weights by dev",
    "do_eval": "metrics and predictions on dev",
    "do_test": "metrics and predictions on test, which must have labels",
    "do_predict": "predictions on test, and the submission file of GLUE, CLUE or SQuAD",
    "skip_bad_rows": "leave bad rows out, with a count, instead of refusing the file",
}


def _request(arguments: argparse.Namespace) -> Request:
    """Check that the command line says what to do.

    Raises:
        ConfigError: names every option that is missing.
    """
    missing = [
        f"--{name.replace('_', '-')}"
        for name in ("task", "data_dir", "model", "output")
        if not getattr(arguments, name)
    ]
    actions = ("do_train", "do_eval", "do_test", "do_predict")
    if not any(getattr(arguments, name) for name in actions):
        missing.append("one of " + ", ".join(f"--{name.replace('_', '-')}" for name in actions))
    if missing:
        raise ConfigError(f"missing: {'; '.join(missing)}; see --help for examples")
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds ({arguments.seeds}) must be at least 1")
    if (arguments.seeds > 1 or arguments.learning_rates) and not (arguments.do_train and arguments.do_eval):
        raise ConfigError("--seeds and --learning-rates compare trainings on dev; add --do-train --do-eval")
    names = (*_SETTINGS, *_CHOICES, "metric", "deepspeed", "reinit_pooler", "tensorboard")
    overrides = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return Request(
        task=arguments.task,
        data_dir=arguments.data_dir,
        model=arguments.model,
        output=arguments.output,
        tokenizer=arguments.tokenizer,
        task_file=arguments.task_file,
        num_seeds=arguments.seeds,
        learning_rates=tuple(arguments.learning_rates),
        overrides=overrides,
        **{name: getattr(arguments, name) for name in _ACTIONS},
    )


def _find_task(request: Request) -> Task:
    if (request.task == "custom") != (request.task_file is not None):
        raise ConfigError("--task custom and --task-file FILE.yaml belong together; give both or neither")
    return find_task(request.task) if request.task_file is None else read_task(Path(request.task_file))


def _check_output(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output {path}: is a file; name a directory")


def task_table() -> str:
    """The table of tasks as text."""
    rows = [("task", "kind", "metric", "batch", "rate", "length", "train", "what it is")]
    for task in TASKS.values():
        recipe = task.recipe
        train = f"{recipe.epochs:g} epochs" if recipe.epochs else f"{recipe.steps} steps"
        numbers = (str(recipe.batch_size), f"{recipe.learning_rate:g}", str(recipe.max_seq_length))
        rows.append((task.name, task.kind, task.metric, *numbers, train, task.summary))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    kinds = ", ".join(f"{kind}: {' '.join(names)}" for kind, names in METRICS_OF_KIND.items())
    return "\n".join([*lines, "", f"metrics by kind: {kinds}"])
