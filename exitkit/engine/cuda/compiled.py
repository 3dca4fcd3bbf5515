"""A compiled step on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from exitkit.engine.memory_format import in_format

_refusals: dict[torch.device, int] = {}
"""How often each device's allocator had no memory to give, when that was last asked."""


class CompiledStep:
    """A step compiled by AOTInductor for a GPU: a function of tensors, for one thread at a time.

    Attributes:
        channels_last: which of its inputs it takes in that memory format.
    """

    def __init__(self, path: Path, channels_last: Sequence[bool], device: torch.device) -> None:
        self.channels_last = tuple(channels_last)
        self._device = device
        with torch.cuda.device(device):  # loading would leave it the current one
            # the runner for several threads asks the device whether it is done, which a recording forbids
            self._run = torch._inductor.aoti_load_package(
                str(path), run_single_threaded=True, device_index=device.index
            ).loader.run
        self._one_at_a_time = threading.Lock()
        ran_out_of_memory(device)

    def __call__(self, *tensors: Any) -> Sequence[Any]:
        # it runs on the stream of the current device, whatever its own is
        with self._one_at_a_time, torch.cuda.device(self._device.index):
            taken = list(map(in_format, tensors, self.channels_last))
            try:
                made: Sequence[Any] = self._run(taken)
                return made
            except RuntimeError as error:  # a plain one, whatever went wrong
                if isinstance(error, torch.OutOfMemoryError) or not ran_out_of_memory(self._device):
                    raise
                raise torch.OutOfMemoryError(str(error)) from error


def ran_out_of_memory(device: torch.device) -> bool:
    """Whether the allocator had no memory to give since this was last asked."""
    before = _refusals.get(device, 0)
    _refusals[device] = int(torch.cuda.memory_stats(device).get("num_ooms", 0))
    return _refusals[device] > before
