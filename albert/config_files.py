"""Configuration files are UTF-8 whatever the locale, and YAML gives no key twice. Imports no torch."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from albert.errors import ConfigError


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
    loader = _UniqueKeys(read_text(path))
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


class _UniqueKeys(yaml.SafeLoader):
    """YAML would silently take the last value of a key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
