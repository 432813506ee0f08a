import os
import platform
import subprocess
import sys

import pytest

from effvit.training.allocator import keep_freed_memory

pytestmark = pytest.mark.slow

# Page faults of allocating and freeing 64 blocks of 1 MiB, again and again.
PROGRAM = """
import resource, sys, torch
from effvit.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(2**18) for _ in range(64)]
        blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""

CAPTURE = {"capture_output": True, "text": True, "check": True}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    # glibc moves its own threshold while it runs; fixed at the value it starts with, it gives every block back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], env=environment, **CAPTURE).stdout)
        for how in ("keep", "default")
    )
    assert kept < 1000
    assert given_back > 10 * kept


def test_another_platform_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
