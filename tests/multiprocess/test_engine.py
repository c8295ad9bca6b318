"""Gradients, LAMB and state under every ZeRO stage equal those of one plain process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from albert.config import DataConfig, OptimizerConfig
from albert.deepspeed_config import complete_placement, read_placement
from albert.distributed import World, close_world, init_world
from albert.engine import STATE_PARTS, WEIGHTS, Engine
from albert.heads import AlbertForPreTraining
from albert.loader import BatchPlan, TrainLoader
from albert.manifest import read_manifest
from albert.model_config import ModelConfig
from albert.optim.groups import is_excluded
from albert.trainer import count_batch
from tests.ranks import run_ranks
from tests.synthetic import TINY_MODEL, make_dataset

pytestmark = pytest.mark.multiprocess
GLOBAL_BATCH, NUM_STEPS = 24, 5
LAMB = OptimizerConfig(name="lamb", learning_rate=0.02, max_grad_norm=0.5)
ADAMW = OptimizerConfig(name="adamw", learning_rate=0.01, max_grad_norm=0.5)
STAGES = ["zero0", "zero1", "zero2", "zero3"]
RATES = [0.0, 0.02, 0.02, 0.01, 0.005]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    make_dataset(directory / "shards")
    return directory / "shards"


def _batches(dataset: Path, rank: int, world_size: int, accumulation: int):
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // (world_size * accumulation), rank, world_size, NUM_STEPS)
    loader = TrainLoader(
        DataConfig(directory=str(dataset), num_workers=0), read_manifest(dataset), plan, seed=7
    )
    return list(loader.steps(0, 0))


def _make_engine(
    world: World, optimizer: OptimizerConfig, stage: str, accumulation: int, precision: str = "fp32"
) -> Engine:
    if precision == "fp16":
        # Every CPU computes in fp16, if slowly; DeepSpeed allows only those with instructions for it.
        get_accelerator().is_fp16_supported = lambda: True
    model = AlbertForPreTraining(ModelConfig(**TINY_MODEL), seed=3)
    placement = complete_placement(
        read_placement(stage),
        precision=precision,
        micro_batch_size=GLOBAL_BATCH // (world.size * accumulation),
        accumulation_steps=accumulation,
        world_size=world.size,
        max_grad_norm=optimizer.max_grad_norm,
    )
    return Engine(model, optimizer, placement, world)


def _train(engine: Engine, steps) -> None:
    for micro_batches, rate in zip(steps, RATES, strict=True):
        counts = count_batch(micro_batches, stop_requested=False)
        for batch in micro_batches:
            output = engine.forward(batch)
            engine.backward(output.mlm_loss_sum / counts.preds + output.sop_loss_sum / counts.orders)
        assert engine.step(rate).applied


def _state(engine: Engine) -> dict[str, np.ndarray]:
    return {f"{part}/{name}": tensor.numpy().copy() for part, name, tensor in engine.gather_state()}


def _train_and_gather(dataset: Path, optimizer: OptimizerConfig, cases: list[tuple[str, int]]):
    """State after training for every (stage, accumulation), one engine after the other in one process."""
    world = init_world("cpu", timeout_s=60)
    states = {}
    for stage, accumulation in cases:
        engine = _make_engine(world, optimizer, stage, accumulation)
        _train(engine, _batches(dataset, world.rank, world.size, accumulation))
        states[stage, accumulation] = _state(engine)
    close_world()
    return states


def _reference(dataset: Path, optimizer: OptimizerConfig) -> dict[str, np.ndarray]:
    """Weights after plain float64 training in this process, without DeepSpeed and without our optimizer."""
    model = AlbertForPreTraining(ModelConfig(**TINY_MODEL), seed=3).double()
    named = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in named.items()}
    second = {name: torch.zeros_like(p) for name, p in named.items()}
    for step, ((batch,), rate) in enumerate(zip(_batches(dataset, 0, 1, 1), RATES, strict=True), start=1):
        output = model(batch)
        orders = len(batch.sentence_order_labels)
        loss = output.mlm_loss_sum / batch.masked_lm_labels.numel() + output.sop_loss_sum / orders
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = torch.sqrt(sum((g * g).sum() for g in gradients.values()))
        clip = min(1.0, optimizer.max_grad_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for name, parameter in named.items():
                gradient = gradients[name] * clip
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient * gradient
                if optimizer.name == "adamw":
                    hat1, hat2 = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                    update = hat1 / (hat2.sqrt() + optimizer.eps)
                else:
                    update = first[name] / (second[name].sqrt() + optimizer.eps)
                if not is_excluded(name):
                    update = update + optimizer.weight_decay * parameter
                    if optimizer.name == "lamb":
                        update = update * (parameter.norm() / update.norm())
                parameter.sub_(rate * update)
    return {f"weights/{name}": weight.detach().numpy() for name, weight in named.items()}


def _relative_error(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    """Largest difference over the names of `right`, relative to the tensor's own norm.

    The key bias shifts all scores of a query alike, so its exact gradient is zero and what it gets is rounding:
    it must only stay near zero.
    """
    key_biases = [name for name in right if name.endswith("key.bias")]
    assert all(max(np.abs(left[name]).max(), np.abs(right[name]).max()) < 1e-4 for name in key_biases)
    return max(
        float(np.linalg.norm(left[name].astype(np.float64) - right[name]) / np.linalg.norm(right[name]))
        for name in right
        if name not in key_biases
    )


CASES = {
    1: [(stage, accumulation) for stage in STAGES for accumulation in (1, 2, 4)],
    2: [(stage, accumulation) for stage in STAGES for accumulation in (1, 2, 4)] + [("zero2_offload", 2)],
    4: [("zero1", 1), ("zero2", 2), ("zero3", 1)],
}


@pytest.fixture(scope="module")
def lamb_states(dataset: Path):
    """(world size, stage, accumulation) -> state of every rank after five LAMB steps."""
    states = {}
    for world_size, cases in CASES.items():
        ranks = run_ranks(world_size, _train_and_gather, dataset, LAMB, cases)
        states |= {(world_size, *case): [rank[case] for rank in ranks] for case in cases}
    return states


@pytest.fixture(scope="module")
def lamb_reference(dataset: Path):
    return _reference(dataset, LAMB)


ALL_CASES = [(world_size, *case) for world_size, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_lamb_equals_single_process_float64(lamb_states, lamb_reference, case):
    assert _relative_error(lamb_states[case][0], lamb_reference) < 1e-5


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_weights_do_not_depend_on_division_or_stage(lamb_states, case):
    plain = lamb_states[1, "zero0", 1][0]
    weights = {name: value for name, value in plain.items() if name.startswith(WEIGHTS)}
    assert _relative_error(lamb_states[case][0], weights) < 1e-6


@pytest.mark.parametrize("case", [case for case in ALL_CASES if case[0] > 1], ids=str)
def test_ranks_agree_bitwise(lamb_states, case):
    first, *others = lamb_states[case]
    for other in others:
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_adamw_equals_single_process_float64(dataset):
    reference = _reference(dataset, ADAMW)
    cases = [(stage, 1) for stage in STAGES]
    states = run_ranks(2, _train_and_gather, dataset, ADAMW, cases)[0]
    assert max(_relative_error(states[case], reference) for case in cases) < 1e-5


PLACEMENTS = [(stage, "fp32") for stage in (*STAGES, "zero2_offload")] + [
    (stage, precision)
    for stage in ("zero1", "zero2", "zero2_offload", "zero3")
    for precision in ("bf16", "fp16")
]


def _gather_then_train(dataset: Path, cases: list[tuple[str, str]]):
    """Whether a gathered state stays what it was while the training goes on."""
    world = init_world("cpu", timeout_s=60)
    batch = _batches(dataset, world.rank, world.size, 1)[0][0]
    outcomes = {}
    for stage, precision in cases:
        engine = _make_engine(world, LAMB, stage, 1, precision)
        gathered = [tensor for _, _, tensor in engine.gather_state()]
        before = [tensor.clone() for tensor in gathered]
        _train_until_applied(engine, batch, num_tries=20)
        has_moved = any(
            not torch.equal(old, new) for old, (_, _, new) in zip(before, engine.gather_state(), strict=True)
        )
        is_unchanged = all(torch.equal(old, new) for old, new in zip(before, gathered, strict=True))
        outcomes[stage, precision] = (has_moved, is_unchanged)
    close_world()
    return outcomes


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gathered_state_is_a_copy(dataset, world_size):
    """Checkpoints are written while the training goes on."""
    for outcomes in run_ranks(world_size, _gather_then_train, dataset, PLACEMENTS):
        assert outcomes == dict.fromkeys(PLACEMENTS, (True, True))


def _load_random_states(cases: list[tuple[str, str]]):
    world = init_world("cpu", timeout_s=60)
    outcomes = {(stage, precision): _load_random_state(world, stage, precision) for stage, precision in cases}
    close_world()
    return outcomes


def _load_random_state(world: World, stage: str, precision: str):
    engine = _make_engine(world, LAMB, stage, 1, precision)
    generator = torch.Generator().manual_seed(11)
    state = {
        part: {name: torch.rand(shape, generator=generator) for name, shape in engine.named_shapes().items()}
        for part in STATE_PARTS
    }
    engine.load_state(state, num_steps=17)
    gathered = {(part, name): tensor for part, name, tensor in engine.gather_state()}
    is_exact = all(
        torch.equal(gathered[part, name], state[part][name]) for part in state for name in state[part]
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    with engine.full_weights():
        is_served = all(
            torch.equal(p.detach(), state[WEIGHTS][n].to(dtype)) for n, p in engine.model.named_parameters()
        )
    return is_exact, is_served, engine.optimizer.num_steps


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_round_trip_is_bitwise(world_size):
    """What is loaded is what is gathered, and what the model computes with."""
    for outcomes in run_ranks(world_size, _load_random_states, PLACEMENTS):
        assert outcomes == dict.fromkeys(PLACEMENTS, (True, True, 17))


def _steps_with_bad_gradient(dataset: Path, cases: list[tuple[str, str]]):
    world = init_world("cpu", timeout_s=60)
    batch = _batches(dataset, world.rank, world.size, 1)[0][0]
    outcomes = {}
    for stage, precision in cases:
        engine = _make_engine(world, LAMB, stage, 1, precision)
        for bad in (float("nan"), float("inf")):
            before = _state(engine)
            factor = bad if world.rank == world.size - 1 else 1.0
            engine.backward(engine.forward(batch).mlm_loss_sum * factor)
            result = engine.step(0.01)
            after = _state(engine)
            unchanged = all(np.array_equal(before[name], after[name]) for name in before)
            has_recovered = _train_until_applied(engine, batch, num_tries=20)
            outcomes[stage, precision, str(bad)] = (result.applied, unchanged, has_recovered)
    close_world()
    return outcomes


def _train_until_applied(engine: Engine, batch, num_tries: int) -> bool:
    """fp16 drops steps until its loss scale fits."""
    for _ in range(num_tries):
        engine.backward(engine.forward(batch).mlm_loss_sum * 1e-3)
        if engine.step(0.01).applied:
            return True
    return False


def test_a_nonfinite_gradient_on_one_rank_changes_nothing_on_any(dataset):
    for outcomes in run_ranks(2, _steps_with_bad_gradient, dataset, PLACEMENTS):
        assert len(outcomes) == 2 * len(PLACEMENTS)
        assert {case: value for case, value in outcomes.items() if value != (False, True, True)} == {}
