"""The checkpoints of one pretraining run: what goes into them, and going on from the newest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from albert import checkpoint
from albert.config import RunConfig
from albert.distributed import World
from albert.engine import Engine
from albert.errors import ConfigError, MissingInputError
from albert.model_config import model_config_bytes
from albert.resuming import check_resumable
from albert.shards import Manifest, dataset_tokenizer


class RunCheckpoints:
    """Saves and restores an engine together with the position of its data."""

    def __init__(self, config: RunConfig, manifest: Manifest, engine: Engine, world: World) -> None:
        """Look at nothing yet; see `resume`."""
        self.directory = Path(config.train.output_dir) / "checkpoints"
        self._config, self._manifest, self._engine, self._world = config, manifest, engine, world
        self._save: checkpoint.Save | None = None

    @property
    def is_written(self) -> bool:
        """True when this rank has nothing left to write for the save that is under way, if any."""
        return self._save is not None and self._save.is_written

    def begin(self, step: int, position: int) -> None:
        """Take the state now; a thread writes it while the training goes on. Collective.

        Raises:
            DiskError: there is no space; older checkpoints are untouched.
        """
        state = checkpoint.TrainingState(
            step=step,
            position=position,
            optimizer_steps=self._engine.optimizer.num_steps,
            loss_scaler=self._engine.loss_scaler_state(),
            run_config=self._config.model_dump(mode="json"),
            dataset_sha256=self._manifest.sha256,
            tokenizer_sha256=self._manifest.tokenizer.sha256,
            world_size=self._world.size,
        )
        tensors, shapes = self._engine.gather_state(), self._engine.named_shapes()
        self._save = checkpoint.Save(self.directory, state, tensors, shapes, self._world)

    def finish(self) -> Path | None:
        """Commit the save that is under way, waiting for it if need be; None if there is none. Collective.

        Raises:
            DiskError: it could not be written; older checkpoints are untouched.
        """
        if self._save is None:
            return None
        save, self._save = self._save, None
        data = self._config.data
        tokenizer = dataset_tokenizer(data.directory, self._manifest, data.cache)
        extra_files = {
            "config.json": model_config_bytes(self._config.model),
            tokenizer.name: tokenizer.read_bytes(),
        }
        keep = self._config.checkpoint
        return save.commit(extra_files, keep.keep_last, keep.keep_every)

    def resume(self, warn: Callable[[str], None]) -> tuple[int, int] | None:
        """Load the newest checkpoint that verifies into the engine. Collective.

        Returns:
            (step, position) to go on from, or None to start.

        Raises:
            ConfigError: the run differs from the checkpoint, or `checkpoint.resume` forbids going on.
            MissingInputError: `checkpoint.resume` is required and there is none.
            DataError: there are checkpoints and none verifies.
        """
        mode = self._config.checkpoint.resume
        steps = checkpoint.list_steps(self.directory)
        if mode == "never" and steps:
            raise ConfigError(
                f"{self.directory} holds a checkpoint of step {steps[-1]} and checkpoint.resume is never; "
                "choose another train.output_dir or checkpoint.resume=auto"
            )
        if mode == "required" and not steps:
            raise MissingInputError(f"{self.directory}: no checkpoint, and checkpoint.resume is required")
        checkpoint.remove_leftovers(self.directory, self._world)
        loaded = checkpoint.load_newest(self.directory, warn)
        if loaded is None:
            return None
        state, parts = loaded
        hashes = {
            "dataset": (state.dataset_sha256, self._manifest.sha256),
            "tokenizer": (state.tokenizer_sha256, self._manifest.tokenizer.sha256),
        }
        where = str(checkpoint.step_directory(self.directory, state.step))
        check_resumable(state.run_config, self._config, hashes, where)
        self._engine.load_state(parts, state.optimizer_steps)
        self._engine.load_loss_scaler_state(state.loss_scaler)
        return state.step, state.position
