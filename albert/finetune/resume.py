"""A fine-tuning that was stopped or killed goes on; one that is finished is not done again.

OUTPUT/checkpoints holds the whole state, in the pretraining's form (`albert.checkpoint`) with two more files: the
progress so far, and the best weights where they are not the last ones. They are removed when the training is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from albert import checkpoint
from albert.distributed import World, barrier, min_over_ranks
from albert.engine import Engine
from albert.errors import ConfigError
from albert.finetune.artefacts import RESULTS_NAME, read_results
from albert.finetune.preparation import Prepared
from albert.finetune.progress import Progress
from albert.finetune.settings import FinetuneSettings

_PROGRESS = "progress.json"
_BEST = "best.weights"
"""Safetensors under another suffix, which marks the files of the state."""
_FREE = {
    "checkpoint_interval_steps", "deepspeed", "device", "eval_batch_size", "hang_timeout_s", "log_interval_steps",
    "micro_batch_size", "peer_timeout_s", "progress", "tensorboard",
}  # fmt: skip
"""Settings that change rounding at most."""
_ANOTHER, _NONE, _THIS = range(3)
"""The training that a rank finds finished; the lowest is believed."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What two trainings have in common if one may go on with the other's state."""

    values: dict[str, Any]
    """Settings, task and labels by name, and the hash of the weights that the training starts from."""
    data_sha256: str
    """Of the examples of train and dev."""
    tokenizer_sha256: str

    @property
    def fingerprint(self) -> str:
        """One hash of everything."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Identity) -> list[str]:
        """What another training has otherwise, for people."""
        lines = [
            f"{name}: {other.values.get(name)!r} there, {self.values.get(name)!r} now"
            for name in sorted({*self.values, *other.values})
            if other.values.get(name) != self.values.get(name)
        ]
        hashes = {
            "data": (other.data_sha256, self.data_sha256),
            "tokenizer": (other.tokenizer_sha256, self.tokenizer_sha256),
        }
        return lines + [f"{name}: has changed" for name, (old, new) in hashes.items() if old != new]


def identify(prepared: Prepared, settings: FinetuneSettings) -> Identity:
    """The identity of a training."""
    values = {
        **{name: value for name, value in settings.model_dump().items() if name not in _FREE},
        "task": prepared.task.name,
        "labels": list(prepared.labels),
        "max_seq_length": prepared.max_seq_length,
        "weights_sha256": prepared.weights_sha256,
    }
    return Identity(values, prepared.data_sha256, prepared.tokenizer.sha256)


def finished_results(output: Path, identity: Identity) -> dict[str, Any] | None:
    """Content of results.json if this very training is finished there, on the word of all ranks. Collective.

    Raises:
        ConfigError: another training is finished there; lists the differences.
    """
    results = read_results(output)
    training = results.get("training", {})
    is_same = training.get("fingerprint") == identity.fingerprint
    found = min_over_ranks(_THIS if is_same else _ANOTHER if training else _NONE)
    if found == _ANOTHER:
        recorded = training.get("identity")
        differences = identity.differences(Identity(**recorded)) if recorded else []
        raise _another_training(output / RESULTS_NAME, "finished", differences, output)
    return results if found == _THIS else None


def _another_training(place: Path, was: str, differences: list[str], removable: Path) -> ConfigError:
    """The refusal to take the place of a training that was interrupted or finished."""
    return ConfigError(
        f"{place}: this training differs from the one that was {was} here; "
        f"{'; '.join(differences) or 'what differs was not recorded'}. Undo it, choose another --output, or remove "
        f"{removable} to train from the beginning"
    )


class TuningCheckpoints:
    """Saves and restores one training; like `albert.run_checkpoints.RunCheckpoints`."""

    def __init__(
        self, output: Path, identity: Identity, model_files: Mapping[str, bytes], engine: Engine, world: World
    ) -> None:
        """Look at nothing yet; see `resume`.

        Args:
            output: directory of the run.
            identity: of the training.
            model_files: config.json and tokenizer, so that a checkpoint can be read as a model.
            engine: saved and restored.
            world: the ranks.
        """
        self.directory = output / "checkpoints"
        self._identity, self._model_files = identity, model_files
        self._engine, self._world = engine, world
        self._save: checkpoint.Save | None = None
        self._files: dict[str, bytes] = {}

    @property
    def is_written(self) -> bool:
        """True when this rank has written its part of the save that is under way."""
        return self._save is not None and self._save.is_written

    def begin(self, progress: Progress, best: Mapping[str, Tensor], position: int) -> None:
        """Take the state now; a thread writes it while the training goes on. Collective.

        Raises:
            DiskError: there is no space; older checkpoints are untouched.
        """
        self.finish()
        self._files = {**self._model_files, _PROGRESS: json.dumps(dataclasses.asdict(progress)).encode()}
        if best and progress.best_step != progress.step:
            self._files[_BEST] = safetensors.torch.save(dict(best))
        state = checkpoint.TrainingState(
            step=progress.step,
            position=position,
            optimizer_steps=self._engine.optimizer.num_steps,
            loss_scaler=self._engine.loss_scaler_state(),
            run_config=self._identity.values,
            dataset_sha256=self._identity.data_sha256,
            tokenizer_sha256=self._identity.tokenizer_sha256,
            world_size=self._world.size,
        )
        tensors, shapes = self._engine.gather_state(), self._engine.named_shapes()
        self._save = checkpoint.Save(self.directory, state, tensors, shapes, self._world)

    def finish(self) -> None:
        """Commit the save that is under way, if any. Collective.

        Raises:
            DiskError: it could not be written; older checkpoints are untouched.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        save.commit(self._files, keep_last=1, keep_every=0)

    def resume(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """Load the newest checkpoint that verifies into the engine. Collective.

        Returns:
            The progress and the best weights so far, or None to start.

        Raises:
            ConfigError: the checkpoint is of another training.
            DataError: there are checkpoints and none verifies.
        """
        checkpoint.remove_leftovers(self.directory, self._world)
        loaded = checkpoint.load_newest(self.directory, _warn)
        if loaded is None:
            return None
        state, parts = loaded
        directory = checkpoint.step_directory(self.directory, state.step)
        other = Identity(state.run_config, state.dataset_sha256, state.tokenizer_sha256)
        differences = self._identity.differences(other)
        if differences:
            raise _another_training(directory, "interrupted", differences, self.directory)
        self._engine.load_state(parts, state.optimizer_steps)
        self._engine.load_loss_scaler_state(state.loss_scaler)
        progress = Progress(**json.loads((directory / _PROGRESS).read_bytes()))
        if not progress.best_step:
            return progress, {}
        is_last = progress.best_step == progress.step
        best = parts["weights"] if is_last else safetensors.torch.load((directory / _BEST).read_bytes())
        return progress, best

    def remove(self) -> None:
        """Remove all checkpoints; the training is done. Collective."""
        self.finish()
        if self._world.is_main:
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")
