"""Verify a finished dataset against its manifest, byte by byte."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from albert.addresses import is_remote
from albert.errors import DataError, MissingInputError
from albert.shard_cache import CacheOptions
from albert.shards import Manifest, dataset_tokenizer, read_manifest, verify_shard


def verify_dataset(directory: Path | str) -> Manifest:
    """Verify the manifest, the tokenizer copy and every byte of every shard.

    A remote dataset is read through a temporary cache of one shard: what lies there now counts, not older copies.

    Raises:
        MissingInputError: something is gone.
        DataError: something differs; names shard and block.
    """
    manifest = read_manifest(directory)
    if not is_remote(directory):
        _verify(directory, manifest, CacheOptions())
        return manifest
    with tempfile.TemporaryDirectory(prefix="albert-verify-") as cache:
        largest = max((shard.bytes for shard in manifest.shards), default=0)
        _verify(directory, manifest, CacheOptions(Path(cache), largest))
    return manifest


def _verify(directory: Path | str, manifest: Manifest, cache: CacheOptions) -> None:
    file = dataset_tokenizer(directory, manifest, cache)
    if not file.is_file():
        raise MissingInputError(f"{file}: the dataset's tokenizer is missing; copy the dataset again")
    if hashlib.sha256(file.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
        raise DataError(f"{file}: is not the tokenizer that the manifest names; copy the dataset again")
    for shard in manifest.shards:
        verify_shard(directory, shard, manifest.tokenizer.vocab_size, cache)
