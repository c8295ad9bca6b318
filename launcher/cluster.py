"""What differs between Slurm clusters, read from a YAML file like `slurm/cluster.example.yaml`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from albert.errors import ConfigError, MissingInputError

_WORD = r"^[A-Za-z0-9._:/,@%+=\[\]-]+$"
"""Values of #SBATCH lines: no space, quote or `#`, because Slurm's own reading of those lines has odd rules."""
Word = Annotated[str, StringConstraints(pattern=_WORD, max_length=200)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ClusterConfig(BaseModel):
    """Where jobs run; says nothing about what is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    gpus_per_node: int | None = Field(default=None, ge=0)
    """0 for nodes without GPUs."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores per rank."""
    memory: Word | None = None
    """Per node, as Slurm writes it: 400G; 0 for all of the node."""
    time: Word | None = None
    """Longest run of one allocation; the job goes on in the next one."""
    signal_before_end_s: int | None = Field(default=None, ge=10)
    """Ranks are asked to commit this long before the time limit."""
    sbatch_options: tuple[Word, ...] = ()
    """Further options of sbatch: --exclusive, --switches=1."""
    python: str | None = None
    """Interpreter with this project, the same path on every node; default the one that submits."""
    modules: tuple[Word, ...] = ()
    """Environment modules, loaded in this order."""
    environment: dict[Name, str] = {}
    """Variables of every rank: NCCL_DEBUG, HF_HOME."""
    network_interface: Word | None = None
    """Interface for the ranks' traffic; sets NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME."""
    scratch: str | None = None
    """Directory on every node for temporary files; sets TMPDIR."""
    srun_options: tuple[str, ...] = ()
    """Further options of srun: --cpu-bind=cores, or Pyxis' --container-image=... --container-mounts=..."""
    rank_prefix: tuple[str, ...] = ()
    """Command that runs python inside a container: [apptainer, exec, --nv, albert.sif]."""
    mpi: Literal["pmi2", "pmix", "none"] = "pmi2"
    """How srun starts MPI ranks of data preparation; pmi2 works with the mpich of constraints.txt."""


def read_cluster(path: str | None) -> ClusterConfig:
    """Read a cluster file; without one, the cluster's own defaults hold.

    Raises:
        MissingInputError: no such file.
        ConfigError: not YAML, unknown keys, or values that a batch script cannot hold.
    """
    if path is None:
        return ClusterConfig()
    if not Path(path).is_file():
        raise MissingInputError(f"{path}: no such cluster file; copy slurm/cluster.example.yaml and edit it")
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        return ClusterConfig.model_validate(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(path, item) for item in error.errors())) from error


def _describe(path: str, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown key; valid here: {', '.join(ClusterConfig.model_fields)}"
    if item["type"] == "string_pattern_mismatch":
        return f"{path}: {key}: {item['input']!r} holds characters that a batch script cannot carry safely"
    return f"{path}: {key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def is_word(text: str) -> bool:
    """Whether a value may stand in an #SBATCH line."""
    return re.match(_WORD, text) is not None and len(text) <= 200
