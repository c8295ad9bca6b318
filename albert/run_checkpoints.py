"""The checkpoints of one pretraining run: what goes into them, and going on from the newest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from albert import checkpoint
from albert.config import RunConfig
from albert.distributed import World, barrier, min_over_ranks
from albert.engine import Engine
from albert.errors import ConfigError, DataError, MissingInputError
from albert.ledger import Ledger
from albert.loss_spikes import SkippedStep, read_skipped, write_skipped
from albert.manifest import Manifest, dataset_tokenizer
from albert.model_config import model_config_bytes
from albert.resuming import check_resumable


class RunCheckpoints:
    """Saves and restores an engine together with the position of its data."""

    def __init__(self, config: RunConfig, manifest: Manifest, engine: Engine, world: World) -> None:
        """Look at nothing yet; see `resume`."""
        self.directory = Path(config.train.output_dir) / "checkpoints"
        self._config, self._manifest, self._engine, self._world = config, manifest, engine, world
        self._save: checkpoint.Save | None = None
        self.skipped: list[SkippedStep] = []
        """Steps whose examples the run leaves out."""
        self.ledger: Ledger | None = None
        """Where `log.ledger` asks for one, from `resume` on."""

    @property
    def skipped_ranges(self) -> list[tuple[int, int]]:
        """Positions that the run leaves out, ascending."""
        return [(step.begin, step.end) for step in self.skipped]

    @property
    def num_rewinds(self) -> int:
        """How often the run went back because of a loss spike."""
        return max((step.rewind for step in self.skipped), default=0)

    @property
    def is_written(self) -> bool:
        """True when this rank has nothing left to write for the save that is under way, if any."""
        return self._save is not None and self._save.is_written

    def begin(self, step: int, position: int, recent_losses: list[float]) -> None:
        """Take the state now; a thread writes it while the training goes on. Collective.

        Args:
            step: optimizer steps done.
            position: positions consumed.
            recent_losses: of the loss-spike detector.

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
            recent_losses=recent_losses,
            skipped=[(begin, end) for begin, end in self.skipped_ranges if begin < position],
        )
        if self.ledger:
            self.ledger.sync()
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

    def rewind(self, spikes: Sequence[SkippedStep]) -> checkpoint.TrainingState | None:
        """Go back to the newest checkpoint before some steps and leave out their examples from then on. Collective.

        Returns:
            The state to go on from; None, with nothing changed, where no checkpoint is old enough.
        """
        barrier()
        first_step = min(spike.step for spike in spikes)
        steps = [step for step in checkpoint.list_steps(self.directory) if step < first_step]
        if not min_over_ranks(len(steps)):
            return None
        number = self.num_rewinds + 1
        self.skipped += [spike.model_copy(update={"rewind": number}) for spike in spikes]
        self.skipped.sort(key=lambda spike: spike.begin)
        if self._world.is_main:
            write_skipped(self.directory, self.skipped)
        state = self._load(lambda _: None)
        if self.ledger and state:
            self.ledger.rewind(state.step)
        return state

    def resume(self, warn: Callable[[str], None]) -> checkpoint.TrainingState | None:
        """Load the newest checkpoint that verifies into the engine. Collective.

        Returns:
            The state to go on from, or None to start.

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
        self.skipped = read_skipped(self.directory)
        state = self._load(warn)
        if self._config.log.ledger:
            step, position = (state.step, state.position) if state else (0, 0)
            self.ledger = Ledger(self.directory.parent, self._world, step, position)
        return state

    def _load(self, warn: Callable[[str], None]) -> checkpoint.TrainingState | None:
        """Load the newest checkpoint that verifies and has left out what is to be left out."""
        if self._world.is_main:
            checkpoint.remove_steps(self.directory, self._steps_with_skipped_examples())
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
        return state

    def _steps_with_skipped_examples(self) -> Iterator[int]:
        if not self.skipped:
            return
        for step in checkpoint.list_steps(self.directory):
            with contextlib.suppress(DataError, MissingInputError):  # `load_newest` says so
                state = checkpoint.read_manifest(checkpoint.step_directory(self.directory, step)).state
                wanted = {(begin, end) for begin, end in self.skipped_ranges if begin < state.position}
                if wanted - set(state.skipped):
                    yield step
