"""One training step (forward, backward) on a GPU against Hugging Face, eager and compiled, in bf16 on the same card.

    python -m benchmarks.gpu_step [--models base large xlarge xxlarge] [--lengths 128 512] [--rounds 5]

All have the same weights and batch of full sequences, dropout 0, and attention by sdpa. Rounds alternate in rotated
order, --repeats steps between two synchronisations each; the figure is the median over rounds of the ratio to Hugging
Face's eager step within a round. Prints one JSON line per model and length: the ratios, tokens per second, the
utilisation (useful FLOPs of albert/flops.py over the rate of bf16 products of this process in the same round), the
peak memory of the step (the float8 copy lies beside it), and how much the losses differ; the speed of the same step
with float8 products (train.fp8) over that in bf16, and its loss, where the GPU and the sizes of the model allow them.
Left out where there is no GPU; --device cpu tries it out, with emulated float8.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from albert.errors import ConfigError
from albert.fp8 import COMPILE_OPTIONS, fp8_product
from albert.heads import AlbertForPreTraining
from albert.model_config import MODEL_PRESETS
from benchmarks.figure import print_figure
from benchmarks.training_step import Case, case_flops, hugging_face_step, make_batch, matmul_step, own_step

_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def measure(name: str, length: int, options: argparse.Namespace) -> None:
    """Run one model at one length and print its figure."""
    torch.compiler.reset()  # models share their code, and the compiler keeps few versions of it
    device = torch.device(options.device)
    lengths = (length,) * max(1, options.tokens // length)
    config = MODEL_PRESETS[name].model_copy(
        update=dict.fromkeys(
            ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"), 0.0
        )
    )
    case = Case(config, lengths, length)
    batch = make_batch(case).to(device)
    model = AlbertForPreTraining(config).to(device, torch.bfloat16).train()
    steps = {
        "hugging_face": hugging_face_step(case, model, batch),
        "hugging_face_compiled": hugging_face_step(case, model, batch, compiled=True),
        "ours": own_step(model, batch),
        "matmul": matmul_step(_MATMUL_SIZE[device.type], device, torch.bfloat16),
    }
    fp8_model = _fp8_copy(model, device)
    if fp8_model:
        steps["fp8"] = own_step(fp8_model, batch)
    if device.type == "cuda":
        model.compile_layers()
        if fp8_model:
            fp8_model.compile_layers(**COMPILE_OPTIONS)
    values = {key: step().item() for key, step in steps.items()}  # also compiles
    seconds = measure_in_turns(steps, options.rounds, options.repeats, device)
    flops, tokens = case_flops(case, batch), sum(lengths)
    ours, eager = seconds["ours"], seconds["hugging_face"]
    print_figure(
        f"gpu_step_{name}_{length}", [e / o for e, o in zip(eager, ours, strict=True)], "ratio",
        over_compiled=_median_ratio(seconds["hugging_face_compiled"], ours),
        tokens_per_s=round(tokens / statistics.median(ours)),
        utilisation=round(_median_ratio(seconds["matmul"], ours) * flops / values["matmul"], 3),
        utilisation_hugging_face=round(_median_ratio(seconds["matmul"], eager) * flops / values["matmul"], 3),
        matmul_tflops=round(values["matmul"] / statistics.median(seconds["matmul"]) / 1e12, 1),
        peak_gib=_peak_gib(steps["ours"], device), sequences=len(lengths), device=_device_name(device),
        loss_relative_difference=abs(values["ours"] / values["hugging_face"] - 1),
        fp8_over_bf16=_median_ratio(ours, seconds["fp8"]) if fp8_model else None,
        fp8_loss_relative_difference=abs(values["fp8"] / values["ours"] - 1) if fp8_model else None,
    )  # fmt: skip


def _fp8_copy(model: AlbertForPreTraining, device: torch.device) -> AlbertForPreTraining | None:
    """The model with float8 products; None where the GPU has none, torchao is missing or the sizes do not suit."""
    if model.config.hidden_size % 16 or model.config.intermediate_size % 16:
        return None
    try:
        product = fp8_product("on" if device.type == "cuda" else "emulated", device)
    except ConfigError as error:
        sys.stderr.write(f"gpu_step: without float8: {error}\n")
        return None
    twin = copy.deepcopy(model)
    twin.use_product(product)
    return twin


def measure_in_turns(
    steps: dict[str, Callable[[], Tensor]], rounds: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of one step, per kind and round."""
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(rounds):
        for key in order:
            _synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats):
                steps[key]()
            _synchronise(device)
            seconds[key].append((time.perf_counter() - start) / repeats)
        order = order[1:] + order[:1]
    return seconds


def _median_ratio(dividends: list[float], divisors: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(dividends, divisors, strict=True)), 4)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_gib(step: Callable[[], Tensor], device: torch.device) -> float | None:
    """Memory of weights, gradients and activations, with what the peers of this process hold."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODEL_PRESETS, default=["base", "large", "xlarge", "xxlarge"]
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--tokens", type=int, default=32 * 512, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="steps between two synchronisations")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu_step: left out; there is no GPU (--device cpu tries it out)\n")
        return
    transformers.logging.set_verbosity_error()
    for name in options.models:
        for length in options.lengths:
            measure(name, length, options)


if __name__ == "__main__":
    main()
