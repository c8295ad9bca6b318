"""The manifest of a dataset: its tokenizer, its shards and where their blocks lie.

A dataset is a directory, here or at `https://` or `s3://`, with `manifest.json`, `tokenizer/` and shards. The
manifest is written last, so its presence says that the dataset is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from albert.addresses import check_address, file_address, is_remote
from albert.blocks import FORMAT_VERSION
from albert.durable_files import write_file_durably
from albert.errors import DataError, MissingInputError
from albert.remote import Patience, fetch
from albert.shard_cache import CacheOptions, ShardCache

MANIFEST_NAME = "manifest.json"

_MANIFEST_PATIENCE = Patience(deadline_s=60.0)
"""Shorter than for shards: a mistyped address shows here."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerEntry(_Model):
    """Which tokenizer made the ids; a copy lies in the dataset."""

    kind: str
    file: str
    sha256: str
    vocab_size: int


class BlockEntry(_Model):
    """Where one block lies in its shard."""

    offset: int
    length: int
    examples: int
    crc32: int


class ShardEntry(_Model):
    """One shard file: how to verify it, and its blocks."""

    name: str
    split: str
    bytes: int
    sha256: str
    examples: int
    tokens: int
    blocks: tuple[BlockEntry, ...]


class Manifest(_Model):
    """What a dataset holds and how it was made."""

    format_version: int
    tokenizer: TokenizerEntry
    settings: dict[str, Any]
    totals: dict[str, Any]
    shards: tuple[ShardEntry, ...]

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """Shards of one split, `train` or `eval`."""
        return tuple(shard for shard in self.shards if shard.split == name)

    @property
    def max_seq_length(self) -> int:
        """Longest example that the dataset can hold, in tokens."""
        return int(self.settings["max_seq_length"])

    @property
    def sha256(self) -> str:
        """Identity of the dataset: the hash of its canonical manifest."""
        return hashlib.sha256(manifest_bytes(self)).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON; blocks are rows `[offset, length, examples, crc32]`, one shard per line."""
    head = manifest.model_dump(exclude={"shards"})
    lines = []
    for shard in manifest.shards:
        entry = shard.model_dump(exclude={"blocks"})
        entry["blocks"] = [[b.offset, b.length, b.examples, b.crc32] for b in shard.blocks]
        lines.append(json.dumps(entry, sort_keys=True, ensure_ascii=False))
    text = json.dumps(head, sort_keys=True, ensure_ascii=False, indent=1)
    return (text[:-2] + ',\n "shards": [\n' + ",\n".join(lines) + "\n ]\n}\n").encode()


def read_manifest(directory: Path | str) -> Manifest:
    """Read and check `manifest.json` of a dataset, a local directory or an address.

    Raises:
        MissingInputError: there is no manifest (not a dataset, or its build did not finish).
        DataError: the manifest is damaged or of another format version, or cannot be fetched.
        UnsafeError, ConfigError: see `albert.addresses.check_address`.
    """
    path = f"{directory}/{MANIFEST_NAME}"
    content = (
        _fetch_manifest(str(directory)) if is_remote(directory) else _read_local_manifest(Path(directory))
    )
    try:
        raw = json.loads(content)
        if raw["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: shard format {raw['format_version']}, this program reads {FORMAT_VERSION}; "
                "build the dataset again"
            )
        for shard in raw["shards"]:
            shard["blocks"] = [dict(zip(BlockEntry.model_fields, b, strict=True)) for b in shard["blocks"]]
        return Manifest.model_validate(raw)
    except (
        KeyError,
        TypeError,
        ValidationError,
        json.JSONDecodeError,
        UnicodeDecodeError,
    ) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged manifest ({reason}); build the dataset again") from error


def _read_local_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise MissingInputError(
            f"{directory}: no {MANIFEST_NAME}; this is not a finished dataset, "
            "run `python -m data_prep build --output` on it"
        )
    return path.read_bytes()


def _fetch_manifest(address: str) -> bytes:
    """Complete copies only: JSON that ends early is no JSON."""
    check_address(address)
    content = io.BytesIO()
    fetch(file_address(address, MANIFEST_NAME), content, None, _is_json, _MANIFEST_PATIENCE)
    return content.getvalue()


def _is_json(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        json.load(file)
    except ValueError:
        return False
    return True


def dataset_tokenizer(directory: Path | str, manifest: Manifest, cache: CacheOptions | None = None) -> Path:
    """The dataset's own tokenizer file; of a remote dataset, a verified copy in the cache.

    Raises:
        MissingInputError, DataError, DiskError: a remote one cannot be copied.
    """
    entry = manifest.tokenizer
    if is_remote(directory):
        return ShardCache(str(directory), cache or CacheOptions()).tokenizer(entry.file, entry.sha256)
    return Path(directory) / entry.file


def check_tokenizer(file: Path, manifest: Manifest) -> None:
    """Compare the dataset's own tokenizer file, which is copied beside every model, with the manifest.

    Raises:
        MissingInputError: it is missing.
        DataError: it differs.
    """
    if not file.is_file():
        raise MissingInputError(f"{file}: the dataset's tokenizer is missing; copy the dataset again")
    if hashlib.sha256(file.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
        raise DataError(f"{file}: is not the tokenizer that the manifest names; copy the dataset again")


def check_files(directory: Path | str, manifest: Manifest) -> None:
    """Compare the files of a dataset with its manifest as far as that is quick: shards by size, and the tokenizer.

    Those of a remote dataset are compared when they are copied.

    Raises:
        MissingInputError: files are missing; names the first one and how many.
        DataError: likewise of shards that have another size; or the tokenizer differs.
    """
    if is_remote(directory):
        return
    directory = Path(directory)
    check_tokenizer(directory / manifest.tokenizer.file, manifest)
    sizes = {shard.name: _size(directory / shard.name) for shard in manifest.shards}
    if missing := [name for name, size in sizes.items() if size is None]:
        raise MissingInputError(
            f"{directory / missing[0]}: shard is missing, {len(missing)} of the manifest's {len(sizes)} are; "
            "copy the dataset again"
        )
    if wrong := [shard for shard in manifest.shards if sizes[shard.name] != shard.bytes]:
        raise DataError(
            f"{directory / wrong[0].name}: {sizes[wrong[0].name]} bytes, the manifest says {wrong[0].bytes}; "
            f"{len(wrong)} of {len(sizes)} shards have another size, copy the dataset again"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest durably; its presence says that the dataset is complete."""
    write_file_durably(directory / MANIFEST_NAME, [manifest_bytes(manifest)])
