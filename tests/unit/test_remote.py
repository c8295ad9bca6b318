"""Remote datasets: whatever the server does, the bytes are those of the manifest or there is one clear sentence."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from albert import manifest as manifests
from albert import remote
from albert.config import DataConfig, load_run_config
from albert.errors import AlbertError, ConfigError, DataError, DiskError, MissingInputError, UnsafeError
from albert.loader import BatchPlan, TrainLoader
from albert.manifest import dataset_tokenizer, read_manifest
from albert.remote import Patience, fetch
from albert.shard_cache import CacheOptions, ShardCache, default_cache_directory
from albert.shards import ShardReader
from data_prep.show import show_examples
from data_prep.verify import verify_dataset
from tests.faulty_http import ALL_FAULTS, FaultyServer
from tests.synthetic import VOCAB_SIZE, make_dataset

QUICK = Patience(
    connect_s=2, stall_s=0.15, deadline_s=20, first_wait_s=0.001, longest_wait_s=0.01
)  # as the defaults, in milliseconds
SECRET = "hunter2-topsecret"  # noqa: S105


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_files(root: Path, count: int, size: int, seed: int = 0) -> dict[str, bytes]:
    generator = random.Random(seed)
    files = {f"shard-{index}.tar": generator.randbytes(size + index) for index in range(count)}
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
    return files


def options(tmp_path: Path, max_bytes: int = 1 << 30, patience: Patience = QUICK) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", max_bytes, patience)


def fetched(address: str, content: bytes, patience: Patience = QUICK, size: int | None = None) -> bytes:
    target = io.BytesIO()
    fetch(address, target, size or len(content), lambda file: file.getvalue() == content, patience)
    return target.getvalue()


def test_300_requests_with_30_percent_faults_bring_no_wrong_byte(tmp_path):
    files = write_files(tmp_path / "root", 20, 48_000)
    with FaultyServer(tmp_path / "root", share=0.3, seed=5) as server:
        rounds = 0
        while sum(server.requests.values()) < 300:
            cache = ShardCache(server.url, options(tmp_path / str(rounds)))
            for name, content in files.items():
                with cache.open_shard(name, len(content), sha256(content)) as file:
                    assert file.readall() == content
            copies = tmp_path / str(rounds) / "cache" / "shards"
            assert {path.name for path in copies.iterdir()} == {f"{sha256(c)}.tar" for c in files.values()}
            rounds += 1
        injected = server.injected
    assert set(injected) == {*ALL_FAULTS, "none"}
    assert 0.25 < 1 - injected["none"] / injected.total() < 0.35


@pytest.mark.parametrize("fault", ALL_FAULTS)
def test_each_fault_by_itself(tmp_path, fault):
    ((name, content),) = write_files(tmp_path / "root", 1, 300_000).items()
    with FaultyServer(tmp_path / "root") as server:
        needs_range = fault in ("ignore_range", "wrong_range")
        server.script = ["short", fault] if needs_range else [fault]
        assert fetched(f"{server.url}/{name}", content) == content
        ranges = [headers.get("Range") for _, headers in server.headers]
    half = f"bytes={len(content) // 2}-"
    if fault == "reset":
        # A reset also discards what the receiver had not read yet, so the second request may start earlier.
        first, second = ranges
        assert first is None
        assert int(re.fullmatch(r"bytes=(\d+)-", second or "bytes=0-").group(1)) <= len(content) // 2
        return
    expected = {
        "stall": [None, half], "short": [None, half], "wrong_range": [None, half, half],
        "ignore_range": [None, half], "long_length": [None],
        "short_length": [None, f"bytes={len(content) - 7}-"],
    }  # fmt: skip
    assert ranges == expected.get(fault, [None, None])


def test_unsized_files_start_again_after_a_fault(tmp_path):
    content = b'{"a": [1, 2, 3]}'
    (tmp_path / "manifest.json").write_bytes(content)
    target = io.BytesIO()
    with FaultyServer(tmp_path) as server:
        server.script = ["short", "short_length", "reset", "status"]
        fetch(f"{server.url}/manifest.json", target, None, manifests._is_json, QUICK)
        assert all("Range" not in headers for _, headers in server.headers)
    assert target.getvalue() == content


def test_a_loader_over_a_faulty_server_equals_the_local_one(tmp_path, monkeypatch):
    dataset = tmp_path / "dataset"
    make_dataset(dataset)
    monkeypatch.setattr(manifests, "_MANIFEST_PATIENCE", QUICK)
    faults = tuple(fault for fault in ALL_FAULTS if fault not in ("stall",))
    plan = BatchPlan(12, 6, 0, 1, 25)
    with FaultyServer(tmp_path, share=0.3, faults=faults, seed=2) as server:
        steps = []
        for directory in (str(dataset), f"{server.url}/dataset"):
            config = DataConfig(
                directory=directory, num_workers=0, remask=True, cache_directory=str(tmp_path / "cache")
            )
            manifest = read_manifest(directory)
            loader = TrainLoader(config, manifest, plan, seed=3)
            steps.append([batch for step in loader.steps(0, 0) for batch in step])
    for local, distant in zip(*steps, strict=True):
        assert torch.equal(local.sequences.input_ids, distant.sequences.input_ids)
        assert torch.equal(local.masked_lm_indices, distant.masked_lm_indices)
        assert torch.equal(local.masked_lm_labels, distant.masked_lm_labels)
        assert torch.equal(local.sentence_order_labels, distant.sentence_order_labels)
    assert server.injected.total() > server.injected["none"]


def test_the_commands_of_data_prep_read_a_remote_dataset(tmp_path, monkeypatch):
    make_dataset(tmp_path / "dataset")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with FaultyServer(tmp_path) as server:
        url = f"{server.url}/dataset/"
        assert verify_dataset(url) == verify_dataset(tmp_path / "dataset")
        assert not (tmp_path / "xdg").exists(), "verify reads what lies there now"
        assert show_examples(url, "train", 3) == show_examples(tmp_path / "dataset", "train", 3)
        assert default_cache_directory() == tmp_path / "xdg" / "albert-shards"
        assert any((tmp_path / "xdg" / "albert-shards" / "shards").iterdir())
        shard = tmp_path / "dataset" / "train-00001.tar"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        with pytest.raises(DataError, match=r"dataset/train-00001\.tar: 3 complete copies were not what"):
            verify_dataset(url)


def test_the_tokenizer_is_checked_and_keeps_its_name(tmp_path):
    manifest = make_dataset(tmp_path / "dataset")
    with FaultyServer(tmp_path) as server:
        server.script = ["flip", "short_length"]
        for _ in range(2):
            path = dataset_tokenizer(f"{server.url}/dataset", manifest, options(tmp_path))
        assert server.requests.total() == 3
        assert path.name == "vocab.txt"
        assert path.read_bytes() == (tmp_path / "dataset/tokenizer/vocab.txt").read_bytes()
        path.write_bytes(b"damaged")
        assert dataset_tokenizer(f"{server.url}/dataset", manifest, options(tmp_path)) == path
        assert sha256(path.read_bytes()) == manifest.tokenizer.sha256


_READ = """
import sys
from pathlib import Path
from albert.remote import Patience
from albert.shard_cache import CacheOptions, ShardCache
url, directory, name, size, sha256, stall = sys.argv[1:]
cache = ShardCache(url, CacheOptions(Path(directory), 1 << 30, Patience(stall_s=float(stall))))
sys.stdout.buffer.write(cache.open_shard(name, int(size), sha256).readall())
"""


def start_reader(url: str, cache: Path, name: str, content: bytes, stall_s: float) -> subprocess.Popen:
    words = [url, cache, name, len(content), sha256(content), stall_s]
    return subprocess.Popen([sys.executable, "-c", _READ, *map(str, words)], stdout=subprocess.PIPE)


def test_two_processes_at_once_download_once(tmp_path):
    ((name, content),) = write_files(tmp_path / "root", 1, 200_000).items()
    with FaultyServer(tmp_path / "root") as server:
        server.script = ["stall"]
        first = start_reader(server.url, tmp_path / "cache", name, content, 1.0)
        assert server.stalled.wait(20)
        second = start_reader(server.url, tmp_path / "cache", name, content, 1.0)
        assert first.communicate(timeout=30)[0] == content
        assert second.communicate(timeout=30)[0] == content
        ranges = [headers.get("Range") for _, headers in server.headers]
    assert ranges == [None, "bytes=100000-"]


def test_a_killed_process_leaves_its_place_to_the_next(tmp_path):
    ((name, content),) = write_files(tmp_path / "root", 1, 200_000).items()
    with FaultyServer(tmp_path / "root") as server:
        server.script = ["stall"]
        first = start_reader(server.url, tmp_path / "cache", name, content, 60.0)
        assert server.stalled.wait(20)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        copies = tmp_path / "cache" / "shards"
        assert [path.suffix for path in copies.iterdir()] == [".part"]
        cache = ShardCache(server.url, options(tmp_path))
        assert cache.open_shard(name, len(content), sha256(content)).readall() == content
    assert [path.suffix for path in copies.iterdir()] == [".tar"]


def test_the_least_recently_used_shards_go_and_open_ones_stay(tmp_path):
    files = write_files(tmp_path / "root", 5, 10_000)
    names = list(files)
    with FaultyServer(tmp_path / "root") as server:
        cache = ShardCache(server.url, options(tmp_path, max_bytes=30_010))  # three of them

        def open_shard(index: int):
            content = files[names[index]]
            return cache.open_shard(names[index], len(content), sha256(content))

        def present() -> set[int]:
            there = {path.stem for path in (tmp_path / "cache/shards").iterdir()}
            return {index for index, name in enumerate(names) if sha256(files[name]) in there}

        def age(index: int) -> None:
            path = tmp_path / "cache/shards" / f"{sha256(files[names[index]])}.tar"
            os.utime(path, ns=(index, index))

        held = open_shard(0)
        for index in (1, 2):
            open_shard(index).close()
        for index in (0, 1, 2):
            age(index)
        open_shard(1).close()  # used again: 2 is now the oldest that is not open
        open_shard(3).close()
        assert present() == {0, 1, 3}
        assert held.readall() == files[names[0]]
        held.close()
        age(0)
        open_shard(4).close()
        assert present() == {1, 3, 4}
        assert server.requests.total() == 5
        small = ShardCache(server.url, options(tmp_path, max_bytes=9_999))
        content = files[names[0]]
        with pytest.raises(
            ConfigError, match=r"shard-0\.tar: the shard has .* GiB, data\.cache_max_gib allows"
        ):
            small.open_shard(names[0], len(content), sha256(content))


def test_a_reader_holds_one_remote_shard_at_a_time(tmp_path):
    manifest = make_dataset(tmp_path / "dataset")
    train = manifest.split("train")
    room = max(shard.bytes for shard in train)
    with FaultyServer(tmp_path) as server:
        reader = ShardReader(f"{server.url}/dataset", train, VOCAB_SIZE, options(tmp_path, room))
        local = ShardReader(tmp_path / "dataset", train, VOCAB_SIZE)
        for shard, block in [(0, 0), (1, 0), (1, 1), (0, 1)]:
            assert (
                reader.read_block(shard, block).input_ids == local.read_block(shard, block).input_ids
            ).all()
            assert sum(path.stat().st_size for path in (tmp_path / "cache/shards").iterdir()) <= room
        assert server.requests.total() == 3
        (copy,) = (tmp_path / "cache/shards").iterdir()
        damaged = bytearray(copy.read_bytes())
        damaged[700] ^= 1
        copy.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"train-00000\.tar \(copy '{copy}'\): block 0: checksum mismatch"
        ):
            reader.read_block(0, 0)
        reader.close()
        copy.write_bytes(b"lost data")  # a wrong size is copied again
        assert reader.read_block(0, 0).num_examples == train[0].blocks[0].examples


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("status", "the server answers 500"),
        ("stall", "not a byte for 0.05 s"),
        ("reset", "the connection broke"),
        ("short", r"(the connection broke|the body ended after \d+ of 3 bytes)"),
    ],
)
def test_the_deadline_ends_with_one_sentence(tmp_path, fault, cause):
    (name,) = write_files(tmp_path, 1, 3)
    patience = Patience(stall_s=0.05, deadline_s=0.2, first_wait_s=0.02, longest_wait_s=0.1)
    with FaultyServer(tmp_path, share=1.0, faults=(fault,)) as server, pytest.raises(DataError) as caught:
        fetch(f"{server.url}/{name}?token={SECRET}", io.BytesIO(), 3, bool, patience)
    text = str(caught.value)
    assert text.startswith(f"{server.url}/{name}: not read within ")
    assert SECRET not in text
    assert re.search(
        rf"s in \d+ attempts, the last one: {cause}.*; check the server and the network$", text
    ), text


def test_refusals_are_final(tmp_path):
    with FaultyServer(tmp_path) as server:
        with pytest.raises(
            MissingInputError, match=r"/none\.tar: the server answers 404 \(not found\); check"
        ):
            fetch(f"{server.url}/none.tar", io.BytesIO(), 10, bool, QUICK)
        with pytest.raises(MissingInputError, match=r"/manifest\.json: the server answers 404"):
            read_manifest(server.url)
        assert server.requests.total() == 2
    closed = f"{server.url}/a"
    with pytest.raises(DataError, match=r"/a: not read within .* the last one: no connection: refused"):
        fetch(closed, io.BytesIO(), 10, bool, Patience(deadline_s=0.05, first_wait_s=0.02))


def test_redirects_are_followed_to_safe_places_only(tmp_path):
    ((name, content),) = write_files(tmp_path, 1, 100).items()
    with FaultyServer(tmp_path) as server:
        server.redirects = {
            "/moved": f"/{name}", "/loop": "/loop", "/metadata": "http://169.254.169.254/x",
            "/file": "file:///etc/passwd",
        }  # fmt: skip
        assert fetched(f"{server.url}/moved", content) == content
        for path in ("metadata", "file"):
            with pytest.raises(UnsafeError, match="refused; data is read from https"):
                fetch(f"{server.url}/{path}", io.BytesIO(), 10, bool, QUICK)
        with pytest.raises(DataError, match="redirected more than 5 times"):
            fetch(f"{server.url}/loop", io.BytesIO(), 10, bool, Patience(deadline_s=0.1, first_wait_s=0.05))


@pytest.mark.parametrize(
    ("address", "kind", "text"),
    [
        ("http://example.com/data", UnsafeError, "http://example.com/data: refused; data is read from https://"),
        ("http://169.254.169.254/latest", UnsafeError, "refused"),
        ("http://127.0.0.1.example.com/x", UnsafeError, "refused"),
        ("ftp://example.com/data", UnsafeError, "refused"),
        ("file:///etc/passwd", UnsafeError, "refused"),
        ("https:///data", ConfigError, "names no host or bucket"),
        ("s3://", ConfigError, "names no host or bucket"),
        (f"https://me:{SECRET}@example.com/data", ConfigError, "https://example.com/data: an address must not hold"),
        (f"https://{SECRET}@example.com/data", ConfigError, "https://example.com/data: an address must not hold"),
        (f"https://example.com/data?sig={SECRET}", ConfigError, "https://example.com/data: an address must not"),
        (f"https://[{SECRET}/data", ConfigError, "https://...: not an address"),
    ],
)  # fmt: skip
def test_addresses_are_checked_before_anything_else(address, kind, text):
    for check in (
        lambda: read_manifest(address),
        lambda: load_run_config("demo", [f"data.directory={address}", "train.output_dir=o"]),
    ):
        with pytest.raises(kind) as caught:
            check()
        assert text in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["https://h/d", "s3://bucket/prefix", "http://localhost:80/d", "http://[::1]/d"]
)
def test_good_addresses_pass(address):
    config = load_run_config("demo", [f"data.directory={address}", "train.output_dir=o"])
    assert config.data.directory == address
    assert config.data.cache.max_bytes == 64 << 30


@pytest.mark.parametrize(
    "name", ["../up.tar", "/etc/passwd", "a/../b", "-", "pipe:id", "a b", "http://h/x", "", "a?b"]
)
def test_manifests_name_files_inside_the_dataset_only(tmp_path, name):
    cache = ShardCache("https://example.com/d", options(tmp_path))
    for read in (cache.open_shard, lambda name, _, sha256: cache.tokenizer(name, sha256)):
        with pytest.raises(UnsafeError, match="its manifest names the file"):
            read(name, 10, "0" * 64)
    with pytest.raises(DataError, match="the manifest's SHA-256 is no hash"):
        cache.open_shard("a.tar", 10, "../../x")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_a_disk_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DiskError, match=r"cache/locks.*: .*; free space or choose another local disk"
    ) as caught:
        ShardCache("https://example.com/d", options(tmp_path)).open_shard("a.tar", 10, "0" * 64)
    assert isinstance(caught.value, AlbertError)


def test_the_proxy_of_the_environment_is_used_except_for_this_machine(monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert remote._proxy("https://example.com/a") == f"http://me:{SECRET}@proxy:3128"
    assert remote._proxy("https://inside.example/a") is None
    assert remote._proxy("https://127.0.0.1/a") is None


@pytest.fixture
def aws(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    remote._s3_client.cache_clear()
    yield monkeypatch
    remote._s3_client.cache_clear()


def test_s3_is_read_through_signed_addresses(tmp_path, aws, capfd):
    manifest = make_dataset(tmp_path / "bucket" / "some" / "prefix")
    with FaultyServer(tmp_path, share=0.3, faults=("status", "reset", "short", "flip"), seed=1) as server:
        aws.setenv("AWS_ENDPOINT_URL", server.url)
        aws.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        aws.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        aws.setattr(manifests, "_MANIFEST_PATIENCE", QUICK)
        url = "s3://bucket/some/prefix"
        assert read_manifest(url) == manifest
        for split in ("train", "eval"):
            entries = manifest.split(split)
            reader = ShardReader(url, entries, VOCAB_SIZE, options(tmp_path))
            local = ShardReader(tmp_path / "bucket/some/prefix", entries, VOCAB_SIZE)
            for shard in range(len(entries)):
                assert (reader.read_block(shard, 0).input_ids == local.read_block(shard, 0).input_ids).all()
        assert all("X-Amz-Signature=" in path and "X-Amz-Credential=AKID" in path for path in server.requests)
        with pytest.raises(MissingInputError) as caught:
            fetch("s3://bucket/none", io.BytesIO(), 10, bool, QUICK)
    assert str(caught.value).startswith("s3://bucket/none: the server answers 404")
    assert SECRET not in "".join(capfd.readouterr())


def test_s3_without_credentials_or_boto3_says_what_to_do(aws):
    with pytest.raises(
        ConfigError, match=r"s3://b/k: cannot sign the request \(NoCredentialsError\); set AWS_"
    ):
        fetch("s3://b/k", io.BytesIO(), 10, bool, QUICK)
    remote._s3_client.cache_clear()
    aws.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"s3:// needs boto3; run pip install 'albert-pretraining\[s3\]'"):
        fetch("s3://b/k", io.BytesIO(), 10, bool, QUICK)


def test_an_s3_endpoint_must_be_safe_too(aws):
    aws.setenv("AWS_ENDPOINT_URL", "http://storage.example:9000")
    aws.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    aws.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(UnsafeError, match=r"http://storage\.example:9000/b/k: refused") as caught:
        fetch("s3://b/k", io.BytesIO(), 10, bool, QUICK)
    assert "X-Amz" not in str(caught.value)
