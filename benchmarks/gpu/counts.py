"""What does a call of the CUDA engine issue, wait for and hold? Counts under the pretended runtime, which needs no GPU.

    FOLDER/python benchmarks/gpu/counts.py [--models tiny resnet18 resnet50] [--out results/counts.json]

``bash benchmarks/gpu/pretended/setup.sh FOLDER`` makes that interpreter. Kernels do nothing there, so how many samples go on
at each exit is written where the device would have put it.

* *graphs*, *launches*, *copies*: graph launches, kernels launched one by one, and copies, by the host, in a call;
* *waits*: how often the host waits for the device in a call; *host µs*: the call's time in Python and torch, in which neither
  the driver nor the device has a share;
* *recorded*: graphs for all batch sizes; *GiB reserved*: by torch's allocator for weights, buffers and recordings; *eager
  GiB*: the most during a call of the same compiled steps without recordings.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from counting import counted, prepare
from torch import Tensor

import exitkit
from exitkit.common.console import make_console
from exitkit.engine.cuda.graphs import GraphLoop
from exitkit.engine.loop import Loop

SIDES = {"tiny": 32, "resnet18": 64, "resnet50": 224}
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("results/counts.json"))
    args = parser.parse_args()
    prepare()
    rows = []
    for name in args.models:
        rows += measure(name, getattr(torch, args.dtype))
        for row in rows[-4:]:
            make_console().print(" ".join(f"{key}={value}" for key, value in row.items()), soft_wrap=True)
    machine = f"pretended runtime on {platform.processor() or platform.machine()}, torch {torch.__version__}"
    make_console().print(machine)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "dtype": args.dtype, "rows": rows}, indent=1))


def measure(name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each kind of call."""
    side = SIDES[name]
    ee = exitkit.attach(_backbone(name), torch.zeros(2, 3, side, side), at_cost=[0.25, 0.5, 0.75], method="sdn")
    engine = exitkit.compile(ee.to("cuda", dtype), 0.5, optimize=True)
    loop = engine.loop
    assert isinstance(loop, GraphLoop)

    def batch(samples: int) -> Tensor:
        return torch.zeros(samples, 3, side, side, device="cuda", dtype=dtype)

    about = {"model": name, "steps": len(loop.program.steps)}
    about["eager GiB"] = _held(lambda: Loop(loop.program, engine.policy).answer([batch(BATCH)]), peak=True)
    about["recorded"] = counted(lambda: engine.warm(batch(2)))["captures"]
    about["GiB reserved"] = _held(lambda: engine(batch(BATCH)))
    calls: list[tuple[str, Callable[[], Any]]] = [
        (f"batch {BATCH}, half leave at each exit", lambda: engine(batch(BATCH))),
        ("batch 1, leaves at the backbone", lambda: engine(batch(1))),
        ("batch 1, leaves at exit 0", lambda: engine(batch(1))),
        ("map of 64 batches of 16", lambda: list(engine.map([batch(16)] * 64, 64))),
    ]
    shares = [[BATCH // 2, BATCH // 4, BATCH // 8], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    return [about | _counts(engine, *call, share) for call, share in zip(calls, shares, strict=True)]


def _backbone(name: str) -> torch.nn.Module:
    if name == "tiny":
        return exitkit.models.cifar_resnet(20).eval()
    import torchvision

    model: torch.nn.Module = getattr(torchvision.models, name)().eval()
    return model


def _counts(engine: exitkit.Engine, name: str, call: Callable[[], Any], going_on: list[int]) -> dict[str, Any]:
    assert isinstance(engine.loop, GraphLoop)
    assert engine.loop.graphs is not None
    for one in engine.loop.graphs.recordings.values():
        for boundary, count in zip(one.boundaries[1:] if one is not None else (), going_on, strict=False):
            with torch.inference_mode():
                boundary.on_host.fill_(count)
    call()
    return {"call": name} | counted(call) | {"host µs": _host_microseconds(call)}


def _host_microseconds(call: Callable[[], Any], times: int = 20) -> float:
    """What a call takes of its thread's time at the least, where the device takes none."""

    def once() -> float:
        begun = time.thread_time()
        for _ in range(times):
            call()
        return time.thread_time() - begun

    return round(1e6 / times * min(once() for _ in range(5)), 1)


def _held(call: Callable[[], Any], peak: bool = False) -> float:
    """GiB that torch has reserved after a call, or at the most during it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    if not peak:
        torch.cuda.empty_cache()
    return round((torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()) / 2**30, 2)


if __name__ == "__main__":
    main()
