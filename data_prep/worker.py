"""One task: its part of the corpus becomes its shards. A pure function of settings, tokenizer and bytes."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albert.blocks import Block
from albert.durable_files import write_file_durably
from albert.manifest import ShardEntry
from albert.masking import example_keys
from albert.shards import write_shard
from albert.tokenization import Tokenizer, load_tokenizer
from data_prep.chinese import WordFinder
from data_prep.corpus import DocumentBatch, read_documents
from data_prep.dedup import signature, signature_size
from data_prep.examples import ExampleMaker
from data_prep.plan import Task
from data_prep.segments import TokenizedDocuments
from data_prep.settings import BuildSettings
from data_prep.work_directory import TaskRecord, repeated_path, signature_path

POOL_TOKENS = 1 << 20
"""Tokens that are paired and masked together. Large enough for numpy, small enough for the cache and the memory."""
SPLITS = ("train", "eval")


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
    word_starts: list[NDArray[np.bool_]] = field(default_factory=list)
    sentence_lengths: list[NDArray[np.int32]] = field(default_factory=list)
    document_sizes: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: int = 0
    flushes: int = 0

    def take(self) -> TokenizedDocuments:
        """All documents of the pool, which is empty afterwards."""
        documents = TokenizedDocuments(
            np.concatenate(self.ids),
            _ends(np.concatenate(self.sentence_lengths)),
            _ends(np.concatenate(self.document_sizes)),
            np.concatenate(self.word_starts) if self.word_starts else None,
        )
        self.ids, self.word_starts, self.sentence_lengths, self.document_sizes = [], [], [], []
        self.tokens = 0
        self.flushes += 1
        return documents


def _ends(sizes: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def document_hash(sentences: list[str]) -> int:
    """64-bit hash of a document's text; decides which side of the held-out split it is on."""
    text = "\n".join(sentences).encode("utf-8", errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def document_hashes(batch: DocumentBatch) -> NDArray[np.uint64]:
    """[documents] `document_hash` of each."""
    ranges = pairwise(batch.ends)
    return np.array([document_hash(batch.sentences[a:b]) for a, b in ranges], np.uint64)


@dataclass(frozen=True)
class _Sentences:
    """A batch of documents, tokenised."""

    ids: NDArray[Any]
    """[tokens]"""
    lengths: NDArray[np.int32]
    """[sentences]"""
    document_ends: NDArray[np.int64]
    """[documents + 1] sentence indices"""
    word_starts: NDArray[np.bool_] | None
    """[tokens] from a segmenter, None where the pieces say it"""

    @property
    def token_ends(self) -> NDArray[np.int64]:
        """[sentences + 1] token offsets."""
        return _ends(self.lengths)


class Worker:
    """Runs tasks one after the other in this process."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None) -> None:
        """Load the tokenizer, unless there is one already."""
        self.job = job
        self.tokenizer = tokenizer or load_tokenizer(job.tokenizer)
        self.maker = ExampleMaker.of(job.settings, self.tokenizer)
        self._word_finder: WordFinder | None = None

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

    def sign(self, task: Task) -> TaskRecord:
        """Write the signatures of a task's documents, for --dedup."""
        near = self.job.settings.dedup == "near"
        parts = [np.zeros((0, signature_size(near)), np.uint64)]
        for part in task.parts:
            for batch in read_documents(part, self.job.settings, Counter()):
                documents = zip(pairwise(batch.ends), document_hashes(batch).tolist(), strict=True)
                rows = [signature(batch.sentences[a:b], text_hash, near) for (a, b), text_hash in documents]
                parts.append(np.array(rows, np.uint64).reshape(len(rows), signature_size(near)))
        everything = np.concatenate(parts)
        data = io.BytesIO()
        np.save(data, everything, allow_pickle=False)
        write_file_durably(signature_path(self.job.output, task.index), [data.getvalue()])
        return TaskRecord(
            task=task.index, input_bytes=task.bytes, counts={"documents_in": len(everything)}, shards=()
        )

    def _train_blocks(
        self, task: Task, pools: dict[str, _Pool], held_out: list[Block], counts: Counter[str]
    ) -> Iterator[Block]:
        """Blocks of the train split as the text streams by; those of the eval split gather in `held_out`."""
        repeated = np.zeros(0, np.bool_)
        if self.job.settings.dedup != "none":
            repeated = np.load(repeated_path(self.job.output, task.index), allow_pickle=False)
        seen = 0
        for part in task.parts:
            for batch in read_documents(part, self.job.settings, counts):
                if len(batch.ends) > 1:
                    dropped = repeated[seen : seen + len(batch.ends) - 1]
                    seen += len(batch.ends) - 1
                    self._add_documents(batch, dropped, part.source.weight, pools, counts)
                if pools["eval"].tokens >= POOL_TOKENS:
                    held_out += self._flush("eval", task, pools["eval"], counts)
                if pools["train"].tokens >= POOL_TOKENS:
                    yield from self._flush("train", task, pools["train"], counts)
        yield from self._flush("train", task, pools["train"], counts)

    def _add_documents(
        self,
        batch: DocumentBatch,
        repeated: NDArray[np.bool_],
        weight: float,
        pools: dict[str, _Pool],
        counts: Counter[str],
    ) -> None:
        """Tokenise a batch and put its documents into the pools of their splits."""
        ids, lengths = self.tokenizer.encode_flat(batch.sentences)
        sentences = _Sentences(ids, lengths, np.array(batch.ends), self._words(ids, lengths))
        tokens = np.diff(sentences.token_ends[sentences.document_ends])
        usable = np.ones(len(tokens), np.bool_)
        for reason, bad in (
            ("empty", tokens == 0),
            ("too_short", tokens < self.job.settings.min_document_tokens),
            ("repeated", repeated if len(repeated) else ~usable),
        ):
            counts[f"rejected.{reason}"] += int((bad & usable).sum())
            usable &= ~bad
        held_out, times = self._choose(batch, weight)
        counts["rejected.weight"] += int((usable & ~held_out & (times == 0)).sum())
        self._add("eval", sentences, usable & held_out, pools, counts)
        for time in range(int(times.max())):
            chosen = usable & ~held_out & (times > time)
            self._add("train" if time == 0 else "again", sentences, chosen, pools, counts)

    def _words(self, ids: NDArray[Any], lengths: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        if self.job.settings.whole_words != "jieba":
            return None
        if self._word_finder is None:
            self._word_finder = WordFinder(self.tokenizer)
        return self._word_finder.word_starts(ids, lengths)

    def _choose(self, batch: DocumentBatch, weight: float) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """[documents] whether each is held out, and how often it is used if not; by the hash of its text."""
        number = len(batch.ends) - 1
        if self.job.eval_threshold == 0 and weight == 1.0:
            return np.zeros(number, np.bool_), np.ones(number, np.int64)
        hashes = document_hashes(batch)
        # Other bits than those of the split: what is left out must not depend on what is held out.
        share = (example_keys(hashes) >> np.uint64(11)).astype(np.float64) / 2.0**53
        times = (int(weight) + (share < weight % 1)).astype(np.int64)
        return hashes < self.job.eval_threshold, times

    def _add(
        self,
        role: str,
        sentences: _Sentences,
        chosen: NDArray[np.bool_],
        pools: dict[str, _Pool],
        counts: Counter[str],
    ) -> None:
        """Put the chosen documents into a pool; role `again` is for those that are there already."""
        if not chosen.any():
            return
        pool = pools["eval" if role == "eval" else "train"]
        in_sentences = np.repeat(chosen, np.diff(sentences.document_ends)) & (sentences.lengths > 0)
        document = np.repeat(np.arange(len(chosen)), np.diff(sentences.document_ends))[in_sentences]
        sizes = np.bincount(document, minlength=len(chosen))[chosen]
        in_tokens = slice(None) if chosen.all() else np.repeat(in_sentences, sentences.lengths)
        pool.ids.append(sentences.ids[in_tokens])
        pool.sentence_lengths.append(sentences.lengths[in_sentences])
        pool.document_sizes.append(sizes)
        pool.tokens += len(pool.ids[-1])
        if sentences.word_starts is not None:
            pool.word_starts.append(sentences.word_starts[in_tokens])
        if role == "again":
            counts["train.repeated_documents"] += len(sizes)
            return
        counts[f"{role}.documents"] += len(sizes)
        counts[f"{role}.sentences"] += int(sizes.sum())
        counts[f"{role}.one_sentence_documents"] += int((sizes == 1).sum())

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
