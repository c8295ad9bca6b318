"""A power loss may take whatever was not synced: the system calls of saves are replayed on a model of a disk."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.traced import LINE, PATH, Saves, Traced, needs_strace

pytestmark = [pytest.mark.multiprocess, needs_strace]
STEP_NAME = re.compile(r"step-\d+")


@dataclass
class Node:
    """A file or directory."""

    is_synced: bool = False
    """Content of a file."""
    names: dict[str, Node] = field(default_factory=dict)
    synced_names: dict[str, Node] = field(default_factory=dict)

    def survives(self) -> bool:
        """Whether all files that are here now are here whole after a power loss."""
        return self.names == self.synced_names and all(node.is_synced for node in self.names.values())


class Disk:
    """Replays system calls and checks each against what was synced before it."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Node()
        self.num_commits = self.num_removals = 0

    def find(self, path: str) -> tuple[Node, str]:
        """Parent and name."""
        *parents, name = Path(path).relative_to(self.root).parts or ("",)
        node = self.top
        for parent in parents:
            node = node.names[parent]
        return node, name

    def replay(self, call: str, paths: list[str], arguments: str) -> None:
        parent, name = self.find(paths[0])
        if call == "mkdir" or (call == "openat" and "O_CREAT" in arguments):
            parent.names.setdefault(name, Node())
        elif call == "write":
            parent.names[name].is_synced = False
        elif call == "fsync":
            node = parent.names[name] if name else parent
            node.is_synced, node.synced_names = True, dict(node.names)
        elif call == "rename":
            self.check_rename(paths, parent.names[name])
            other, other_name = self.find(paths[1])
            other.names[other_name] = parent.names.pop(name)
        elif call == "unlinkat":
            assert self.surviving_steps(parent), f"{name} loses a file before a later checkpoint is synced"
            del parent.names[name].names[re.search(r'"([^"]+)"', arguments)[1]]
        elif call in {"unlink", "rmdir"}:
            del parent.names[name]

    def check_rename(self, paths: list[str], node: Node) -> None:
        old, new = (Path(path).name for path in paths)
        checkpoints = self.find(paths[0])[0]
        steps = self.surviving_steps(checkpoints)
        if STEP_NAME.fullmatch(new):
            assert node.survives(), f"{new} gets its name before its files are synced"
            self.num_commits += 1
        elif STEP_NAME.fullmatch(old):
            assert steps - {old} or new.endswith(".replaced.tmp"), f"{old} goes before a later one is synced"
            self.num_removals += 1
        elif new == "latest":
            assert node.is_synced
            assert steps
            assert self.is_synced_from_top(checkpoints), "the directory of the checkpoints may vanish"

    def surviving_steps(self, checkpoints: Node) -> set[str]:
        """Checkpoints that a power loss leaves."""
        names = {name for name, node in checkpoints.synced_names.items() if node.survives()}
        return {name for name in names if STEP_NAME.fullmatch(name)}

    def is_synced_from_top(self, wanted: Node) -> bool:
        nodes = [self.top]
        for node in nodes:
            nodes.extend(node.synced_names.values())
        return any(node is wanted for node in nodes)


@pytest.mark.parametrize(("steps", "num_commits", "num_removals"), [((1, 2, 3), 3, 2), ((3, 3), 2, 1)])
def test_names_change_only_after_what_they_stand_for_is_synced(tmp_path, steps, num_commits, num_removals):
    directory = tmp_path / "run" / "checkpoints"
    calls = "trace=mkdir,openat,write,fsync,rename,unlink,unlinkat,rmdir"
    traced = Traced(directory, Saves((), steps), 1, 0, ["-f", "-e", calls], tmp_path / "log")
    assert traced.ranks.results() == [(0, "")]
    traced.end()
    disk = Disk(tmp_path)
    for _, call, arguments in LINE.findall(traced.log.read_text()):
        paths = [one or other for one, other in PATH.findall(arguments)]
        paths = [path for path in paths if Path(path).is_relative_to(tmp_path)]
        if paths and " = -1 " not in arguments:
            disk.replay(call, paths, arguments)
    assert (disk.num_commits, disk.num_removals) == (num_commits, num_removals)
