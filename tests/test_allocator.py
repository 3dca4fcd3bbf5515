"""Memory that a process frees stays with it: counted in page faults, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from exitkit import keep_memory
if sys.argv[1] == "kept":
    assert keep_memory()
for _ in range(60):  # the heap grows a few times before an aligned block of this size fits between what else lies there
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16_000_000)  # 64 MB: 15,625 pages of 4 KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_kept_memory_is_not_taken_again_page_by_page() -> None:
    given_back, kept = faults("default"), faults("kept")
    if given_back < 1000:
        pytest.skip("this allocator keeps memory by itself, or pages are large")
    assert kept < given_back / 20
