"""What a process on a CPU does with freed memory."""

import os
import subprocess
import sys

import pytest

_TAKE_AND_FREE = """
import ctypes, resource, torch
from albert.host_memory import keep_freed_memory

def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = [torch.ones(25 * 2**18) for _ in range(10)]
    del taken
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for parameter in (-1, -3):  # what glibc starts with; set, it stays, and all of this memory goes back at once
    ctypes.CDLL(None).mallopt(parameter, 128 * 1024)
without = min(pages_taken() for _ in range(5))
print(int(keep_freed_memory()), without, min(pages_taken() for _ in range(5)))
"""
_PAGES = 10 * 25 * 256  # of 4 KiB


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_taken_again_without_asking_the_system():
    def pages(**environment):
        command, plain = [sys.executable, "-c", _TAKE_AND_FREE], {"PATH": os.environ["PATH"]}
        output = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
        return [int(word) for word in output.stdout.split()]

    is_set, without, later = pages()
    assert is_set
    assert without > 0.9 * _PAGES
    assert later < 0.1 * _PAGES
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")):
        is_set, _, later = pages(**{name: value})  # whoever sets glibc up keeps what was set
        assert not is_set
        assert later > 0.9 * _PAGES
