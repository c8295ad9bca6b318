"""Checks before an expensive start: `python -m launcher preflight`, or as a job on hosts or Slurm.

Every rank looks at its own host, then the ranks compare what they found and try what training does: a shared
directory, an all-reduce with its bandwidth, one small training step. Each problem is one line that names the host.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albert.addresses import is_remote
from albert.config import RunConfig, load_run_config
from albert.errors import AlbertError, ConfigError, PeerLostError, end_rank, run_command
from albert.shards import read_manifest

if TYPE_CHECKING:
    from albert.distributed import World

Facts = dict[str, Any]
"""What one rank found on its host."""

JOIN_TIMEOUT_S = 20.0
MAX_SKEW_S = 5.0
SAVES_THAT_MUST_FIT = 2

_EQUAL = {
    "code": "different code (hash {value}); install the same version of this project everywhere",
    "versions": "different versions ({value}); install the packages of constraints.txt everywhere",
    "dataset": "different or stale shards (manifest {value}); copy the dataset again or use a shared directory",
}
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
_BYTES_PER_PARAMETER_SAVED = 12
_REDUCED_VALUES = 4 * 2**20
_EXAMPLES = """examples:
  python -m launcher preflight -n 8 --config xlarge data.directory=data/shards train.output_dir=runs/a
  python -m launcher hosts --hostfile hosts.txt preflight --config xlarge ...
  python -m launcher slurm --nodes 8 preflight --config xlarge ...

Exit code 0: every check passed; 78: at least one did not, each named in a line; 76: a rank did not arrive."""


def local_facts(config: RunConfig) -> Facts:
    """Look at this host, without the other ranks; problems are collected, not raised."""
    problems: list[str] = []
    dataset = _check(problems, lambda: _dataset_hash(config))
    _check(problems, lambda: check_interfaces(os.environ, Path("/sys/class/net")))
    _check(problems, lambda: check_space(config))
    return {
        "host": socket.gethostname(),
        "code": code_hash(Path(__file__).parent)[:12],
        "versions": " ".join([platform.python_version(), *(f"{n} {metadata.version(n)}" for n in _PACKAGES)]),
        "dataset": dataset,
        "problems": problems,
    }


def _check(problems: list[str], check: Any) -> Any:
    try:
        return check()
    except AlbertError as error:
        problems.append(str(error))
        return None


def code_hash(package: Path) -> str:
    """SHA-256 over all source files of a package, names included."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _dataset_hash(config: RunConfig) -> str:
    """Hash of the manifest, once the sizes of all local files that it names are right."""
    manifest = read_manifest(config.data.directory)
    for shard in () if is_remote(config.data.directory) else manifest.shards:
        path = Path(config.data.directory) / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes, the manifest says {shard.bytes:,}"
            raise ConfigError(
                f"{path}: {found}; the shards are stale, run python -m data_prep verify on them"
            )
    return str(manifest.sha256)[:12]


def check_interfaces(environment: Any, devices: Path) -> None:
    """Every network interface that is asked for is there.

    Raises:
        ConfigError: names the variable and the interfaces that are there.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        names = environment.get(variable, "").removeprefix("=").split(",")
        present = sorted(path.name for path in devices.iterdir())
        for name in filter(None, names):
            # NCCL takes beginnings of names, and ^ for "not these".
            if not name.startswith("^") and not any(other.startswith(name) for other in present):
                raise ConfigError(
                    f"{variable}: no network interface {name!r}; there are {', '.join(present)}"
                )


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


def compare_facts(facts: Sequence[Facts]) -> list[str]:
    """Problems of single hosts, and where hosts differ from the first; one line each, without repetition."""
    lines = [f"{fact['host']}: {problem}" for fact in facts for problem in fact["problems"]]
    for key, text in _EQUAL.items():
        for fact in facts[1:]:
            if None not in (fact[key], facts[0][key]) and fact[key] != facts[0][key]:
                wanted = f"; {facts[0]['host']} has {facts[0][key]}"
                lines.append(f"{fact['host']}: " + text.format(value=fact[key]) + wanted)
    clocks = sorted(fact["clock"] for fact in facts)
    for fact in facts:
        skew = fact["clock"] - clocks[len(clocks) // 2]
        lines += [f"{fact['host']}: its clock is {skew:+.0f} s from the others'"] * (abs(skew) > MAX_SKEW_S)
    return list(dict.fromkeys(lines))


def gather_facts(facts: Facts) -> list[Facts]:
    """Everybody's facts, by rank. Collective."""
    import numpy as np
    import torch

    from albert.distributed import gather_rows, max_over_ranks

    data = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    row = torch.zeros(max_over_ranks(len(data)), dtype=torch.uint8)
    row[: len(data)] = torch.from_numpy(data.copy())
    return [json.loads(bytes(other.numpy()).rstrip(b"\0")) for other in gather_rows(row)]


def probe_directory(directory: Path, world: World) -> list[str]:
    """Whether what one rank writes all others read. Collective; returns this rank's problems."""
    from albert.distributed import barrier, max_over_ranks

    nonce = max_over_ranks(secrets.randbits(62) if world.is_main else 0)
    problems = []
    path = directory / f".preflight-{nonce}-{world.rank}"
    try:
        path.write_text(str(nonce))
    except OSError as error:
        problems.append(f"train.output_dir ({directory}): not writable: {error.strerror}")
    barrier()
    if not (directory / f".preflight-{nonce}-0").is_file():
        problems.append(
            f"train.output_dir ({directory}): not shared with the host of rank 0; use a shared file system"
        )
    barrier()
    path.unlink(missing_ok=True)
    return problems


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

    small = {"hidden_size": 64, "embedding_size": 16, "intermediate_size": 128, "num_attention_heads": 2}
    model_config = config.model.model_copy(update={**small, "num_hidden_layers": 2, "num_hidden_groups": 1})
    try:
        model = AlbertForPreTraining(model_config).to(world.device)
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


def run_checks(config: RunConfig) -> tuple[list[str], bool]:
    """All checks. Collective.

    Returns:
        The problems, and whether this rank is the one to report them.

    Raises:
        PeerLostError: a rank did not arrive.
    """
    facts = {**local_facts(config), "clock": 0.0}
    if any("SOCKET_IFNAME" in problem for problem in facts["problems"]):
        return compare_facts([facts]), True  # it cannot even meet the others
    from albert.distributed import close_world, init_world

    try:
        world = init_world(config.train.device, JOIN_TIMEOUT_S)
    except ConfigError as error:
        facts["problems"].append(str(error))
        return compare_facts([facts]), True
    except RuntimeError as error:
        raise PeerLostError(
            f"{facts['host']}: not all ranks arrived in {JOIN_TIMEOUT_S:.0f} s; a host is down, or its line is above"
        ) from error
    problems = _compare_with_others(config, facts, world)
    close_world()
    return problems, world.is_main


def _compare_with_others(config: RunConfig, facts: Facts, world: World) -> list[str]:
    from albert.distributed import barrier

    barrier()
    facts["clock"] = time.time()
    facts["problems"] += busy_device(world) + probe_directory(Path(config.train.output_dir), world)
    facts["problems"] += try_step(config, world)
    is_right, bytes_per_s = measure_all_reduce(world)
    if not is_right:
        facts["problems"].append("a sum over the ranks came out wrong")
    everybody = gather_facts(facts)
    if world.is_main:
        hosts = ", ".join(dict.fromkeys(fact["host"] for fact in everybody))
        sys.stdout.write(f"preflight: {world.size} ranks on {hosts}: {facts['versions']}\n")
        sys.stdout.write(f"preflight: all-reduce of 16 MiB: {bytes_per_s / 1e9:.2f} GB/s per rank\n")
    return compare_facts(everybody)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launcher preflight",
        description="Check every host before an expensive start.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="recipe or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    began_at = time.monotonic()
    problems, is_reporter = run_checks(load_run_config(options.config, options.overrides))
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
