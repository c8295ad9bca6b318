"""Renders a batch script from a template in `slurm/`: options that Slurm reads, and a block of settings for bash.

Nothing reaches the script unquoted: options are words of a small alphabet, settings are quoted for bash, and
control characters are refused. The template itself is a working script, for those who submit by hand.
"""

from __future__ import annotations

import importlib.resources
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from albert.errors import ConfigError, MissingInputError, UnsafeError
from launcher.cluster import ClusterConfig, is_word

_BEGIN, _END = "# >>> settings", "# <<< settings"
_LITERAL = "# shellcheck disable=SC2016,SC1003  # arguments are meant literally"
_JOB_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
Options = dict[str, str | None]
"""Options of sbatch without their dashes; None for those without a value."""


def template_names() -> list[str]:
    """Templates that ship with the package."""
    files = importlib.resources.files("slurm").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".sbatch"))


def read_template(name: str) -> str:
    """Text of a template by name, or of a file by path.

    Raises:
        MissingInputError: there is neither.
        ConfigError: the file has no block of settings.
    """
    if name in template_names():
        return (importlib.resources.files("slurm") / f"{name}.sbatch").read_text(encoding="utf-8")
    if not Path(name).is_file():
        raise MissingInputError(
            f"{name}: no such template or file; templates are {', '.join(template_names())}"
        )
    text = Path(name).read_text(encoding="utf-8")
    if _BEGIN not in text or _END not in text:
        raise ConfigError(f"{name}: not a template: it has no lines '{_BEGIN}' and '{_END}'")
    return text


def render(template: str, options: Options, settings: Sequence[str]) -> str:
    """Put options and settings into a template.

    Args:
        template: its text.
        options: replace or extend those of the template; a value of "" removes one.
        settings: lines of bash, quoted already.

    Raises:
        UnsafeError: an option is no plain word.
    """
    head, _, rest = template.partition(_BEGIN)
    merged: Options = {**template_options(head), **options}
    for name, value in merged.items():
        if value is not None and value != "" and not is_word(value):
            raise UnsafeError(
                f"--{name} {value!r}: only letters, digits and . _ : / , @ % + = [ ] - may stand here"
            )
    given = {name: value for name, value in merged.items() if value != ""}
    lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in given.items()]
    comments = [line for line in head.splitlines()[1:] if not line.startswith("#SBATCH")]
    body = rest.partition(_END)[2].partition("\n")[2]
    return "\n".join(["#!/bin/bash", *lines, _LITERAL, *comments, *settings, body])


def template_options(text: str) -> Options:
    """The #SBATCH lines of a script."""
    options: Options = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH --"):
            name, separator, value = line.removeprefix("#SBATCH --").strip().partition("=")
            options[name] = value if separator else None
    return options


def template_arguments(text: str) -> tuple[str, ...]:
    """Arguments that a template gives itself, before those of its user: `arguments=(--config xlarge "$@")`."""
    found = re.search(r'^arguments=\((.*)"\$@"\)$', text, flags=re.MULTILINE)
    return tuple(shlex.split(found[1])) if found else ()


def cluster_options(cluster: ClusterConfig) -> Options:
    """Options of sbatch that the cluster file gives."""
    named = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "mem": cluster.memory,
        "time": cluster.time,
    }
    options: Options = {name: value for name, value in named.items() if value is not None}
    if cluster.cpus_per_task is not None:
        options["cpus-per-task"] = str(cluster.cpus_per_task)
    if cluster.signal_before_end_s is not None:
        options["signal"] = f"B:USR1@{cluster.signal_before_end_s}"
    return options


def sbatch_option(text: str) -> Options:
    """One option as the user writes it, `--exclusive` or `--switches=1`.

    Raises:
        UnsafeError: it is no plain word.
    """
    if not text.startswith("--") or not is_word(text):
        raise UnsafeError(
            f"option of sbatch {text!r}: not of the form --NAME or --NAME=VALUE in plain characters"
        )
    name, separator, value = text.removeprefix("--").partition("=")
    return {name: value if separator else None}


def setting_lines(
    cluster: ClusterConfig, python: str, arguments: Sequence[str], *, preflight: bool = True
) -> list[str]:
    """The block of settings: modules, variables, interpreter, arguments, all quoted for bash.

    Raises:
        UnsafeError: a value holds control characters.
    """
    variables = dict(cluster.environment)
    if cluster.network_interface is not None:
        variables |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface)
    if cluster.scratch is not None:
        variables["TMPDIR"] = cluster.scratch
    modules = [f"module load {quoted(name)} || exit 78" for name in cluster.modules]
    root = str(Path(__file__).resolve().parents[1])
    return [
        *modules,
        f"export PYTHONPATH={quoted(root)}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={quoted(value)}" for name, value in variables.items()),
        f"python={quoted(python)}",
        f"arguments=({' '.join(quoted(word) for word in arguments)})",
        f"job_options=({' '.join(quoted(word) for word in job_options(cluster, preflight=preflight))})",
    ]


def job_options(cluster: ClusterConfig, *, preflight: bool) -> list[str]:
    """Options of `launcher slurm job` that carry the cluster file into the job."""
    return [
        *(f"--srun-option={word}" for word in cluster.srun_options),
        *(f"--rank-prefix={word}" for word in cluster.rank_prefix),
        f"--mpi={cluster.mpi}",
        *([] if preflight else ["--no-preflight"]),
    ]


def quoted(text: str) -> str:
    """One word of bash that means `text` literally.

    Raises:
        UnsafeError: it holds control characters or bytes that are not text.
    """
    if any(ord(letter) < 32 or ord(letter) == 127 or "\ud800" <= letter <= "\udfff" for letter in text):
        raise UnsafeError(
            f"{text!r} holds control characters, which a batch script does not carry; rename it"
        )
    return shlex.quote(text)


def checked_job_name(name: str) -> str:
    """A name of letters, digits, `.`, `_` and `-`.

    Raises:
        UnsafeError: any other.
    """
    if _JOB_NAME.fullmatch(name) is None or name.startswith("-"):
        raise UnsafeError(f"--job-name {name!r}: 1 to 64 letters, digits, '.', '_' or '-', the first no '-'")
    return name
