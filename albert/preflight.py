"""Checks before an expensive start: `python -m launcher preflight`, or as a job on hosts or Slurm.

Every rank looks at its own host, then the ranks compare what they found and try what training does: a shared
directory, an all-reduce with its bandwidth, one small training step. Each problem is one line that names the host.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from albert.command_line import CommandParser
from albert.config import RunConfig, load_run_config
from albert.durable_files import write_file_durably
from albert.errors import ConfigError, PeerLostError, end_rank, run_command
from albert.preflight_facts import (
    Facts,
    bad_hosts,
    collect,
    host_facts,
    problem_lines,
    promised_bytes_per_s,
    rank_problems,
)

if TYPE_CHECKING:
    from albert.distributed import World

JOIN_TIMEOUT_S = 20.0
LIMIT_S = 120.0
"""A host on which a check hangs, as on a dead file system, ends after this time."""
SAVES_THAT_MUST_FIT = 2

_BYTES_PER_PARAMETER_SAVED = 12
_REDUCED_VALUES = 4 * 2**20
_EXAMPLES = """examples:
  python -m launcher preflight -n 8 --config xlarge data.directory=data/shards train.output_dir=runs/a
  python -m launcher hosts --hostfile hosts.txt preflight --config xlarge ...
  python -m launcher slurm --nodes 8 preflight --config xlarge ...

Exit code 0: every check passed; 78: at least one did not, each named in a line; 76: a rank did not arrive."""


def check_space(config: RunConfig) -> None:
    """Two checkpoints fit into the output directory.

    Raises:
        ConfigError: they do not, or the directory cannot be written.
    """
    import torch

    from albert.heads import AlbertForPreTraining

    with torch.device("meta"):
        model = AlbertForPreTraining(config.model)
    size = _BYTES_PER_PARAMETER_SAVED * sum(parameter.numel() for parameter in model.parameters())
    directory = Path(config.train.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"train.output_dir ({directory}): {error.strerror}") from error
    free = shutil.disk_usage(directory).free
    if free < SAVES_THAT_MUST_FIT * size:
        raise ConfigError(
            f"train.output_dir ({directory}): {free / 2**20:,.0f} MiB are free, {SAVES_THAT_MUST_FIT} checkpoints "
            f"take {SAVES_THAT_MUST_FIT * size / 2**20:,.0f} MiB; free space or choose another directory"
        )


def gather_facts(facts: Facts) -> list[Facts]:
    """Everybody's facts, by rank. Collective."""
    import numpy as np
    import torch

    from albert.distributed import gather_rows, max_over_ranks

    data = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    row = torch.zeros(max_over_ranks(len(data)), dtype=torch.uint8)
    row[: len(data)] = torch.from_numpy(data.copy())
    return [json.loads(bytes(other.numpy()).rstrip(b"\0")) for other in gather_rows(row)]


def probe_directory(facts: Facts, world: World) -> None:
    """Whether this rank may write the output directory, and sees there what rank 0 wrote. Collective."""
    from albert.distributed import barrier, max_over_ranks

    directory = Path(facts["output_dir"])
    nonce = max_over_ranks(secrets.randbits(62) if world.is_main else 0)
    path = directory / f".preflight-{nonce}-{world.rank}"
    try:
        path.write_text(str(nonce))
    except OSError as error:
        facts["problems"].append(f"train.output_dir ({directory}): not writable: {error.strerror}")
    barrier()
    facts["sees_first"] = (directory / f".preflight-{nonce}-0").is_file()
    barrier()
    path.unlink(missing_ok=True)


def measure_all_reduce(world: World) -> tuple[bool, float]:
    """Whether a sum over the ranks is right, and its bandwidth in bytes per second. Collective."""
    import torch

    from albert.distributed import sum_over_ranks

    values = torch.full((_REDUCED_VALUES,), float(world.rank + 1), device=world.device)
    sum_over_ranks(values)
    is_right = bool((values == world.size * (world.size + 1) / 2).all())
    values.fill_(0)
    began_at = time.perf_counter()
    for _ in range(3):
        sum_over_ranks(values)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed_s = (time.perf_counter() - began_at) / 3
    ring = 2 * (world.size - 1) / world.size
    return is_right, ring * values.numel() * values.element_size() / elapsed_s


def try_step(config: RunConfig, world: World) -> list[str]:
    """One forward and backward pass of a narrow model on this rank's device; returns problems."""
    import torch

    from albert.batches import PretrainBatch, pack
    from albert.heads import AlbertForPreTraining
    from albert.precision import DTYPES, computes_bf16

    precision = config.train.precision
    if precision == "bf16" and not computes_bf16(world.device):
        return [f"train.precision (bf16): {world.device} does not compute in it; use fp16 or fp32"]
    small = {"hidden_size": 64, "embedding_size": 16, "intermediate_size": 128, "num_attention_heads": 2}
    model_config = config.model.model_copy(update={**small, "num_hidden_layers": 2, "num_hidden_groups": 1})
    try:
        model = AlbertForPreTraining(model_config).to(world.device, DTYPES[precision])
        ids = torch.full((32,), 5)
        packed = pack(ids, torch.zeros_like(ids), (16, 16))
        places = torch.tensor([1, 17])
        batch = PretrainBatch(packed, places, ids[places], torch.zeros(2, dtype=torch.long))
        output = model(batch.to(world.device))
        (output.mlm_loss_sum + output.sop_loss_sum).backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    except RuntimeError as error:
        return [f"a small training step failed: {' '.join(str(error).split())[:200]}"]
    return [] if norm < float("inf") else [f"a small training step gave a gradient norm of {norm}"]


def busy_device(world: World) -> list[str]:
    """Whether somebody else uses this rank's GPU."""
    import torch

    if world.device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(world.device)
    if total - free > 0.1 * total:
        return [
            f"{world.device}: {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB are in use by somebody else"
        ]
    return []


def run_checks(config: RunConfig, join_timeout_s: float, report: Path | None) -> tuple[list[str], bool]:
    """All checks. Collective.

    Args:
        config: of the pretraining that is to start.
        join_timeout_s: how long the other ranks may take to arrive, and each collective after that.
        report: file that gets the problems and the hosts to avoid, from rank 0.

    Returns:
        A line for each problem, and whether this rank is the one to report them.

    Raises:
        PeerLostError: a rank did not arrive, or was lost.
    """
    facts = host_facts(config)
    collect(facts, lambda: check_space(config))
    if any("SOCKET_IFNAME" in problem for problem in facts["problems"]):
        return problem_lines([facts], [facts["problems"]]), True  # it cannot even meet the others
    from albert.distributed import close_world, init_world, peer_errors

    try:
        world = init_world(config.train.device, join_timeout_s)
    except ConfigError as error:
        facts["problems"].append(str(error))
        return problem_lines([facts], [facts["problems"]]), True
    except RuntimeError as error:
        raise PeerLostError(
            f"{facts['host']}: not all ranks arrived in {join_timeout_s:.0f} s; a host is down, or its line is above"
        ) from error
    with peer_errors():
        everybody = _exchange(config, facts, world)
    close_world()
    problems = rank_problems(everybody)
    lines = problem_lines(everybody, problems)
    if report is not None and world.is_main:
        found = {"bad_hosts": bad_hosts(everybody, problems), "problems": lines}
        write_file_durably(report, [json.dumps(found).encode()])
    return lines, world.is_main


def _exchange(config: RunConfig, facts: Facts, world: World) -> list[Facts]:
    """What ranks can only try together; returns everybody's facts. Collective."""
    from albert.distributed import barrier

    barrier()
    facts["clock"] = time.time()
    probe_directory(facts, world)
    facts["problems"] += busy_device(world) + try_step(config, world)
    is_right, bytes_per_s = measure_all_reduce(world)
    if not is_right:
        facts["problems"].append("a sum over the ranks came out wrong")
    everybody = gather_facts(facts)
    if world.is_main:
        hosts = list(dict.fromkeys(fact["host"] for fact in everybody))
        sys.stdout.write(f"preflight: {world.size} ranks on {', '.join(hosts)}: {facts['versions']}\n")
        if world.size > 1:
            sys.stdout.write(f"preflight: all-reduce of 16 MiB: {_bandwidth(bytes_per_s, len(hosts))}\n")
    return everybody


def _bandwidth(bytes_per_s: float, num_hosts: int) -> str:
    """Measured beside expected: a ring over several hosts is as fast as the network of one."""
    promised = promised_bytes_per_s(os.environ, Path("/sys/class"), Path("/proc/net/route"))
    text = f"{bytes_per_s / 1e9:.2f} GB/s per rank"
    if num_hosts == 1:
        return text
    if promised is None:
        return f"{text}; this host does not say what its network promises"
    return f"{text}; {promised[0]} promises {promised[1] / 1e9:.2f} GB/s"


def _end_after(limit_s: float) -> None:
    """End this process if it is not done by then; nothing else ends one that hangs in a system call."""

    def end() -> None:
        sys.stderr.write(f"error: preflight: not done in {limit_s:.0f} s: a file system or a device hangs\n")
        sys.stderr.flush()
        os._exit(ConfigError.exit_code)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()


def _main() -> None:
    parser = CommandParser(
        prog="python -m launcher preflight",
        description="Check every host before an expensive start.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="recipe or path of a YAML file")
    parser.add_argument(
        "--join-timeout", type=float, default=JOIN_TIMEOUT_S, metavar="SECONDS",
        help=f"how long the ranks may take to find each other ({JOIN_TIMEOUT_S:.0f})",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE", help="write problems and bad hosts as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    began_at = time.monotonic()
    _end_after(LIMIT_S)
    config = load_run_config(options.config, options.overrides)
    problems, is_reporter = run_checks(config, options.join_timeout, options.report)
    if problems and not is_reporter:
        sys.exit(ConfigError.exit_code)
    if problems:
        raise ConfigError("preflight: " + "\nerror: preflight: ".join(problems))
    if is_reporter:
        sys.stdout.write(f"preflight: all checks passed in {time.monotonic() - began_at:.1f} s\n")


def main() -> None:
    """Entry point."""
    end_rank(run_command(_main))


if __name__ == "__main__":
    main()
