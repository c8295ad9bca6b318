"""Every number of a fine-tuning run, from the task's recipe and the command line. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from albert.config import OptimizerConfig, ScheduleConfig
from albert.errors import ConfigError
from albert.finetune.task_definition import METRICS_OF_KIND, Task

_WARMUP_SHARE = 0.1


class FinetuneSettings(BaseModel):
    """What is trained, how long, and what decides which checkpoint is best."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    """Examples per optimizer step over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples per forward pass of one rank; default: the whole share of the rank."""
    eval_batch_size: int = Field(default=64, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; takes the place of epochs."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Default: a tenth of the steps."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_seq_length: int = Field(ge=8)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Hidden and attention dropout; default: the model's own."""
    classifier_dropout: float | None = Field(default=None, ge=0, lt=1)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each level below the head learns at this factor of the rate above it; see `optim.groups.rate_factors`."""
    reinit_pooler: bool = False
    eval_interval_steps: int | None = Field(default=None, ge=1)
    """Default: once per epoch."""
    checkpoint_interval_steps: int | None = Field(default=None, ge=0)
    """Default: at every evaluation; 0: only when a signal stops the run."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a better one."""
    metric: str
    """Decides which checkpoint is best."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    precision: Literal["bf16", "fp16", "fp32", "auto"] = "auto"
    """auto: bf16 on CUDA (fp16 before Ampere), fp32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deepspeed: str = "zero1"
    """Placement file of ds_configs, or a path."""
    log_interval_steps: int = Field(default=10, ge=1)
    hang_timeout_s: float = Field(default=10.0, ge=0)
    """A rank that is silent or gets nowhere for so long ends the run; see `albert.watchdog`. 0 for never."""
    peer_timeout_s: float = Field(default=600.0, gt=0)
    """The same for evaluation, files and the first steps, and the longest time of any collective."""
    progress: Literal["auto", "on", "off"] = "auto"
    tensorboard: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either epochs or max_steps")
        return self

    def num_steps(self, num_units: int) -> int:
        """Optimizer steps of the run over `num_units` training units."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round((self.epochs or 0.0) * num_units / self.batch_size))

    def steps_per_evaluation(self, num_units: int) -> int:
        """Optimizer steps between two evaluations."""
        return self.eval_interval_steps or max(1, round(num_units / self.batch_size))

    def steps_per_checkpoint(self, num_units: int) -> int:
        """Optimizer steps between two checkpoints; 0 for none."""
        if self.checkpoint_interval_steps is None:
            return self.steps_per_evaluation(num_units)
        return self.checkpoint_interval_steps

    def schedule_config(self, num_steps: int) -> ScheduleConfig:
        """Warm-up and decay over `num_steps`.

        Raises:
            ConfigError: the warm-up is not shorter than the run.
        """
        warmup = round(_WARMUP_SHARE * num_steps) if self.warmup_steps is None else self.warmup_steps
        if warmup >= num_steps:
            raise ConfigError(
                f"--warmup-steps ({warmup}) must be less than the run's {num_steps} steps; lower it or train longer"
            )
        return ScheduleConfig(name=self.schedule, warmup_steps=warmup)

    def optimizer_config(self) -> OptimizerConfig:
        """AdamW with bias correction, as fine-tuning needs it (Mosbach et al. 2021)."""
        return OptimizerConfig(
            name="adamw",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            layer_decay=self.layer_decay,
        )

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Units per forward pass of one rank, and forward passes per step.

        Raises:
            ConfigError: the batch does not divide over the ranks and micro-batches.
        """
        if self.batch_size % world_size:
            raise ConfigError(
                f"--batch-size ({self.batch_size}) is not a multiple of the {world_size} ranks; "
                f"nearest is {-(-self.batch_size // world_size) * world_size}"
            )
        share = self.batch_size // world_size
        micro = self.micro_batch_size or share
        if share % micro:
            raise ConfigError(
                f"--micro-batch-size ({micro}) does not divide the {share} examples of each of {world_size} "
                f"ranks (--batch-size {self.batch_size})"
            )
        return micro, share // micro


def settings_for(task: Task, overrides: dict[str, object]) -> FinetuneSettings:
    """The task's recipe with what the command line gave.

    Raises:
        ConfigError: a value is out of range, or the metric is not one of the task's.
    """
    recipe = task.recipe
    values: dict[str, object] = {
        "learning_rate": recipe.learning_rate,
        "batch_size": recipe.batch_size,
        "warmup_steps": recipe.warmup_steps,
        "max_seq_length": recipe.max_seq_length,
        "metric": task.metric,
    }
    if "epochs" not in overrides and "max_steps" not in overrides:
        values |= {"epochs": recipe.epochs, "max_steps": recipe.steps}
    elif overrides.get("warmup_steps") is None:
        values["warmup_steps"] = None
    values |= overrides
    allowed = METRICS_OF_KIND[task.kind]
    if values["metric"] not in allowed:
        raise ConfigError(f"--metric '{values['metric']}': task {task.name} has {', '.join(allowed)}")
    try:
        return FinetuneSettings.model_validate(values)
    except ValueError as error:
        raise ConfigError("; ".join(_describe(item) for item in error.errors())) from error  # type: ignore[attr-defined]


def _describe(item: dict[str, object]) -> str:
    location = item["loc"]
    key = "--" + str(location[0]).replace("_", "-") if isinstance(location, tuple) and location else ""
    if item["type"] == "value_error":
        return str(item["msg"]).removeprefix("Value error, ")
    message = str(item["msg"])
    return f"{key}: {message[0].lower()}{message[1:]}, got {item['input']!r}"
