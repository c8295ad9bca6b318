"""Verify a finished dataset against its manifest, byte by byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

from albert.errors import DataError, MissingInputError
from albert.shards import Manifest, read_manifest, verify_shard


def verify_dataset(directory: Path) -> Manifest:
    """Verify the manifest, the tokenizer copy and every byte of every shard.

    Raises:
        MissingInputError: something is gone.
        DataError: something differs; names shard and block.
    """
    manifest = read_manifest(directory)
    file = directory / manifest.tokenizer.file
    if not file.is_file():
        raise MissingInputError(f"{file}: the dataset's tokenizer is missing; copy the dataset again")
    if hashlib.sha256(file.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
        raise DataError(f"{file}: is not the tokenizer that the manifest names; copy the dataset again")
    for shard in manifest.shards:
        verify_shard(directory, shard, manifest.tokenizer.vocab_size)
    return manifest
