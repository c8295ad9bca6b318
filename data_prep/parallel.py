"""Who runs the tasks: this process, several processes, or the ranks of an MPI job. Results come as they finish."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal

from albert.errors import AlbertError, ConfigError, PeerLostError
from data_prep.plan import Task
from data_prep.work_directory import TaskRecord
from data_prep.worker import Job, Worker

_POLL_S = 0.005
_WORKER: list[Worker] = []
"""The worker of this process, if it is one of a pool."""


Step = Literal["run", "sign"]
"""The method of `Worker` that is applied to tasks"""


def run_here(worker: Worker, step: Step, tasks: Sequence[Task]) -> Iterator[TaskRecord]:
    """Run tasks in this process."""
    for task in tasks:
        yield _apply(worker, step, task)


def _apply(worker: Worker, step: Step, task: Task) -> TaskRecord:
    return worker.run(task) if step == "run" else worker.sign(task)


def run_processes(job: Job, step: Step, tasks: Sequence[Task], num_workers: int) -> Iterator[TaskRecord]:
    """Run tasks in `num_workers` processes, each taking the next task when it has finished one.

    Raises:
        PeerLostError: a worker was killed.
    """
    waiting = iter(tasks)
    running: set[Future[TaskRecord]] = set()
    with process_pool(num_workers, _start_worker, job) as pool:
        while True:
            while len(running) < 2 * num_workers and (task := next(waiting, None)) is not None:
                running.add(pool.submit(_run_task, step, task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


@contextmanager
def process_pool(
    num_workers: int, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one and leave Ctrl-C to it; each begins with `start(*arguments)`.

    Raises:
        PeerLostError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_join, initargs=(start, arguments))
    try:
        yield pool
    except BrokenProcessPool:
        raise PeerLostError(
            "a worker process was killed (out of memory?); run the same command again to go on, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _join(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if start:
        start(*arguments)


def _exit_with_parent() -> None:
    """A worker must not outlive a killed parent: it would write beside the run that continues."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(job: Job) -> None:
    _WORKER.append(Worker(job))


def _run_task(step: Step, task: Task) -> TaskRecord:
    return _apply(_WORKER[0], step, task)


def mpi_communicator() -> Any:
    """MPI's world communicator.

    Raises:
        ConfigError: mpi4py or an MPI library is missing; says how to get them.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"--mpi: MPI cannot be loaded ({error}); `pip install mpi4py mpich` is enough, "
            "or load the cluster's MPI module and `pip install mpi4py`"
        ) from error
    return MPI.COMM_WORLD


def run_mpi(comm: Any, job: Job, step: Step, tasks: Sequence[Task]) -> Iterator[TaskRecord]:
    """On rank 0: hand out tasks to the other ranks, the next one to whoever is free. Alone, it works itself."""
    comm.bcast((job, step))
    if comm.size == 1:
        yield from run_here(Worker(job), step, tasks)
        return
    waiting = iter(tasks)
    idle = 0
    while idle < comm.size - 1:
        # A blocking receive keeps a core busy; looking 200 times a second does not.
        while not comm.iprobe():
            time.sleep(_POLL_S)
        source, answer = comm.recv()
        if isinstance(answer, Exception):
            raise answer
        task = next(waiting, None)
        comm.send(task, dest=source)
        idle += task is None
        if answer is not None:
            yield answer


def end_mpi(comm: Any) -> None:
    """On rank 0: tell the other ranks that nothing more will come."""
    comm.bcast(None)


def serve_mpi(comm: Any) -> None:
    """On the other ranks: do what rank 0 says until it says that nothing more will come."""
    while (order := comm.bcast(None)) is not None:
        job, step = order
        _serve_step(comm, Worker(job), step)


def _serve_step(comm: Any, worker: Worker, step: Step) -> None:
    """Ask rank 0 for tasks until there are none."""
    answer: TaskRecord | Exception | None = None
    while True:
        comm.send((comm.rank, answer), dest=0)
        while not comm.iprobe(source=0):
            time.sleep(_POLL_S)
        task = comm.recv(source=0)
        if task is None:
            return
        try:
            answer = _apply(worker, step, task)
        except (AlbertError, OSError) as error:
            answer = error  # rank 0 says it
