"""What may differ between a checkpoint's configuration and the one that resumes it. Imports no torch.

Placement, logging and paths may change freely: they do not change the mathematics or only its rounding. Any
other difference would silently continue as another experiment, so it is shown and refused unless it is allowed
by name in `checkpoint.allow_changes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from albert.config import RunConfig
from albert.errors import ConfigError

_FREE_SECTIONS = {"checkpoint", "deepspeed", "eval", "log", "probe"}
_FREE_KEYS = {
    "data.cache_directory",
    "data.cache_max_gib",
    "data.directory",  # the dataset's hash is compared instead
    "data.num_workers",
    "train.activation_checkpointing",
    "train.compile",
    "train.device",
    "train.hang_timeout_s",
    "train.micro_batch_size",
    "train.output_dir",
    "train.peer_timeout_s",
    "train.replica_check_interval_steps",
    "train.stop_after_steps",
    "train.max_nonfinite_steps",
}


def check_resumable(
    stored: Mapping[str, Any], config: RunConfig, hashes: Mapping[str, tuple[str, str]], where: str
) -> None:
    """Compare what a checkpoint was trained with and what it shall go on with.

    Args:
        stored: configuration in the checkpoint, as plain values.
        config: configuration of this run.
        hashes: name ("dataset", "tokenizer") -> (stored, present).
        where: path of the checkpoint, for the message.

    Raises:
        ConfigError: lists every difference that was not allowed by name.
    """
    allowed = set(config.checkpoint.allow_changes)
    present = dict(_flatten(config.model_dump(mode="json")))
    before = dict(_flatten(_with_defaults(stored)))
    differences = [
        f"{key}: {before.get(key)!r} in the checkpoint, {present.get(key)!r} now"
        for key in sorted(before.keys() | present.keys())
        if before.get(key) != present.get(key) and not _is_free(key) and key not in allowed
    ]
    differences += [
        f"{name}: hash {old[:12]} in the checkpoint, {new[:12]} now"
        for name, (old, new) in hashes.items()
        if old != new and name not in allowed
    ]
    if differences:
        raise ConfigError(
            f"{where}: this run differs from the checkpoint; "
            + "; ".join(differences)
            + ". Undo it, choose another "
            "train.output_dir, or allow it by name: checkpoint.allow_changes=[KEY, ...]"
        )


def _with_defaults(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """A key that is younger than the checkpoint has its default there, if all others are still understood."""
    try:
        return RunConfig.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or key.partition(".")[0] in _FREE_SECTIONS


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(section.key, value) pairs; the top-level seed keeps its name."""
    for section, content in values.items():
        if isinstance(content, Mapping):
            yield from ((f"{section}.{key}", value) for key, value in content.items())
        else:
            yield section, content
