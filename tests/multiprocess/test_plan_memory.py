"""The memory that a plan predicts, beside what a real step of ALBERT base takes on this CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from albert.config import load_run_config
from launcher.devices import find_device
from launcher.plan import PlanRequest, make_plan

ROOT = Path(__file__).parents[2]
SEQ_LENGTH, NUM_PREDS = 512, 77
_STEP = """
import sys
import torch
from albert.batches import PretrainBatch, pack
from albert.config import load_run_config
from albert.deepspeed_config import build_deepspeed_config
from albert.distributed import init_world
from albert.engine import Engine
from albert.heads import AlbertForPreTraining

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

seq, preds = int(sys.argv[1]), int(sys.argv[2])
config = load_run_config("base", sys.argv[3:])
batch = config.train.micro_batch_size
world = init_world("cpu", 600)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
model = AlbertForPreTraining(config.model)
model.activation_checkpointing = config.train.activation_checkpointing
engine = Engine(model, config.optimizer, build_deepspeed_config(config, 1), world)
for _ in range(2):
    ids = torch.randint(5, 30000, (batch * seq,))
    places = torch.cat([torch.randperm(seq)[:preds].sort().values + row * seq for row in range(batch)])
    packed = pack(ids, torch.zeros_like(ids), (seq,) * batch)
    output = engine.forward(PretrainBatch(packed, places, ids[places], torch.zeros(batch, dtype=torch.long)))
    engine.backward(output.mlm_loss_sum / 1000 + output.sop_loss_sum / 8)
engine.step(1e-4)
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.micro_batch_size=2"],
        ["train.micro_batch_size=4", "train.activation_checkpointing=true"],
        ["train.micro_batch_size=2", "deepspeed.config=zero3"],
    ],
)
def test_predicted_memory_is_within_10_percent_of_the_measured_peak(overrides):
    batch = int(overrides[0].partition("=")[2])
    common = [f"train.global_batch_size={2 * batch}", "train.precision=fp32", "train.device=cpu"]
    words = ["data.directory=d", "train.output_dir=o", *common, *overrides]
    # Freed memory goes back to the system at once, so that the peak is that of live tensors.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-c", _STEP, str(SEQ_LENGTH), str(NUM_PREDS), *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = int(result.stdout.splitlines()[-1])
    request = PlanRequest(load_run_config("base", words), 1, 1, find_device("cpu"), SEQ_LENGTH, 1)
    predicted = make_plan(request).memory.total
    print(f"{overrides}: predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert abs(predicted / measured - 1) < 0.1, f"predicted {predicted}, measured {measured}"
