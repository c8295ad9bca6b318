"""Addresses of remote datasets: which ones are read, and what of them is shown. Imports no torch."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from albert.errors import ConfigError, UnsafeError

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def is_remote(directory: Path | str) -> bool:
    """True for `scheme://...`, whether or not the scheme is supported."""
    return "://" in str(directory)


def check_address(address: str) -> None:
    """Check that an address may be read and holds nothing secret: addresses are printed and stored with runs.

    Raises:
        ConfigError: it holds a user, a password, a query or a fragment, or names no host or bucket.
        UnsafeError: it is neither https nor s3 nor plain http on this machine.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        raise ConfigError(f"{address.partition(':')[0]}://...: not an address") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"{shown(address)}: an address must not hold a user, a password, a query or a fragment; "
            "for s3:// give credentials in the environment"
        )
    check_scheme(address)
    if not parts.hostname:
        raise ConfigError(f"{address}: names no host or bucket; write https://HOST/DIR or s3://BUCKET/DIR")


def file_address(directory: str, name: str) -> str:
    """Address of a file that a manifest names.

    Raises:
        UnsafeError: the name is anything else than a plain relative path.
    """
    if not _FILE_NAME.fullmatch(name):
        raise UnsafeError(
            f"{directory}: its manifest names the file {name!r}; names are letters, digits, '.', '_', '-' and '/'"
        )
    return f"{directory.rstrip('/')}/{name}"


def shown(address: str) -> str:
    """An address as messages show it: without user, password, query and fragment."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_scheme(url: str) -> None:
    """Only encrypted connections, except to this machine itself.

    Raises:
        UnsafeError: anything else.
    """
    parts = urlsplit(url)
    if parts.scheme in ("https", "s3") or (parts.scheme == "http" and is_this_machine(parts.hostname or "")):
        return
    raise UnsafeError(
        f"{shown(url)}: refused; data is read from https:// and s3://, and from http:// on this machine only"
    )


def is_this_machine(host: str) -> bool:
    """True for `localhost` and the loopback addresses."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
