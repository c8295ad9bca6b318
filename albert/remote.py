"""Whole files from `https://` and `s3://`, whatever the network does to them. Imports no torch.

An attempt that breaks is followed by another that asks for the rest only (HTTP Range), with capped exponential waits;
a server that ignores ranges makes it start from zero. What arrived is accepted by its content, never by its length
alone. S3 objects are read through addresses that boto3 signs, so there is one way to fetch.
"""

from __future__ import annotations

import functools
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from albert.addresses import check_scheme, is_this_machine, shown
from albert.errors import ConfigError, DataError, MissingInputError, UnsafeError

if TYPE_CHECKING:
    import urllib3

_CHUNK_BYTES = 1 << 20
_MAX_UNSIZED_BYTES = 1 << 30
"""Most that is read of a file whose size nothing tells beforehand: a manifest or a tokenizer."""
_MAX_REDIRECTS = 5
_MAX_WRONG_COPIES = 3
_LOUD_WAIT_S = 2.0
_TRANSIENT = {408, 425, 429}
_MISSING = {401: "unauthorized", 403: "forbidden", 404: "not found", 410: "gone"}


@dataclass(frozen=True)
class Patience:
    """How long is waited for a server, in seconds."""

    connect_s: float = 10.0
    stall_s: float = 30.0
    """Without a single byte an attempt ends."""
    deadline_s: float = 300.0
    """For a file, with all attempts, plus what its size takes at `slowest_bytes_per_s`."""
    slowest_bytes_per_s: float = 1 << 20
    first_wait_s: float = 0.5
    """Before the second attempt; doubled after each attempt that brought nothing."""
    longest_wait_s: float = 30.0


class _AttemptError(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, cause: str, retry_after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


def fetch(
    address: str,
    target: BinaryIO,
    size: int | None,
    is_right: Callable[[BinaryIO], bool],
    patience: Patience | None = None,
) -> None:
    """Copy a remote file into `target` (empty, or of the right size already) until `is_right(target)`.

    Args:
        address: of the file.
        target: open for reading and writing.
        size: in bytes, None if unknown.
        is_right: judges a complete copy by its content.
        patience: how long faults are borne.

    Raises:
        MissingInputError: the server says that there is no such file, or not for us.
        DataError: the deadline has passed, or complete copies are wrong again and again.
        UnsafeError, ConfigError: see `check_address`; credentials or boto3 are missing.
    """
    patience = patience or Patience()
    begin = time.monotonic()
    deadline = begin + patience.deadline_s + (size or 0) / patience.slowest_bytes_per_s
    fruitless, attempts, wrong = 0, 0, 0
    while True:
        attempts += 1
        before = target.tell()
        try:
            _copy_rest(address, target, size, patience, deadline)
            if is_right(target):
                return
            wrong += 1
            if wrong == _MAX_WRONG_COPIES:
                raise DataError(
                    f"{shown(address)}: {wrong} complete copies were not what they should be; the file "
                    "changed or is damaged there, upload the dataset again"
                )
            _restart(target, size)
            failure = _AttemptError("the content was not what it should be")
        except _AttemptError as error:
            failure = error
        fruitless = 0 if target.tell() > before else fruitless + 1
        wait = _next_wait(patience, fruitless, failure.retry_after_s)
        if time.monotonic() + wait > deadline:
            raise DataError(
                f"{shown(address)}: not read within {time.monotonic() - begin:.0f} s in {attempts} attempts, "
                f"the last one: {failure}; check the server and the network"
            ) from failure
        if wait >= _LOUD_WAIT_S:
            sys.stderr.write(
                f"warning: {shown(address)}: attempt {attempts}: {failure}; again in {wait:.0f} s\n"
            )
        time.sleep(wait)


def _next_wait(patience: Patience, fruitless: int, retry_after_s: float) -> float:
    """Seconds; random, so that a thousand ranks do not come back at the same moment, and not the ranks' seeds."""
    wait = min(patience.longest_wait_s, patience.first_wait_s * 2.0 ** min(fruitless, 30))
    wait *= random.SystemRandom().uniform(0.5, 1.0)
    return max(wait, min(retry_after_s, patience.longest_wait_s))


def _restart(target: BinaryIO, size: int | None) -> None:
    target.seek(0)
    if size is None:  # a file of known size keeps its space
        target.truncate()


def _copy_rest(address: str, target: BinaryIO, size: int | None, patience: Patience, deadline: float) -> None:
    """One attempt: continue behind what `target` holds, or from zero where that cannot be."""
    if size is None:
        _restart(target, size)  # nothing would tell whether the rest belongs to the beginning
    offset = target.tell()
    if offset == size:
        return
    with _attempt(address, patience):
        response = _request(address, offset, patience)
        try:
            if _first_byte(response, address, offset) != offset:
                _restart(target, size)
            limit = _MAX_UNSIZED_BYTES if size is None else size
            while (left := limit - target.tell()) > 0:
                chunk = response.read1(min(left, _CHUNK_BYTES))
                if not chunk:
                    break
                target.write(chunk)
                if time.monotonic() > deadline:
                    raise _AttemptError(f"too slow, {target.tell()} bytes when the time was up")
        finally:
            response.close()  # the rest of a body that lied about its length must not answer the next request
    if size is not None and target.tell() < size:
        raise _AttemptError(f"the body ended after {target.tell()} of {size} bytes")


def _first_byte(response: urllib3.BaseHTTPResponse, address: str, offset: int) -> int:
    """Where in the file the body begins.

    Raises:
        MissingInputError, DataError: the server refuses, and will refuse again.
    """
    status = response.status
    if status in _MISSING:
        raise MissingInputError(
            f"{shown(address)}: the server answers {status} ({_MISSING[status]}); check the address, and for "
            "s3:// the credentials in the environment"
        )
    if status == 200 or (status == 416 and offset):
        return 0
    if status == 206:
        found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != offset:
            raise _AttemptError("the server sent another range than was asked for")
        return offset
    if status >= 500 or status in _TRANSIENT:
        after = response.headers.get("Retry-After", "")
        raise _AttemptError(f"the server answers {status}", float(after) if after.isdecimal() else 0.0)
    raise DataError(f"{shown(address)}: the server answers {status}; check the address")


def _request(address: str, offset: int, patience: Patience) -> urllib3.BaseHTTPResponse:
    """GET from `offset` on; follows a few redirects, none of them to a less safe place."""
    import urllib3

    url = _signed(address) if address.startswith("s3://") else address
    check_scheme(url)
    headers = {"Accept-Encoding": "identity", "User-Agent": "albert-pretraining"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    timeout = urllib3.Timeout(connect=patience.connect_s, read=patience.stall_s)
    for _ in range(_MAX_REDIRECTS + 1):
        response = _pool(os.getpid(), _proxy(url)).request(
            "GET", url, headers=headers, timeout=timeout, retries=False, redirect=False,
            preload_content=False, decode_content=False,
        )  # fmt: skip
        location = response.get_redirect_location()
        if not location:
            return response
        response.close()
        was_encrypted, url = url.startswith("https:"), urljoin(url, location)
        check_scheme(url)
        if was_encrypted and not url.startswith("https:"):
            raise UnsafeError(f"{shown(address)}: redirects to {shown(url)}, which is not encrypted")
    raise _AttemptError(f"redirected more than {_MAX_REDIRECTS} times")


@contextmanager
def _attempt(address: str, patience: Patience) -> Iterator[None]:
    """Say in our own words what went wrong: messages of libraries may hold the whole address."""
    from urllib3 import exceptions

    try:
        yield
    except exceptions.NameResolutionError as error:
        raise _AttemptError("the name of the host is not known") from error
    except exceptions.NewConnectionError as error:
        raise _AttemptError("no connection: refused or unreachable") from error
    except exceptions.ConnectTimeoutError as error:  # the base of the two above
        raise _AttemptError(f"no connection within {patience.connect_s:g} s") from error
    except exceptions.TimeoutError as error:
        raise _AttemptError(f"not a byte for {patience.stall_s:g} s") from error
    except exceptions.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UnsafeError(
                f"{shown(address)}: the server's certificate is not trusted; name its authority in SSL_CERT_FILE"
            ) from error
        raise _AttemptError("the encrypted connection failed") from error
    except exceptions.HTTPError as error:
        raise _AttemptError(f"the connection broke ({type(error).__name__})") from error


@functools.lru_cache(maxsize=4)
def _pool(process: int, proxy: str | None) -> urllib3.PoolManager:  # noqa: ARG001
    """Connections of this process; a forked loader must not share its parent's."""
    import urllib3

    if proxy is None:
        return urllib3.PoolManager()
    login = urlsplit(proxy).netloc.rpartition("@")[0]
    headers = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address; none for this machine itself."""
    parts = urlsplit(url)
    if is_this_machine(parts.hostname or "") or proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


def _signed(address: str) -> str:
    """An https address of an S3 object, valid for an hour; every attempt signs anew."""
    parts = urlsplit(address)
    try:
        client, problems = _s3_client(os.getpid())
    except ImportError:
        raise ConfigError(
            f"{shown(address)}: s3:// needs boto3; run pip install 'albert-pretraining[s3]'"
        ) from None
    try:
        place = {"Bucket": parts.netloc, "Key": parts.path.lstrip("/")}
        return str(client.generate_presigned_url("get_object", Params=place, ExpiresIn=3600))
    except problems as error:
        raise ConfigError(
            f"{shown(address)}: cannot sign the request ({type(error).__name__}); set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION, or read a public bucket by its https:// address"
        ) from None


@functools.lru_cache(maxsize=1)
def _s3_client(process: int) -> tuple[Any, type[Exception]]:  # noqa: ARG001
    """The client of this process, and the base of its exceptions."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    return boto3.Session().client("s3", config=Config(signature_version="s3v4")), BotoCoreError
