"""Verify a finished dataset against its manifest, byte by byte."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from albert.addresses import is_remote
from albert.manifest import Manifest, check_tokenizer, dataset_tokenizer, read_manifest
from albert.shard_cache import CacheOptions
from albert.shards import verify_shard
from data_prep.parallel import process_pool
from data_prep.progress import progress_bar


def verify_dataset(directory: Path | str, num_workers: int = 1) -> Manifest:
    """Verify the manifest, the tokenizer copy and every byte of every shard.

    A remote dataset is read through a temporary cache of one shard for each worker: what lies there now counts, not
    older copies.

    Args:
        directory: of the dataset, or its address.
        num_workers: processes that verify shards at the same time.

    Raises:
        MissingInputError: something is gone.
        DataError: something differs; names shard and block.
        PeerLostError: a worker was killed.
    """
    manifest = read_manifest(directory)
    if not is_remote(directory):
        _verify(directory, manifest, CacheOptions(), num_workers)
        return manifest
    with tempfile.TemporaryDirectory(prefix="albert-verify-") as cache:
        largest = max((shard.bytes for shard in manifest.shards), default=0)
        _verify(directory, manifest, CacheOptions(Path(cache), largest * num_workers), num_workers)
    return manifest


def _verify(directory: Path | str, manifest: Manifest, cache: CacheOptions, num_workers: int) -> None:
    check_tokenizer(dataset_tokenizer(directory, manifest, cache), manifest)
    with progress_bar("verify", sum(shard.bytes for shard in manifest.shards)) as bar:
        verified = _verify_shards(directory, manifest, cache, min(num_workers, len(manifest.shards)))
        for shard, _ in zip(manifest.shards, verified, strict=True):
            bar.update(shard.bytes)


def _verify_shards(
    directory: Path | str, manifest: Manifest, cache: CacheOptions, num_workers: int
) -> Iterator[None]:
    """Verify the shards in their order; several processes look ahead."""
    verify = partial(verify_shard, directory, vocab_size=manifest.tokenizer.vocab_size, cache=cache)
    if num_workers < 2:
        yield from map(verify, manifest.shards)
        return
    with process_pool(num_workers) as pool:
        yield from pool.map(verify, manifest.shards)
