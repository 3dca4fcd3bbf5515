"""What the pretended CUDA runtime has counted, and what torch must not do there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.debug_utils import NNModuleToString

from exitkit.surgery import capturing

NAMES = ("graph_launches", "launches", "memcpys", "syncs", "captures", "mallocs")
"""Launches of graphs and of single kernels, copies, waits of the host, recordings, allocations that reached CUDA."""


def counts() -> dict[str, int]:
    """All counters since the process began."""
    library = ctypes.CDLL(None)
    return {name: ctypes.c_long.in_dll(library, f"fake_{name}").value for name in NAMES}


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """What one call of a function adds to the counters."""
    before = counts()
    run()
    return {name: after - before[name] for name, after in counts().items()}


def prepare() -> None:
    """Before anything is compiled: there is no cuDNN, and no kernel computes what Inductor's log or a check would read."""
    torch.backends.cudnn.enabled = False
    NNModuleToString.convert = staticmethod(lambda *_, **__: "")  # type: ignore[method-assign]
    capturing._check_numbers = lambda *_: None
