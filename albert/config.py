"""The run configuration: typed sections, YAML recipes, dotted overrides, model presets. Imports no torch.

The run configuration owns every number that changes the mathematics; `ds_configs/*.json` only says where
state is placed (see `albert/deepspeed_config.py`). It is frozen, printed, logged and stored in every checkpoint.
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from albert.addresses import check_address, is_remote
from albert.config_files import read_yaml
from albert.errors import ConfigError, MissingInputError
from albert.model_config import MODEL_PRESETS, ModelConfig, read_model_config
from albert.shard_cache import CacheOptions, default_cache_directory


def _yaml_switch(value: Any) -> Any:
    """YAML reads a bare `on` or `off` as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_yaml_switch)]
Fp8Switch = Annotated[Literal["off", "on", "emulated"], BeforeValidator(_yaml_switch)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(_Section):
    """Where examples come from, and their order."""

    directory: str
    """Dataset that `python -m data_prep build` made: a directory, or its address (https:// or s3://)."""
    cache_directory: str | None = None
    """Where shards of a remote dataset are copied; default ~/.cache/albert-shards. Choose a local disk."""
    cache_max_gib: float = Field(default=64.0, gt=0)
    """Space for those copies per host; less than the dataset copies shards again and again."""
    num_lanes: int | Literal["auto"] = Field(default="auto")
    """Lanes of the elastic order, fixed for a run; auto chooses from the number of blocks, at most 960."""
    window_blocks: int = Field(default=4, ge=1)
    """Blocks per shuffle window of a lane; more shuffles better and needs more memory."""
    remask: bool = False
    """Mask anew in every epoch instead of using the masks in the shards; evaluation always uses those."""
    num_workers: int = Field(default=1, ge=0, le=64)
    """Loader processes per rank; 0 loads in the training process. Does not change the order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_lanes != "auto" and self.num_lanes < 1:
            raise ValueError(f"num_lanes ({self.num_lanes}) must be 'auto' or at least 1")
        if is_remote(self.directory):
            check_address(self.directory)
        return self

    @property
    def cache(self) -> CacheOptions:
        """The same as options of the cache; used for remote datasets only."""
        directory = Path(self.cache_directory).expanduser() if self.cache_directory else None
        return CacheOptions(directory or default_cache_directory(), int(self.cache_max_gib * 2**30))


class TrainConfig(_Section):
    """How much is trained, in which pieces, and where."""

    output_dir: str
    """Directory of the run: checkpoints, logs, final model."""
    num_steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    stop_after_steps: int | None = Field(default=None, ge=1)
    """Stop (checkpoint committed, exit code 75) once this step is reached; the schedule is unchanged."""
    global_batch_size: int = Field(ge=1)
    """Examples per optimizer step over all ranks; kept whatever the number of ranks."""
    micro_batch_size: int = Field(ge=1)
    """Examples per forward pass of one rank; accumulation is derived."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    fp8: Fp8Switch = "off"
    """Matrix products of the layers in float8 (needs bf16, torchao and a GPU that has it). emulated rounds alike and
    computes in fp32 on any device: slow, to try it out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    activation_checkpointing: bool = False
    """Recompute every layer in the backward pass: 25 % slower, far less memory."""
    compile: Switch = "auto"
    """torch.compile of the shared layer. auto: on GPUs since Ampere in 16 bits without attention dropout; elsewhere
    every new set of lengths would be compiled anew."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Stop with exit code 70 after this many steps in a row with a NaN or infinite loss or gradient."""
    replica_check_interval_steps: int = Field(default=0, ge=0)
    """Compare the weights that the ranks hold in common every so many steps, and end with exit code 76 where one
    differs; 0 for never. ZeRO-3 holds none in common."""
    peer_timeout_s: float = Field(default=600.0, gt=0)
    """A collective that takes longer ends the run with exit code 76."""
    hang_timeout_s: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """A step that takes longer than this, and than five usual ones, ends the run with exit code 76 and says where
    every rank is. auto: 10, or 60 where layers are compiled, which may happen again. 0: never."""


class OptimizerConfig(_Section):
    """LAMB exact under ZeRO, or AdamW."""

    name: Literal["lamb", "adamw"] = "lamb"
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled; never applied to biases and LayerNorms."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm; 0 for no clipping."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer below the head learns at this factor of the rate above it (for fine-tuning); 1 for none."""
    lamb_variant: Literal["google", "brightmart", "deepspeed"] = "google"
    """google: no bias correction, ratio 1 for biases and LayerNorms. brightmart: ratio on every tensor.
    deepspeed: ratio on every tensor, bias correction, ratio clamped to [0.01, 10]."""


class ScheduleConfig(_Section):
    """Learning rate as a pure function of the step."""

    name: Literal["google_polynomial", "polynomial", "linear", "cosine", "constant", "wsd"] = (
        "google_polynomial"
    )
    """google_polynomial decays from step 0 and jumps down at the end of warm-up, as Google's code does;
    polynomial decays from the end of warm-up. wsd: warm-up, stable, decay."""
    warmup_steps: int = Field(default=0, ge=0)
    power: float = Field(default=1.0, gt=0)
    """Exponent of the two polynomial schedules."""
    end_learning_rate: float = Field(default=0.0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    """Steps of the decay phase of wsd."""


class EvalConfig(_Section):
    """Held-out MLM and SOP loss and accuracy."""

    interval_steps: int = Field(default=5000, ge=0)
    """0 for no evaluation, not even at the end."""
    num_examples: int = Field(default=4096, ge=1)
    """Examples of the eval split that are used; fewer where the split is smaller."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples per forward pass; default train.micro_batch_size."""


class CheckpointConfig(_Section):
    """When state is saved and which states are kept."""

    interval_steps: int = Field(default=1000, ge=1)
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(default=0, ge=0)
    """Keep every checkpoint whose step is a multiple of this for ever; 0 for none."""
    asynchronous: bool = True
    """Write in the background while training goes on; false waits for the disk at every save."""
    resume: Literal["auto", "required", "never"] = "auto"
    """auto goes on from the newest checkpoint that verifies, or starts; required fails without one;
    never refuses a directory that has one."""
    allow_changes: tuple[str, ...] = ()
    """Keys (or `dataset`, `tokenizer`) that may differ from those of the checkpoint that is resumed."""


class SpikeConfig(_Section):
    """Loss spikes, looked for at every line of metrics and before every checkpoint."""

    threshold: float = Field(default=8.0, ge=0)
    """A loss so many robust standard deviations above the median of those before is a spike; 0 for none."""
    window_steps: int = Field(default=64, ge=16)
    """Losses that are compared with."""
    action: Literal["report", "rewind"] = "report"
    """rewind goes back to the last checkpoint before the spike and leaves out exactly the batches of the spike."""
    max_rewinds: int = Field(default=3, ge=1)
    """Of a run; later spikes are only reported."""


class LogConfig(_Section):
    """What is reported and how often."""

    interval_steps: int = Field(default=10, ge=1)
    ledger: bool = False
    """Record which examples every step used; `--audit-ledger` proves from it that none was lost or repeated."""
    profile_steps: int = Field(default=0, ge=0, le=100)
    """Trace so many steps from the fifth on to RUN/profile, for Perfetto or TensorBoard; `--profile` traces 3."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSON lines."""
    progress: Switch = "auto"
    """Progress bar on rank 0; auto shows it on a terminal and prints lines elsewhere."""


class ProbeConfig(_Section):
    """A task that is fine-tuned from checkpoints while the pretraining goes on; its scores are logged as `probe`."""

    interval_steps: int = Field(default=0, ge=0)
    """Steps between probes, which take the first checkpoint at or behind each multiple; 0 for none."""
    task: str | None = None
    """One of `python -m albert.finetune --list-tasks`, or custom."""
    task_file: str | None = None
    """YAML file of a task of your own (task: custom)."""
    data: str | None = None
    """Directory of its train and dev files."""
    num_steps: int = Field(default=200, ge=1)
    """Optimizer steps of one probe."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Default: the task's recipe, like the next two."""
    batch_size: int | None = Field(default=None, ge=1)
    max_seq_length: int | None = Field(default=None, ge=8)
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda takes memory and time of the device that rank 0 trains on."""
    num_threads: int = Field(default=1, ge=1)


class DeepSpeedSection(_Section):
    """Placement of state."""

    config: str = "zero1"
    """Name of a file in ds_configs (zero0 zero1 zero1_bf16_reduction zero2 zero2_offload zero3) or path of a JSON."""


class RunConfig(_Section):
    """Everything that a pretraining run is."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    spikes: SpikeConfig = SpikeConfig()
    log: LogConfig = LogConfig()
    probe: ProbeConfig = ProbeConfig()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Order of examples, initial weights and dropout follow from it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = _cross_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


_FP8_ALIGNMENT = 16
"""Of the rows and columns that the float8 kernels take."""


def _cross_problems(config: RunConfig) -> list[str]:
    """Every contradiction between keys; each names both keys and values."""
    train, schedule, problems = config.train, config.schedule, []
    if schedule.warmup_steps >= train.num_steps:
        problems.append(
            f"schedule.warmup_steps ({schedule.warmup_steps}) must be less than "
            f"train.num_steps ({train.num_steps})"
        )
    if schedule.name == "wsd" and not 0 < schedule.decay_steps <= train.num_steps - schedule.warmup_steps:
        problems.append(
            f"schedule.decay_steps ({schedule.decay_steps}) must be between 1 and train.num_steps - "
            f"schedule.warmup_steps ({train.num_steps - schedule.warmup_steps}) for wsd"
        )
    if schedule.end_learning_rate > config.optimizer.learning_rate:
        problems.append(
            f"schedule.end_learning_rate ({schedule.end_learning_rate}) must not exceed "
            f"optimizer.learning_rate ({config.optimizer.learning_rate})"
        )
    if train.global_batch_size % train.micro_batch_size:
        problems.append(
            f"train.global_batch_size ({train.global_batch_size}) is not a multiple of "
            f"train.micro_batch_size ({train.micro_batch_size}); take a multiple of {train.micro_batch_size} x "
            f"world_size, or a train.micro_batch_size that divides {train.global_batch_size} / world_size"
        )
    if config.probe.interval_steps and not (config.probe.task and config.probe.data):
        problems.append(
            f"probe.interval_steps ({config.probe.interval_steps}) needs probe.task and probe.data; 0: no probes"
        )
    return problems + _fp8_problems(config)


def _fp8_problems(config: RunConfig) -> list[str]:
    train, model, problems = config.train, config.model, []
    if train.fp8 == "off":
        return []
    if train.precision != "bf16":
        problems.append(f"train.fp8 ({train.fp8}) needs train.precision bf16, not {train.precision}")
    sizes = {"hidden_size": model.hidden_size, "intermediate_size": model.intermediate_size}
    problems += [
        f"train.fp8 ({train.fp8}) needs a multiple of {_FP8_ALIGNMENT} as model.{name}, not {size}; use train.fp8=off"
        for name, size in sizes.items()
        if size % _FP8_ALIGNMENT
    ]
    return problems


def gradient_accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per optimizer step and rank.

    Raises:
        ConfigError: the global batch does not divide into micro-batches of all ranks.
    """
    per_pass = config.train.micro_batch_size * world_size
    if config.train.global_batch_size % per_pass:
        below = config.train.global_batch_size // per_pass * per_pass
        near = f"nearest multiples are {below} and {below + per_pass}" if below else f"take {per_pass}"
        per_rank, rest = divmod(config.train.global_batch_size, world_size)
        sizes = range(1, config.train.micro_batch_size + 1)
        smaller = (
            "" if rest else f", or set train.micro_batch_size={max(n for n in sizes if per_rank % n == 0)}"
        )
        raise ConfigError(
            f"train.global_batch_size ({config.train.global_batch_size}) is not a multiple of "
            f"train.micro_batch_size ({config.train.micro_batch_size}) x world_size ({world_size}) = "
            f"{per_pass}; {near}{smaller}"
        )
    return config.train.global_batch_size // per_pass


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = importlib.resources.files("albert.recipes").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def load_run_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe by name or a YAML file by path, and apply `section.key=value` overrides.

    Raises:
        MissingInputError: no such recipe or file.
        ConfigError: lists every problem, each with key, value, what is allowed, nearest valid name.
    """
    raw = _read_yaml(recipe)
    problems = [problem for text in overrides if (problem := _apply_override(raw, text))]
    raw["model"] = _expand_model(raw.get("model"), problems)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [line for item in error.errors() for line in _describe(item)]
    if problems:
        raise ConfigError(f"{recipe}: " + f"\n{recipe}: ".join(problems))
    return config


def _read_yaml(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        raw = read_yaml(importlib.resources.files("albert.recipes") / f"{recipe}.yaml")
    elif Path(recipe).is_file():
        raw = read_yaml(Path(recipe))
    else:
        raise MissingInputError(
            f"{recipe}: no such configuration file or recipe; recipes are {', '.join(recipe_names())}"
        )
    if not isinstance(raw, dict):
        raise ConfigError(f"{recipe}: holds no sections; see the recipes for the form of a configuration")
    return raw


def _apply_override(raw: dict[str, Any], text: str) -> str | None:
    """Put one `section.key=value` into `raw`; returns the problem if it cannot be read."""
    path, separator, value = text.partition("=")
    keys = path.split(".")
    if not separator or not all(keys) or len(keys) > 2:
        return f"override '{text}' is not of the form section.key=value"
    target = raw
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    try:
        target[keys[-1]] = yaml.safe_load(value) if value else ""
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2024-13-01
        return f"override '{text}': the value is not valid YAML"
    return None


def _expand_model(section: Any, problems: list[str]) -> Any:
    """Replace `model.preset` (a name or the path of a config.json) by the fields it stands for."""
    if not isinstance(section, Mapping) or "preset" not in section:
        return section
    preset = str(section["preset"])
    own = {key: value for key, value in section.items() if key != "preset"}
    if preset in MODEL_PRESETS:
        return {**MODEL_PRESETS[preset].model_dump(), **own}
    if Path(preset).is_file():
        return {**read_model_config(Path(preset)).model_dump(), **own}
    problems.append(f"model.preset: '{preset}' is neither a preset ({', '.join(MODEL_PRESETS)}) nor a file")
    return {**ModelConfig().model_dump(), **own}


_UNION_MEMBERS = ("int", "float", "constrained-float", "literal['auto']")
"""What pydantic adds to the place of an error to say which form of a value it tried."""


def _describe(item: Any) -> list[str]:
    """One pydantic error as lines of the form `key: what is wrong, with the value`."""
    key = ".".join(str(part) for part in item["loc"] if part not in _UNION_MEMBERS)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _valid_names(item["loc"]), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(_valid_names(item['loc']))}"
        return [f"{key}: unknown key; {hint}"]
    if item["type"] == "missing":
        return [f"{key}: missing; give it in the file or as {key}=VALUE on the command line"]
    if item["type"] == "value_error":
        return [f"{key}: {line}" if key else line for line in str(item["ctx"]["error"]).split("\n")]
    message = item["msg"][0].lower() + item["msg"][1:]
    return [f"{key}: {message}, got {item['input']!r}"]


def _valid_names(location: tuple[Any, ...]) -> list[str]:
    if len(location) == 1:
        return list(RunConfig.model_fields)
    section = RunConfig.model_fields[str(location[0])].annotation
    names = list(getattr(section, "model_fields", {}))
    return ["preset", *names] if location[0] == "model" else names
