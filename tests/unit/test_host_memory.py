"""What a process on a CPU does with freed memory."""

import os
import subprocess
import sys

import pytest

_TAKE_AND_FREE = """
import resource, torch
from albert.host_memory import keep_freed_memory

def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = [torch.ones(megabytes * 2**18) for megabytes in (30, 25, 20, 15, 10)]
    del taken
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages_taken()
without = pages_taken()
keep_freed_memory()
print(without, *(pages_taken() for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_taken_again_without_asking_the_system():
    def pages(**environment):
        command, plain = [sys.executable, "-c", _TAKE_AND_FREE], {"PATH": os.environ["PATH"]}
        output = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
        return [int(word) for word in output.stdout.split()]

    without, *_, kept = pages()
    assert without > 100 * 256 * 0.9  # of 4 KiB
    assert kept < without / 2
    assert min(pages(MALLOC_ARENA_MAX="2")) > 100 * 256 * 0.9  # whoever sets glibc up keeps what was set
