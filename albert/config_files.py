"""Configuration files are UTF-8 whatever the locale, and YAML gives no key twice. Imports no torch."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from albert.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"
"""Of `<<`, which may be given several times."""


def read_text(path: Path | Traversable) -> str:
    """Content of a file, without a byte order mark.

    Raises:
        ConfigError: it is not UTF-8.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8; convert the file to UTF-8") from error


def read_yaml(path: Path | Traversable) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not UTF-8, not YAML, or gives a key twice.
    """
    try:
        return _UniqueKeys(read_text(path)).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML would silently take the last value of a key."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node
