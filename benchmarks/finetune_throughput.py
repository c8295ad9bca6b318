"""Fine-tuning against Hugging Face's Trainer: the same model, examples, batch size and optimizer, fp32, CPU.

    python -m benchmarks.finetune_throughput [--preset tiny_zh] [--batch-size 64] [--steps 8] [--rounds 5]

needs accelerate, as the Trainer does: `pip install -c constraints.txt -e '.[bench]'`.

The examples have LCQMC's lengths (two questions of 12.5 characters on average, 27 tokens together) and random
tokens. Trainer is given its best case: every batch is padded to its own longest example only (`run_glue.py` pads all
to 128 unless told otherwise), no logging, no saving. Each runs its whole loop in a process of its own with one
thread, in turn; the figure is the ratio of CPU times of a round, and beside it that of a Trainer that pads to 128.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from albert.convert.huggingface import hugging_face_name
from albert.convert.huggingface_export import hugging_face_config
from albert.distributed import init_world
from albert.finetune.examples import TextExample
from albert.finetune.loop import FineTuner
from albert.finetune.reading import Split
from albert.finetune.resume import Identity, TuningCheckpoints
from albert.finetune.settings import FinetuneSettings, settings_for
from albert.finetune.task_data import TaskData, make_task_data
from albert.finetune.task_model import build_model
from albert.finetune.tasks import find_task
from albert.finetune.training import build_engine
from albert.model_config import MODEL_PRESETS, ModelConfig
from albert.stopping import StopRequest
from albert.tokenization import load_tokenizer
from albert.watchdog import Watchdog
from benchmarks.figure import print_figure

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NUM_CHARACTERS = 5000
_NUM_EXAMPLES = 4096
_LONGEST = 128


def make_data(directory: Path) -> TaskData:
    """Pairs of questions of random characters, with LCQMC's lengths."""
    characters = [chr(0x4E00 + number) for number in range(_NUM_CHARACTERS)]
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join((*_SPECIAL, *characters)) + "\n", encoding="utf-8")
    rng = np.random.default_rng(0)

    def question() -> str:
        length = int(np.clip(rng.lognormal(2.486, 0.279), 3, 36))
        return "".join(characters[place] for place in rng.integers(0, _NUM_CHARACTERS, length))

    examples = [TextExample(str(n), question(), question(), str(n % 2)) for n in range(_NUM_EXAMPLES)]
    split = Split("train", Path("-"), tuple(examples))
    return make_task_data(find_task("lcqmc"), split, ("0", "1"), load_tokenizer(vocabulary), _LONGEST)


def own_rounds(
    config: ModelConfig, data: TaskData, settings: FinetuneSettings, directory: Path
) -> Callable[[], float]:
    """A function that trains and returns CPU seconds."""
    world = init_world("cpu", timeout_s=600)
    engine = build_engine(build_model(find_task("lcqmc"), ("0", "1"), config, seed=0), settings, world)
    checkpoints = TuningCheckpoints(directory, Identity({}, "", ""), {}, engine, world)

    def train() -> float:
        tuner = FineTuner(
            settings, engine, train=data, dev=None, monitor=None, stop=StopRequest(), checkpoints=checkpoints,
            watchdog=Watchdog(world, 0.0, 600.0),
        )  # fmt: skip
        began_at = time.process_time()
        tuner.fit(lambda: None)
        return time.process_time() - began_at

    return train


def their_rounds(
    config: ModelConfig,
    data: TaskData,
    settings: FinetuneSettings,
    directory: Path,
    padded_length: int | None,
) -> Callable[[], float]:
    """The same with Hugging Face's Trainer."""
    start = build_model(find_task("lcqmc"), ("0", "1"), config, seed=0).state_dict()
    fields = hugging_face_config(config, "AlbertForSequenceClassification")
    model = transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**{**fields, "num_labels": 2})
    )
    missing, unexpected = model.load_state_dict(
        {hugging_face_name(name, 1): tensor for name, tensor in start.items()}, strict=False
    )
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    arguments = transformers.TrainingArguments(
        str(directory), per_device_train_batch_size=settings.batch_size, max_steps=settings.max_steps or 1,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, max_grad_norm=1.0, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = padded_length or max(len(example["input_ids"]) for example in examples)
        batch = {
            name: torch.stack([_padded(example[name], length) for example in examples])
            for name in ("input_ids", "token_type_ids", "attention_mask")
        }
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def train() -> float:
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        began_at = time.process_time()
        trainer.train()
        return time.process_time() - began_at

    rows = _rows(data)
    return train


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))


def _rows(data: TaskData) -> list[dict[str, Any]]:
    """The examples one by one, as a Hugging Face data set has them."""
    rows = []
    for number in range(len(data.lengths)):
        batch = data.batch(np.array([number]))
        rows.append(
            {
                "input_ids": batch.sequences.input_ids,
                "token_type_ids": batch.sequences.token_type_ids,
                "attention_mask": torch.ones_like(batch.sequences.input_ids),
                "labels": int(batch.labels[0]),
            }
        )
    return rows


def _start(make: Callable[..., Callable[[], float]], *arguments: Any) -> Connection:
    """A process that makes the function once and calls it whenever it is asked to."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        train = make(*arguments)
        while theirs.recv():
            theirs.send(train())

    context.Process(target=work, daemon=True).start()
    return ours


def _ask(pipe: Connection) -> float:
    pipe.send(True)
    return float(pipe.recv())


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(MODEL_PRESETS), default="tiny_zh")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not transformers.utils.is_accelerate_available():
        sys.exit(
            "finetune_throughput: Hugging Face's Trainer needs accelerate, which is not installed; "
            "pip install -c constraints.txt -e '.[bench]'"
        )
    torch.set_num_threads(1)
    config = MODEL_PRESETS[options.preset].model_copy(update={"vocab_size": len(_SPECIAL) + _NUM_CHARACTERS})
    overrides = {"batch_size": options.batch_size, "max_steps": options.steps, "checkpoint_interval_steps": 0}
    settings = settings_for(find_task("lcqmc"), overrides)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = make_data(directory)
        workers = {
            "own": _start(own_rounds, config, data, settings, directory),
            "longest": _start(their_rounds, config, data, settings, directory, None),
            "128": _start(their_rounds, config, data, settings, directory, _LONGEST),
        }
        seconds = [{kind: _ask(pipe) for kind, pipe in workers.items()} for _ in range(options.rounds + 1)][
            1:
        ]
        for pipe in workers.values():
            pipe.send(False)
    print_figure(
        "finetune_over_hugging_face_trainer",
        [round_["longest"] / round_["own"] for round_ in seconds],
        "x examples per CPU second",
        over_padding_to_128=round(float(np.median([round_["128"] / round_["own"] for round_ in seconds])), 2),
        preset=options.preset, batch_size=options.batch_size, steps=options.steps,
        mean_tokens=round(float(data.lengths.mean()), 1), transformers=transformers.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
