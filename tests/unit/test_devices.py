"""What a rank finds out about its GPU, with what CUDA would answer: tests/gpu asks a real one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from albert.config import load_run_config
from albert.distributed import World, _choose_device, _refuse_shared_gpu, _tell_deepspeed
from albert.errors import ConfigError
from albert.precision import computes_bf16, default_precision
from albert.preflight import try_step
from albert.pretrain import _compiles
from launcher.demo import DemoPlan, demo_stages

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """CUDA's answers on a machine with as many GPUs as asked for, of the compute capability asked for."""

    def has(capability, count=1):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        properties = SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)

    return has


@pytest.mark.parametrize(("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_the_default_precision_is_one_that_the_gpu_has(gpu, capability, precision):
    gpu(capability)
    assert default_precision(GPU) == precision
    assert computes_bf16(GPU) is (precision == "bf16")
    assert default_precision(CPU) == "fp32"
    assert computes_bf16(CPU)


@pytest.mark.parametrize(
    ("capability", "overrides", "expected"),
    [
        ((9, 0), [], True),
        ((7, 0), ["train.precision=fp16"], False),
        ((9, 0), ["train.precision=fp32"], False),
        ((9, 0), ["model.attention_probs_dropout_prob=0.1"], False),
        ((9, 0), ["train.compile=off"], False),
        ((7, 0), ["train.compile=on"], True),
    ],
)
def test_layers_are_compiled_where_one_kernel_attends_to_all_sequences(gpu, capability, overrides, expected):
    gpu(capability)
    config = load_run_config("base", ["data.directory=shards", "train.output_dir=run", *overrides])
    assert _compiles(config, World(0, 1, 0, GPU)) is expected
    assert _compiles(config, World(0, 1, 0, CPU)) is (config.train.compile == "on")


def test_preflight_names_a_precision_that_the_gpu_only_emulates(gpu):
    gpu((7, 5))
    config = load_run_config("base", ["data.directory=shards", "train.output_dir=run"])
    problem = "train.precision (bf16): cuda:0 does not compute in it; use fp16 or fp32"
    assert try_step(config, World(0, 1, 0, GPU)) == [problem]
    assert try_step(config, World(0, 1, 0, CPU)) == []


@pytest.mark.parametrize(
    ("visible", "device"), [("", "cpu"), ("0", "cpu"), ("0,1", "auto"), ("0,1,2,3", "auto")]
)
def test_the_demo_takes_the_cpu_where_ranks_would_share_a_gpu(monkeypatch, visible, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    arguments = {stage.name: stage.arguments for stage in demo_stages(DemoPlan(Path("demo"), num_ranks=2))}
    assert f"train.device={device}" in arguments["pretrain"]
    assert f"train.device={device}" in arguments["resume"]
    assert arguments["finetune"][arguments["finetune"].index("--device") + 1] == device


def test_deepspeed_hears_of_the_gpu_that_the_rank_sees(monkeypatch):
    """Slurm's --gpus-per-task=1 shows every rank one GPU, which has number 0 there."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _tell_deepspeed(GPU, local_rank=3)
    assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    _tell_deepspeed(CPU, local_rank=3)
    assert os.environ["LOCAL_RANK"] == "3"
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_the_device_follows_deepspeeds_accelerator_unless_it_is_named(gpu, monkeypatch):
    gpu((9, 0), count=2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert _choose_device("auto", 1) == CPU
    assert _choose_device("cuda", 1).type == "cuda"
    monkeypatch.delenv("DS_ACCELERATOR")
    assert _choose_device("auto", 1).type == "cuda"
    assert _choose_device("cpu", 1) == CPU


def test_two_ranks_on_one_gpu_are_refused():
    store = dist.HashStore()
    for place in ("node1 GPU-a", "node1 GPU-b", "node2 GPU-a"):
        _refuse_shared_gpu(store, place)
    with pytest.raises(ConfigError, match=r"one GPU \(node1 GPU-b\): start at most one rank for each GPU"):
        _refuse_shared_gpu(store, "node1 GPU-b")
