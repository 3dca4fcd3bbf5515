"""``exitkit doctor``: what is installed, what it runs on, and whether it works here."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import exitkit

_LIBRARIES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
    "stable-baselines3": "rl",
}
"""Libraries that are only needed for some of it, and the extra that brings each."""


def examine(compiling: bool = True) -> Iterator[tuple[str, str, str]]:
    """What is installed, what there is to run on, and what works: heading, name and text of each, as it is known.

    ``compiling`` takes most of the time.
    """
    yield "versions", "exitkit", exitkit.__version__
    yield "versions", "python", platform.python_version()
    yield "versions", "torch", torch.__version__
    for name, extra in _LIBRARIES.items():
        yield "versions", name, _version(name, extra)
    yield "machine", "system", f"{platform.system()} {platform.machine()}"
    yield "machine", "devices", ", ".join(devices())
    yield "machine", "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    yield "machine", "allocator", allocator()
    for name, check in _checks(compiling).items():
        yield "works here", name, tried(check)


def devices() -> list[str]:
    """The CPU, and every GPU that torch sees, by the name that ``--device`` takes."""
    found = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    return ["cpu", *found]


def allocator() -> str:
    """Whose memory this process uses, and whether it can be kept between calls."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    if preloaded:
        return f"LD_PRELOAD={preloaded}"
    return "glibc, whose memory is kept between calls" if exitkit.keep_memory() else "the system's"


def tried(check: Callable[[], Any]) -> str:
    """``yes`` and the seconds it took, or ``no`` and the first line of the reason."""
    started = time.perf_counter()
    try:
        check()
    except Exception as error:  # whatever is in the way is what is asked for
        reason = next(iter(str(error).splitlines()), "no message")
        return f"no: {type(error).__name__}: {reason[:200]}"
    return f"yes ({time.perf_counter() - started:.1f} s)"


def _checks(compiling: bool) -> dict[str, Callable[[], Any]]:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 4)).eval()
    x = torch.randn(4, 8)

    def attached() -> exitkit.MultiExitModel:
        return exitkit.attach(model, x, at=["0", "1"], head="1L")

    def written(ending: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            exitkit.export(attached(), Path(folder) / f"model{ending}", threshold=0.5)

    checks: dict[str, Callable[[], Any]] = {
        "attach": attached,
        "run": lambda: exitkit.compile(attached(), 0.5)(x),
        "export .pt2": lambda: written(".pt2"),
    }
    if compiling:
        checks["compile"] = lambda: exitkit.compile(attached(), 0.5, optimize=True)(x)
    return checks | {"export .onnx": lambda: written(".onnx")}


def _version(name: str, extra: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"not installed (pip install 'exitkit[{extra}]')"
