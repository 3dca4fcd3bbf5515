"""The C library's memory: kept between calls, where it would be given back to the system and taken again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Let this process keep freed memory, for itself to use again; whether that could be set (with glibc on Linux).

    By default glibc returns every large tensor's memory to the system when it is freed, and the next tensor of that size
    takes it again page by page: on a ResNet-44 at batch 256 a call then makes 135,000 page faults, and takes 1.6 times
    the CPU time. Memory that was freed stays with the process from now on. ``exitkit run``, ``bench-latency``, ``bench``,
    ``train`` and ``demo`` call this; call it at the start of a program of your own, or run that with jemalloc
    (``LD_PRELOAD``).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
