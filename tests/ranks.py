"""Runs a function on several real ranks: forked processes, gloo over loopback, real DeepSpeed.

Forking a parent that has imported torch and DeepSpeed already saves seconds per rank; nothing in the parent has
joined a process group.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Imported once here, so that no rank has to; DeepSpeed's choice of an optimizer alone imports torch's compiler.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx

import albert.run_checkpoints
import albert.trainer  # noqa: F401

TIMEOUT_S = 120.0


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(environment)
    gc.freeze()  # DeepSpeed collects garbage again and again; what was imported before the fork is none
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        traceback.print_exc()  # a test that waits for an exit code reads no pipe
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)


class Ranks:
    """Forked ranks that run one function; use `results` to wait for them."""

    def __init__(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        port = free_port()
        self.processes, self._pipes = [], []
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, environment, function, arguments))
            process.start()
            sender.close()
            self.processes.append(process)
            self._pipes.append(receiver)

    def results(self, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """What the function returned on every rank; raises with the first failing rank's traceback."""
        ranks = range(len(self.processes))
        try:
            outcomes = [self._receive(rank, timeout_s) for rank in ranks]
        finally:
            self.kill()
        return [_value(rank, outcome) for rank, outcome in zip(ranks, outcomes, strict=True)]

    def result(self, rank: int, timeout_s: float = TIMEOUT_S) -> Any:
        """What the function returned on one rank; the others go on."""
        return _value(rank, self._receive(rank, timeout_s))

    @property
    def are_alive(self) -> bool:
        """True until the first rank has ended."""
        return all(process.is_alive() for process in self.processes)

    def _receive(self, rank: int, timeout_s: float) -> tuple[bool, Any]:
        if not self._pipes[rank].poll(timeout_s):
            raise TimeoutError(f"rank {rank} gave no result in {timeout_s} s")
        return self._pipes[rank].recv()

    def kill(self) -> None:
        """End the ranks that still live."""
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
            process.join()


def _value(rank: int, outcome: tuple[bool, Any]) -> Any:
    is_good, value = outcome
    if not is_good:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(*arguments)` on every rank."""
    return Ranks(world_size, function, *arguments).results()
