"""One training step (forward, backward) of this model against Hugging Face, one thread, CPU, fp32.

    python -m benchmarks.training_step [--cases base-2x512 ...] [--rounds 5]

Both have the same weights, batch and loss, dropout 0. Rounds alternate in rotated order; the figure is the median
over rounds of the ratio within a round. Every case has a process of its own and prints one JSON line: the losses, the
ratio with its spread, and the utilisation of each: useful FLOPs (albert/flops.py: real tokens, head at predicted
positions) over the rate of torch.mm in this process in the same round. More than 1 is possible in fp32 on a CPU: this
model's products are oneDNN's there (albert/linear.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from torch import Tensor

from albert.batches import PretrainBatch, pack
from albert.convert.huggingface import hugging_face_name
from albert.convert.huggingface_export import hugging_face_config
from albert.flops import step_flops
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS, ModelConfig
from benchmarks.figure import print_figure


@dataclass(frozen=True)
class Case:
    """A model and the lengths of its sequences."""

    config: ModelConfig
    lengths: tuple[int, ...]
    padded_length: int

    @property
    def padding(self) -> float:
        """Share of the padded batch that is padding."""
        return 1 - sum(self.lengths) / (len(self.lengths) * self.padded_length)


_SMALL = MODEL_PRESETS["small_zh"].model_copy(update={"vocab_size": 30000})
CASES = {
    "base-2x512": Case(MODEL_PRESETS["base"], (512,) * 2, 512),
    "small-8x128": Case(_SMALL, (128,) * 8, 128),
    "base-4x512-56%-padding": Case(MODEL_PRESETS["base"], (512, 197, 121, 71), 512),
    "small-8x512-55%-padding": Case(_SMALL, (512, 430, 298, 211, 163, 109, 77, 43), 512),
}


def make_batch(case: Case) -> PretrainBatch:
    """Random tokens, 15 % of them predicted."""
    generator = torch.Generator().manual_seed(0)
    total = sum(case.lengths)
    ids = torch.randint(5, case.config.vocab_size, (total,), generator=generator)
    types = torch.cat([(torch.arange(n) >= n // 2).long() for n in case.lengths])
    starts = np.cumsum((0, *case.lengths))
    rng = np.random.default_rng(0)
    chosen = [
        start + np.sort(rng.choice(length, max(1, round(0.15 * length)), replace=False))
        for start, length in zip(starts, case.lengths, strict=False)
    ]
    indices = torch.from_numpy(np.concatenate(chosen))
    labels = torch.randint(5, case.config.vocab_size, (len(indices),), generator=generator)
    orders = torch.arange(len(case.lengths)) % 2
    return PretrainBatch(pack(ids, types, case.lengths), indices, labels, orders)


def hugging_face_step(
    case: Case, model: AlbertForPreTraining, batch: PretrainBatch, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """The same step in Hugging Face's AlbertForPreTraining with sdpa, on padded rows; on the model's device."""
    fields = hugging_face_config(case.config, "AlbertForPreTraining")
    config = transformers.AlbertConfig(**{**fields, "classifier_dropout_prob": 0.0}, num_labels=2)
    config._attn_implementation = "sdpa"
    twin = transformers.AlbertForPreTraining(config)
    state = {hugging_face_name(n, 1): x for n, x in model.state_dict().items()}
    twin.load_state_dict(state, strict=False)
    weight = next(model.parameters())
    twin.to(weight.device, weight.dtype).train()
    if compiled:
        twin.compile()

    def pad(values: Tensor, fill: int = 0) -> Tensor:
        rows = torch.full((len(case.lengths), case.padded_length), fill, device=weight.device)
        for row, part in zip(rows, values.split(case.lengths), strict=True):
            row[: len(part)] = part
        return rows

    sequences = batch.sequences
    labels = torch.full_like(sequences.input_ids, -100)
    labels[batch.masked_lm_indices] = batch.masked_lm_labels
    inputs = {
        "input_ids": pad(sequences.input_ids),
        "token_type_ids": pad(sequences.token_type_ids),
        "attention_mask": pad(torch.ones_like(labels)),
        "labels": pad(labels, -100),
        "sentence_order_label": batch.sentence_order_labels,
    }

    def step() -> Tensor:
        twin.zero_grad(set_to_none=True)
        loss: Tensor = twin(**inputs).loss
        loss.backward()
        return loss.detach()

    return step


def own_step(model: AlbertForPreTraining, batch: PretrainBatch) -> Callable[[], Tensor]:
    """The step of this project."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        output = model(batch)
        loss = output.mlm_loss_sum / len(batch.masked_lm_labels)
        loss = loss + output.sop_loss_sum / len(batch.sentence_order_labels)
        loss.backward()
        return loss.detach()

    return step


def matmul_step(size: int, device: torch.device | str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Eight square products; returns their FLOPs."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))

    def step() -> Tensor:
        for _ in range(8):
            torch.mm(a, b)
        return torch.tensor(8.0 * 2 * size**3)

    return step


def case_flops(case: Case, batch: PretrainBatch) -> float:
    """Useful FLOPs of a step."""
    return step_flops(
        case.config,
        tokens=sum(case.lengths),
        sum_squared_lengths=sum(n * n for n in case.lengths),
        sequences=len(case.lengths),
        preds=len(batch.masked_lm_labels),
    )


def timed(step: Callable[[], Tensor]) -> float:
    """CPU seconds of one thread."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(name: str, case: Case, rounds: int) -> None:
    """Run a case and print its figure; see the module text."""
    config = case.config.model_copy(update={"classifier_dropout_prob": 0.0})
    model = AlbertForPreTraining(config).train()
    batch = make_batch(case)
    steps = {
        "ours": own_step(model, batch),
        "hugging_face": hugging_face_step(case, model, batch),
        "matmul": matmul_step(1024, "cpu", torch.float32),
    }
    losses = {key: step().item() for key, step in steps.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(rounds):
        for key in order:
            seconds[key].append(timed(steps[key]))
        order = order[1:] + order[:1]
    flops = case_flops(case, batch)
    rate = [losses["matmul"] / s for s in seconds["matmul"]]
    ratios = [h / o for h, o in zip(seconds["hugging_face"], seconds["ours"], strict=True)]

    def utilisation(key: str) -> float:
        return statistics.median(flops / s / r for s, r in zip(seconds[key], rate, strict=True))

    print_figure(
        "training_step_over_hugging_face", ratios, "ratio", case=name, padding=round(case.padding, 3),
        loss_ours=losses["ours"], loss_hugging_face=losses["hugging_face"],
        loss_relative_difference=abs(losses["ours"] / losses["hugging_face"] - 1),
        utilisation_ours=round(utilisation("ours"), 3),
        utilisation_hugging_face=round(utilisation("hugging_face"), 3),
        cpu_seconds_ours=round(statistics.median(seconds["ours"]), 4),
        matmul_gflops=round(statistics.median(rate) / 1e9, 1), transformers=transformers.__version__,
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if len(options.cases) > 1:  # the memory that one case leaves behind makes the next one slower or faster
        for name in options.cases:
            command = [sys.executable, "-m", "benchmarks.training_step", "--cases", name]
            subprocess.run([*command, "--rounds", str(options.rounds)], check=True)
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    (name,) = options.cases
    measure(name, CASES[name], options.rounds)


if __name__ == "__main__":
    main()
