"""Ranks and collectives: the only user of torch.distributed.

A program started by a launcher finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its
environment; under plain `srun` the SLURM_* variables stand for them. Without either there is one rank.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from albert.errors import ConfigError, PeerLostError
from albert.host_memory import keep_freed_memory

_SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_PEER_FAILURE = re.compile(
    r"gloo|NCCL|closed by peer|reset by peer|Timed out waiting|Connection refused", re.IGNORECASE
)


@dataclass(frozen=True)
class World:
    """Which of how many ranks this process is, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """By which the ranks found each other."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes what only one may write."""
        return self.rank == 0


def init_world(device: str, timeout_s: float) -> World:
    """Join the other ranks.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: longest time that a collective may take.

    Raises:
        ConfigError: CUDA was asked for and is not there, or two ranks would compute on one GPU.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.update({ours: os.environ[slurms] for ours, slurms in _SLURM_NAMES.items()})
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cpu":
        keep_freed_memory()
    _tell_deepspeed(chosen, local_rank)
    timeout = datetime.timedelta(seconds=timeout_s)
    # DeepSpeed makes groups without naming a timeout; torch's default would let them wait for 30 minutes.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store: dist.Store = dist.HashStore()
    if size > 1:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    if chosen.type == "cuda":
        _refuse_shared_gpu(store, f"{socket.gethostname()} {torch.cuda.get_device_properties(chosen).uuid}")
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, chosen, store)


def _choose_device(device: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("train.device (cuda): no CUDA device is visible; use train.device=cpu or auto")
    if device == "cpu" or not available or (device == "auto" and os.environ.get("DS_ACCELERATOR") == "cpu"):
        return torch.device("cpu")
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def _tell_deepspeed(device: torch.device, local_rank: int) -> None:
    """Name the device as DeepSpeed looks for it: the accelerator when it is imported, LOCAL_RANK for its number.

    A rank that sees one GPU only has number 0 there, whatever its place on the node.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(local_rank if device.index is None else device.index)
    # DeepSpeed insists that both are equal.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)


def _refuse_shared_gpu(store: dist.Store, gpu: str) -> None:
    """NCCL refuses it too, later and in other words.

    Args:
        store: of all ranks.
        gpu: host and identity of the GPU.

    Raises:
        ConfigError: another rank computes on it.
    """
    if store.add(f"ranks of {gpu}", 1) > 1:
        raise ConfigError(
            f"two ranks would compute on one GPU ({gpu}): start at most one rank for each GPU, "
            "or compute on the CPU (train.device=cpu; for fine-tuning --device=cpu)"
        )


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Turn the failure of a collective into one that names its cause.

    Raises:
        PeerLostError: another rank died, hangs or cannot be reached, or a loader process of this one was killed.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        if "DataLoader worker" in text:
            cause = " ".join(text.split())[:120]
            raise PeerLostError(
                f"a process that loads data for this rank was lost ({cause}), perhaps for want of memory; give the "
                "same command again to go on from the last checkpoint"
            ) from error
        if not isinstance(error, dist.DistError) and not _PEER_FAILURE.search(text):
            raise
        cause = " ".join(text.split())[:200]
        raise PeerLostError(
            f"another rank died, hangs or cannot be reached ({cause}); see its log, then give the same command "
            "again to go on from the last checkpoint"
        ) from error


class Heartbeats:
    """One line of text per rank, which every rank can read without the others' help."""

    def __init__(self, world: World, timeout_s: float) -> None:
        """Connect on its own: a collective may hold the other connection for as long as it waits.

        Args:
            world: the ranks.
            timeout_s: longest time that asking for the lines may take.
        """
        self._world = world
        clone = getattr(world.store, "clone", None)  # missing in the stubs of torch
        self._store: dist.Store | None = clone() if clone and world.size > 1 else None
        if self._store:
            self._store.set_timeout(datetime.timedelta(seconds=timeout_s))

    def send(self, line: str) -> None:
        """Replace this rank's line; says nothing where nobody can be reached."""
        with contextlib.suppress(RuntimeError):
            if self._store:
                self._store.set(self._key(self._world.rank), line)

    def receive(self) -> dict[int, str]:
        """Rank -> its line; empty where not all ranks have one, or the store cannot be reached."""
        if not self._store:
            return {}
        keys = [self._key(rank) for rank in range(self._world.size)]
        try:
            return {rank: line.decode() for rank, line in enumerate(self._store.multi_get(keys))}
        except RuntimeError:
            return {}

    @staticmethod
    def _key(rank: int) -> str:
        return f"heartbeat/{rank}"


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `values` over the ranks, in place."""
    dist.all_reduce(values, group=group)
    return values


def min_over_ranks(value: int) -> int:
    """The smallest of one integer per rank."""
    return _reduce_scalar(value, dist.ReduceOp.MIN)


def max_over_ranks(value: int) -> int:
    """The largest of one integer per rank."""
    return _reduce_scalar(value, dist.ReduceOp.MAX)


def _reduce_scalar(value: int, operation: dist.ReduceOp.RedOpType) -> int:
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=operation)
    return int(tensor.item())


def gather_rows(row: Tensor) -> Tensor:
    """Stack one CPU tensor [n] per rank to [world, n] on every rank."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def group_rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and size inside a process group."""
    return dist.get_rank(group), dist.get_world_size(group)


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def close_world() -> None:
    """Leave the process groups, so that the interpreter ends without waiting threads."""
    if dist.is_initialized():
        dist.destroy_process_group()
