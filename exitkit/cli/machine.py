"""What a command computes on: the device, and how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.inputs import call_on
from exitkit.surgery.macs import count_macs

_SMALL = 100e6
"""MACs of a sample up to which one thread trains about as fast as several."""


def train_on(device: str | None) -> None:
    """Have accelerate, which places what Trainer trains, use this device in this process; None leaves it the choice.

    Raises:
        ArgumentError: a device that is none, or that is not here.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch was built without is an AssertionError
        raise ArgumentError(
            f"--device {device!r} cannot be used here ({str(error).splitlines()[0][:120]}); give cpu, cuda or cuda:N"
        ) from error
    os.environ["ACCELERATE_TORCH_DEVICE"] = device


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """So many threads inside; as many as before, after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(backbone: nn.Module, example_inputs: Any, threads: int | None, report: Callable[[str], None]) -> int:
    """``threads``, or as many as suit the backbone; said to the user.

    Threads of small operations wait for each other in a spin: with two of them beside one busy process the demo takes
    twenty times as long as with one.

    Raises:
        ArgumentError: fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"--threads {threads} must be at least 1")
    chosen, why = torch.get_num_threads(), "torch's choice"
    if threads is not None:
        chosen, why = threads, "as asked for"
    elif chosen > 1 and next(backbone.parameters()).device.type == "cpu":
        example = example_for(backbone, example_inputs).with_batch(1)
        macs = count_macs(lambda *tensors: call_on(backbone, example.spec.batch(tensors)), *example.tensors)
        if macs < _SMALL:
            chosen, why = 1, f"the backbone costs {macs / 1e6:.0f} MMACs, which more would not make faster"
    report(f"{counted(chosen, 'thread')}: {why}; --threads sets another number")
    return chosen
