"""The build: check everything, plan tasks, run those that are not done, write the manifest.

Killed anywhere, the same command goes on: each finished task has a record in a hidden directory inside the output,
which disappears when the manifest is written.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from albert.errors import ConfigError, MissingInputError
from albert.manifest import FORMAT_VERSION, Manifest, TokenizerEntry, write_manifest
from albert.shards import write_file_durably
from albert.tokenization import SENTENCEPIECE_FILE, WORDPIECE_FILE, Tokenizer, load_tokenizer
from data_prep.chinese import load_segmenter
from data_prep.corpus import read_documents, reading_advice
from data_prep.dedup import repeated_documents
from data_prep.parallel import Step, end_mpi, run_here, run_mpi, run_processes, serve_mpi
from data_prep.plan import Source, Task, find_sources, plan_tasks
from data_prep.progress import progress_bar
from data_prep.settings import BuildSettings
from data_prep.work_directory import (
    TaskRecord,
    begin_part,
    finished_manifest,
    locked_work_directory,
    read_records,
    remove_leftovers,
    repeated_path,
    save_record,
    shared_work_directory,
    signature_path,
)
from data_prep.worker import Job, Worker, document_hash

_SMALL_CORPUS_BYTES = 16 << 20
"""Up to this size every document is hashed beforehand, so that the held-out split is not left empty by chance."""
_MIN_HELD_OUT_CHARACTERS, _MANY_SHORT_DOCUMENTS = 200, 20


@dataclass(frozen=True)
class BuildRequest:
    """A build as the user asks for it."""

    inputs: tuple[str, ...]
    tokenizer: str
    output: str
    settings: BuildSettings
    weights: tuple[str, ...] = ()
    num_workers: int = 1


def build(request: BuildRequest, comm: Any = None) -> Manifest | None:
    """Build a dataset, or go on with one that was interrupted.

    Args:
        request: what to build.
        comm: MPI communicator whose ranks do the work; None for processes on this machine.

    Returns:
        The manifest; None on ranks other than 0.

    Raises:
        MissingInputError: an input or the tokenizer does not exist, or the corpus holds no usable document.
        ConfigError: the settings do not fit each other or the output directory.
        UnsafeError: the output directory holds something else.
    """
    if comm is not None and comm.rank > 0:
        serve_mpi(comm)
        return None
    manifest = _build(request, comm)
    if comm is not None:
        end_mpi(comm)
    return manifest


def _build(request: BuildRequest, comm: Any) -> Manifest:
    output = Path(request.output)
    tokenizer, sources, tasks, description = _plan(request)
    if (finished := finished_manifest(output, description)) is not None:
        return finished
    with locked_work_directory(output, description, sources) as work:
        job = Job(
            request.settings,
            str(_copy_tokenizer(tokenizer, output)),
            str(output),
            _eval_threshold(tasks, request.settings),
        )
        records = read_records(work)
        if request.settings.dedup != "none":
            _find_repeated(job, tokenizer, tasks, request.num_workers, comm)
        todo = [task for task in tasks if task.index not in records]
        results = _run(job, tokenizer, "run", todo, request.num_workers, comm)
        for record in _progress("build", results, tasks, records):
            save_record(work, record)
            records[record.task] = record
        manifest = _assemble([records[task.index] for task in tasks], tokenizer, description)
        if not manifest.totals.get("train.examples"):
            _refuse_nothing(output, manifest, request.settings)
        remove_leftovers(output)
        write_manifest(output, manifest)
    shutil.rmtree(work)
    return manifest


def build_part(request: BuildRequest, index: int, count: int) -> None:
    """Do one of `count` parts of a build, while others do theirs on the same disk; `build` then finishes it.

    Every `count`-th task belongs to a part, so that the parts need no word from each other, and one that is started
    again does what is missing of it. A job array of Slurm and the hosts of `launcher hosts` work in this way.

    Args:
        request: the same for every part, and for the `build` that writes the manifest.
        index: from 0.
        count: of parts.

    Raises:
        ConfigError: --dedup, which has to see all documents before the first task; or as `build`.
        MissingInputError, UnsafeError: as `build`.
    """
    if request.settings.dedup != "none":
        raise ConfigError(
            "--dedup: compares all documents, so parts cannot work alone; use --mpi or --workers"
        )
    output = Path(request.output)
    tokenizer, sources, tasks, description = _plan(request)
    if finished_manifest(output, description) is not None:
        return
    with shared_work_directory(output, index, count) as work:
        with begin_part(work, description, sources):
            copy = _copy_tokenizer(tokenizer, output)
        job = Job(request.settings, str(copy), str(output), _eval_threshold(tasks, request.settings))
        mine = tasks[index::count]
        done = {task: record for task, record in read_records(work).items() if task % count == index}
        todo = [task for task in mine if task.index not in done]
        results = _run(job, tokenizer, "run", todo, request.num_workers, None)
        for record in _progress(f"part {index}/{count}", results, mine, done):
            save_record(work, record)


def _plan(
    request: BuildRequest,
) -> tuple[Tokenizer, tuple[Source, ...], tuple[Task, ...], dict[str, Any]]:
    """Check what is asked for, and cut it into tasks; the last value describes all that decides the bytes."""
    tokenizer = load_tokenizer(request.tokenizer)
    if request.settings.whole_words == "jieba":
        load_segmenter()
    sources = find_sources(request.inputs, request.weights, request.settings)
    return tokenizer, sources, plan_tasks(sources, request.settings), _describe(request, sources, tokenizer)


def _refuse_nothing(output: Path, manifest: Manifest, settings: BuildSettings) -> None:
    """Remove a dataset without a training example.

    Raises:
        MissingInputError: always; says what became of the documents.
    """
    shutil.rmtree(output)
    totals = manifest.totals
    rejected = {k.removeprefix("rejected."): v for k, v in totals.items() if k.startswith("rejected.")}
    raise MissingInputError(
        f"the input yields no training example: {totals.get('documents_in', 0)} documents, "
        f"rejected {rejected or 'none'}, held out {totals.get('eval.documents', 0)}"
        f"{reading_advice(totals, settings)}"
    )


def _run(
    job: Job, tokenizer: Tokenizer, step: Step, tasks: Sequence[Task], num_workers: int, comm: Any
) -> Iterator[TaskRecord]:
    if comm is not None:
        return run_mpi(comm, job, step, tasks)
    if num_workers == 1 or len(tasks) < 2:
        return run_here(Worker(job, tokenizer), step, tasks)
    return run_processes(job, step, tasks, min(num_workers, len(tasks)))


def _find_repeated(
    job: Job, tokenizer: Tokenizer, tasks: Sequence[Task], num_workers: int, comm: Any
) -> None:
    """Sign all documents, decide which of them repeat an earlier one, and leave the answer to the tasks."""
    todo = [task for task in tasks if not signature_path(job.output, task.index).is_file()]
    for _ in _progress("dedup", _run(job, tokenizer, "sign", todo, num_workers, comm), todo, {}):
        pass
    parts = [
        np.load(signature_path(job.output, task.index), mmap_mode="r", allow_pickle=False) for task in tasks
    ]
    ends = [0, *np.cumsum([len(part) for part in parts]).tolist()]
    width = max((part.shape[1] for part in parts), default=1)
    with tempfile.TemporaryFile(dir=job.output) as file:  # on disk: 64 hashes of each document
        everything = np.memmap(file, np.uint64, "w+", shape=(width, max(ends[-1], 1)))
        for part, (begin, end) in zip(parts, pairwise(ends), strict=True):
            everything[:, begin:end] = part.T
        repeated = repeated_documents(everything[:, : ends[-1]])
    for task, (begin, end) in zip(tasks, pairwise(ends), strict=True):
        data = io.BytesIO()
        np.save(data, repeated[begin:end], allow_pickle=False)
        write_file_durably(repeated_path(job.output, task.index), [data.getvalue()])


def _describe(request: BuildRequest, sources: Sequence[Source], tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings of the manifest: all that decides the bytes. Directories of the inputs do not."""
    inputs = [
        {"file": Path(s.path).name, "format": s.format, "bytes": s.bytes, "weight": s.weight} for s in sources
    ]
    settings = request.settings.model_dump()
    settings["max_predictions_per_seq"] = request.settings.max_predictions
    return {**settings, "inputs": inputs, "tokenizer_sha256": tokenizer.sha256}


def _copy_tokenizer(tokenizer: Tokenizer, output: Path) -> Path:
    name = SENTENCEPIECE_FILE if tokenizer.kind == "sentencepiece" else WORDPIECE_FILE
    copy = output / "tokenizer" / name
    copy.parent.mkdir(exist_ok=True)
    write_file_durably(copy, [tokenizer.path.read_bytes()])
    return copy


def _eval_threshold(tasks: Sequence[Task], settings: BuildSettings) -> int:
    """Documents whose hash is below are held out.

    In a small corpus that would hold out nothing, the document with the smallest hash is: of those that are long
    enough to be worth it, or of many short ones.
    """
    threshold = int(settings.eval_fraction * 2.0**64)
    if threshold == 0 or sum(task.bytes for task in tasks) > _SMALL_CORPUS_BYTES:
        return threshold
    for min_characters, min_documents in ((_MIN_HELD_OUT_CHARACTERS, 1), (0, _MANY_SHORT_DOCUMENTS)):
        number, smallest, largest = 0, 1 << 64, 0
        for value in _document_hashes(tasks, settings, min_characters):
            number, smallest, largest = number + 1, min(smallest, value), max(largest, value)
            if smallest < threshold <= largest:
                return threshold  # something on either side: no need to read on
        if number >= min_documents:
            return max(threshold, smallest + 1) if smallest < largest else threshold
    return threshold


def _document_hashes(tasks: Sequence[Task], settings: BuildSettings, min_characters: int) -> Iterator[int]:
    """Hashes of the documents that have so many characters."""
    for task in tasks:
        for part in task.parts:
            for batch in read_documents(part, settings, Counter()):
                for a, b in pairwise(batch.ends):
                    if sum(map(len, batch.sentences[a:b])) >= min_characters:
                        yield document_hash(batch.sentences[a:b])


def _progress(
    name: str, results: Iterator[TaskRecord], tasks: Sequence[Task], done: dict[int, TaskRecord]
) -> Iterator[TaskRecord]:
    """Results with a progress bar: bytes of input, documents, time left."""
    total = sum(task.bytes for task in tasks)
    documents = sum(record.counts.get("documents_in", 0) for record in done.values())
    initial = sum(record.input_bytes for record in done.values())
    with progress_bar(name, total, initial) as bar:
        for record in results:
            yield record
            documents += record.counts.get("documents_in", 0)
            bar.set_postfix(documents=documents, refresh=False)
            bar.update(record.input_bytes)


def _assemble(records: Sequence[TaskRecord], tokenizer: Tokenizer, description: dict[str, Any]) -> Manifest:
    """The manifest of all tasks, in their order."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.counts)
    name = SENTENCEPIECE_FILE if tokenizer.kind == "sentencepiece" else WORDPIECE_FILE
    shards = [shard for record in records for shard in record.shards]
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=TokenizerEntry(
            kind=tokenizer.kind,
            file=f"tokenizer/{name}",
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
        ),
        settings=description,
        totals=dict(sorted(counts.items())),
        shards=tuple(sorted(shards, key=lambda shard: (shard.split != "train", shard.name))),
    )
