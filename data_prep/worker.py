"""One task: its part of the corpus becomes its shards. A pure function of settings, tokenizer and bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from albert.shards import Block, ShardEntry, write_shard
from albert.tokenization import Tokenizer, load_tokenizer
from data_prep.corpus import DocumentBatch, read_documents
from data_prep.examples import ExampleMaker
from data_prep.plan import Task
from data_prep.segments import TokenizedDocuments
from data_prep.settings import BuildSettings

POOL_TOKENS = 1 << 20
"""Tokens that are paired and masked together. Large enough for numpy, small enough for the cache and the memory."""
SPLITS = ("train", "eval")


class TaskRecord(BaseModel):
    """What a finished task left behind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: int
    input_bytes: int
    counts: dict[str, int]
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; travels to processes and nodes."""

    settings: BuildSettings
    tokenizer: str
    output: str
    eval_threshold: int
    """Documents whose 64-bit hash is below are held out"""


@dataclass
class _Pool:
    """Tokenised documents that wait until there are enough of them."""

    ids: list[NDArray[Any]] = field(default_factory=list)
    sentence_lengths: list[NDArray[np.int32]] = field(default_factory=list)
    document_sizes: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: int = 0
    flushes: int = 0

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int32], sizes: NDArray[np.int64]) -> None:
        """Append documents: tokens, tokens per sentence, sentences per document."""
        self.ids.append(ids)
        self.sentence_lengths.append(lengths)
        self.document_sizes.append(sizes)
        self.tokens += len(ids)

    def take(self) -> TokenizedDocuments:
        """All documents of the pool, which is empty afterwards."""
        documents = TokenizedDocuments(
            np.concatenate(self.ids),
            _ends(np.concatenate(self.sentence_lengths)),
            _ends(np.concatenate(self.document_sizes)),
        )
        self.ids, self.sentence_lengths, self.document_sizes, self.tokens = [], [], [], 0
        self.flushes += 1
        return documents


def _ends(sizes: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def document_hash(sentences: list[str]) -> int:
    """64-bit hash of a document's text; decides which side of the held-out split it is on."""
    text = "\n".join(sentences).encode("utf-8", errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Worker:
    """Runs tasks one after the other in this process."""

    def __init__(self, job: Job) -> None:
        """Load the tokenizer once."""
        self.job = job
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer)
        self.maker = ExampleMaker.of(job.settings, self.tokenizer)

    def run(self, task: Task) -> TaskRecord:
        """Write the shards of a task; returns its record."""
        counts: Counter[str] = Counter()
        pools = {split: _Pool() for split in SPLITS}
        held_out: list[Block] = []
        train = self._train_blocks(task, pools, held_out, counts)
        shards = [self._write("train", task, train, counts)]
        held_out += self._flush("eval", task, pools["eval"], counts)
        shards.append(self._write("eval", task, iter(held_out), counts))
        return TaskRecord(
            task=task.index,
            input_bytes=task.bytes,
            counts={key: value for key, value in sorted(counts.items()) if value},
            shards=tuple(shard for shard in shards if shard),
        )

    def _train_blocks(
        self, task: Task, pools: dict[str, _Pool], held_out: list[Block], counts: Counter[str]
    ) -> Iterator[Block]:
        """Blocks of the train split as the text streams by; those of the eval split gather in `held_out`."""
        for part in task.parts:
            for batch in read_documents(part, self.job.settings, counts):
                if len(batch.ends) > 1:
                    self._add_documents(batch, pools, counts)
                if pools["eval"].tokens >= POOL_TOKENS:
                    held_out += self._flush("eval", task, pools["eval"], counts)
                if pools["train"].tokens >= POOL_TOKENS:
                    yield from self._flush("train", task, pools["train"], counts)
        yield from self._flush("train", task, pools["train"], counts)

    def _add_documents(self, batch: DocumentBatch, pools: dict[str, _Pool], counts: Counter[str]) -> None:
        """Tokenise a batch and put its documents into the pools of their splits."""
        ids, lengths = self.tokenizer.encode_flat(batch.sentences)
        ends = np.array(batch.ends)
        tokens = _ends(lengths)[ends]
        short = np.diff(tokens) < self.job.settings.min_document_tokens
        counts["rejected.empty"] += int((np.diff(tokens) == 0).sum())
        counts["rejected.too_short"] += int((short & (np.diff(tokens) > 0)).sum())
        held_out = self._held_out(batch)
        for split, chosen in (("train", ~short & ~held_out), ("eval", ~short & held_out)):
            in_sentences = np.repeat(chosen, np.diff(ends)) & (lengths > 0)
            if not chosen.any():
                continue
            everything = bool(chosen.all())
            kept = ids if everything else ids[np.repeat(chosen, np.diff(tokens))]
            document = np.repeat(np.arange(len(chosen)), np.diff(ends))[in_sentences]
            sizes = np.bincount(document, minlength=len(chosen))[chosen]
            pools[split].add(kept, lengths[in_sentences], sizes)
            counts[f"{split}.documents"] += int(chosen.sum())
            counts[f"{split}.sentences"] += int(sizes.sum())
            counts[f"{split}.one_sentence_documents"] += int((sizes == 1).sum())

    def _held_out(self, batch: DocumentBatch) -> NDArray[np.bool_]:
        """[documents] whether each belongs to the eval split."""
        threshold = self.job.eval_threshold
        if threshold == 0:
            return np.zeros(len(batch.ends) - 1, np.bool_)
        ranges = pairwise(batch.ends)
        return np.array([document_hash(batch.sentences[a:b]) < threshold for a, b in ranges])

    def _flush(self, split: str, task: Task, pool: _Pool, counts: Counter[str]) -> Iterator[Block]:
        """Examples of everything in a pool, once for each copy."""
        if not pool.tokens:
            return
        # Few tokens: several copies at once, since numpy wants long arrays.
        together = max(1, POOL_TOKENS // pool.tokens)
        documents = pool.take()
        num_copies = self.job.settings.dupe_factor
        for first in range(0, num_copies, together):
            copies = range(first, min(first + together, num_copies))
            coordinates = (SPLITS.index(split), task.index, pool.flushes)
            yield from self.maker.make_blocks(documents, coordinates, copies, counts)

    def _write(
        self, split: str, task: Task, blocks: Iterator[Block], counts: Counter[str]
    ) -> ShardEntry | None:
        """Write a shard unless there is nothing to write."""
        first = next(blocks, None)
        if first is None:
            return None

        def counted() -> Iterator[Block]:
            block: Block | None = first
            while block is not None:
                _count(block, split, counts)
                yield block
                block = next(blocks, None)

        return write_shard(Path(self.job.output), f"{split}-{task.index:05d}.tar", split, counted())


def _count(block: Block, split: str, counts: Counter[str]) -> None:
    counts[f"{split}.examples"] += block.num_examples
    counts[f"{split}.tokens"] += len(block.input_ids)
    counts[f"{split}.masked_tokens"] += len(block.masked_lm_labels)
    counts[f"{split}.pairs_in_order"] += int((block.sentence_order_labels == 0).sum())
    counts[f"{split}.pairs_swapped"] += int((block.sentence_order_labels == 1).sum())
    counts[f"{split}.single_segments"] += int((block.sentence_order_labels < 0).sum())
