"""What preflight finds out about one host, and what the facts of all hosts say together. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from albert.config import RunConfig
from albert.errors import AlbertError, ConfigError
from albert.manifest import check_files, read_manifest

Facts = dict[str, Any]
"""What one rank found on its host."""

MAX_SKEW_S = 5.0

_EQUAL = {
    "code": "different code (hash {value}); install the same version of this project everywhere",
    "versions": "different versions ({value}); install the packages of constraints.txt everywhere",
    "dataset": "different or stale shards (manifest {value}); copy the dataset again or use a shared directory",
}
_UNSHARED = "not shared with the other hosts; use a shared file system"
_PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
_INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def host_facts(config: RunConfig) -> Facts:
    """Look at this host, without the other ranks; problems are collected, not raised."""
    facts: Facts = {
        # Slurm excludes nodes by its own names, which may differ from the hosts'.
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "code": code_hash(Path(__file__).parent)[:12],
        "versions": " ".join([platform.python_version(), *(f"{n} {metadata.version(n)}" for n in _PACKAGES)]),
        "output_dir": config.train.output_dir,
        "clock": 0.0,
        "sees_first": True,
        "problems": [],
    }
    facts["dataset"] = collect(facts, lambda: _dataset_hash(config))
    collect(facts, lambda: check_interfaces(os.environ, Path("/sys/class/net")))
    return facts


def collect(facts: Facts, check: Callable[[], Any]) -> Any:
    """Run a check; what it raises becomes a problem of this rank."""
    try:
        return check()
    except AlbertError as error:
        facts["problems"].append(str(error))
        return None


def code_hash(package: Path) -> str:
    """SHA-256 over all source files of a package, names included."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _dataset_hash(config: RunConfig) -> str:
    """Hash of the manifest, once the files that it names are there."""
    directory = config.data.directory
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    return str(manifest.sha256)[:12]


def check_interfaces(environment: Mapping[str, str], devices: Path) -> None:
    """Every network interface that is asked for is there.

    Raises:
        ConfigError: names the variable and the interfaces that are there.
    """
    for variable in _INTERFACE_VARIABLES:
        names = environment.get(variable, "").removeprefix("=").split(",")
        present = sorted(path.name for path in devices.iterdir())
        for name in filter(None, names):
            # NCCL takes beginnings of names, and ^ for "not these".
            if not name.startswith("^") and not any(other.startswith(name) for other in present):
                raise ConfigError(
                    f"{variable}: no network interface {name!r}; there are {', '.join(present)}"
                )


def promised_bytes_per_s(
    environment: Mapping[str, str], sys_class: Path, routes: Path
) -> tuple[str, float] | None:
    """What the network of this host is built for, and its name; None where the kernel does not say.

    Args:
        environment: may name the interface.
        sys_class: /sys/class; InfiniBand's ports count if there are any.
        routes: /proc/net/route; its first line has the interface that counts otherwise.
    """
    rates = [path.read_text() for path in sorted(sys_class.glob("infiniband/*/ports/*/rate"))]
    if rates:
        gbits = [float(found[0]) for text in rates if (found := re.match(r"[\d.]+", text))]
        return "InfiniBand", sum(gbits) * 1e9 / 8
    lines = routes.read_text().splitlines() if routes.is_file() else []
    used = lines[1].split()[0] if len(lines) > 1 else "none"
    asked = next((environment[name] for name in _INTERFACE_VARIABLES if environment.get(name)), used)
    name = asked.removeprefix("=").partition(",")[0]
    try:
        mbits = int((sys_class / "net" / name / "speed").read_text())
    except (OSError, ValueError):
        return None  # down, or a kind of interface without a speed
    return (name, mbits * 1e6 / 8) if mbits > 0 else None


def rank_problems(facts: Sequence[Facts]) -> list[list[str]]:
    """Problems of every rank: its own, and where its host differs from most others."""
    problems = [list(fact["problems"]) for fact in facts]
    for key, text in _EQUAL.items():
        known = [fact for fact in facts if fact[key] is not None]
        if not known:
            continue
        usual = Counter(fact[key] for fact in known).most_common(1)[0][0]
        example = next(fact["host"] for fact in known if fact[key] == usual)
        for fact, own in zip(facts, problems, strict=True):
            if fact[key] not in (None, usual):
                own.append(f"{text.format(value=fact[key])}; {example} has {usual}")
    clocks, apart = sorted(fact["clock"] for fact in facts), _unshared_hosts(facts)
    for fact, own in zip(facts, problems, strict=True):
        skew = fact["clock"] - clocks[len(clocks) // 2]
        if abs(skew) > MAX_SKEW_S:
            own.append(f"its clock is {skew:+.0f} s from the others'")
        if fact["host"] in apart:
            own.append(f"train.output_dir ({fact['output_dir']}): {_UNSHARED}")
    return problems


def _unshared_hosts(facts: Sequence[Facts]) -> set[str]:
    """Hosts that do not see what the first one wrote; or the first one, if most others do not."""
    apart = {fact["host"] for fact in facts if not fact["sees_first"]}
    return {facts[0]["host"]} if len(apart) > len({fact["host"] for fact in facts}) / 2 else apart


def problem_lines(facts: Sequence[Facts], problems: Sequence[Sequence[str]]) -> list[str]:
    """One line for each problem of a host, without repetition."""
    lines = [f"{fact['host']}: {text}" for fact, own in zip(facts, problems, strict=True) for text in own]
    return list(dict.fromkeys(lines))


def bad_hosts(facts: Sequence[Facts], problems: Sequence[Sequence[str]]) -> list[str]:
    """Hosts that should not be used again. None if all ranks have a problem: then it is no host's fault."""
    if all(problems):
        return []
    return list(dict.fromkeys(fact["host"] for fact, own in zip(facts, problems, strict=True) if own))
