"""``ExitTimes``: what answering at each exit takes on a device, for budgets in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitkit.common.checks import Count, check, numbers_in
from exitkit.common.errors import ArgumentError


@dataclass(frozen=True)
class ExitTimes:
    """Measured times of one device and batch size; :func:`exitkit.time_exits` makes it.

    Attributes:
        device: its kind, ``"cpu"`` or ``"cuda"``.
        hardware: its name.
        batch: how many samples are answered together.
        milliseconds: (M+1,) until a batch has its answers when all of it leaves at this exit; never falls.

    Raises:
        ArgumentError: times that are not positive or fall, a batch below 1, or names that are not texts.
    """

    device: str
    hardware: str
    batch: int
    milliseconds: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "milliseconds", tuple(checked_times(self.milliseconds).tolist()))
        check("batch", self.batch, Count)
        object.__setattr__(self, "batch", int(self.batch))  # a numpy integer cannot be written as JSON
        if not isinstance(self.device, str) or not isinstance(self.hardware, str):
            raise ArgumentError(f"device={self.device!r}, hardware={self.hardware!r} must be names, such as 'cuda'")

    @property
    def place(self) -> tuple[str, str, int]:
        """What was measured: device, hardware and batch."""
        return self.device, self.hardware, self.batch

    def __str__(self) -> str:
        return f"device={self.device!r} ({self.hardware}), batch={self.batch}"


def checked_times(given: Any, exits: int | None = None) -> NDArray[np.float64]:
    """(M+1,) times to answer at each exit, in milliseconds.

    Raises:
        ArgumentError: no numbers, times that are not positive and finite or that fall, or another number of them.
    """
    times = numbers_in(given)
    wrong = exits is not None and len(times) != exits
    if wrong or not len(times) or not np.isfinite(times).all() or not times[0] > 0 or not (np.diff(times) >= 0).all():
        raise ArgumentError(
            f"milliseconds={given!r} must hold {'' if exits is None else f'{exits} '}positive times, to answer at each exit "
            "and at the backbone, none below the one before it"
        )
    return times


def selected(timings: Sequence[ExitTimes], device: str | None, batch: int | None) -> int:
    """The place among ``timings`` of the one for this device (its kind or its name) and batch, where it is the only one.

    Raises:
        ArgumentError: none or several of them; the message says which were measured.
    """
    found = [
        place
        for place, one in enumerate(timings)
        if device in (None, one.device, one.hardware) and batch in (None, one.batch)
    ]
    if len(found) == 1:
        return found[0]
    measured = "; ".join(map(str, timings)) or "nothing"
    raise ArgumentError(
        f"device={device!r}, batch={batch!r} {'fits several measurements' if found else 'was not measured'}; measured: "
        f"{measured}. Measure with exitkit.time_exits(engine, samples, batches=[...]) and outputs.timed(times)"
    )
