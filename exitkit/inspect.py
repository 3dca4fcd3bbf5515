"""``inspect``: the boundaries of a model as a table."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from exitkit.console import make_console
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.capture import capture
from exitkit.surgery.macs import ptflops_macs


@dataclass(frozen=True)
class Inspection:
    """A backbone's anatomy, printable. ``blocks`` are what ``every=`` counts; ``at=`` accepts any boundary."""

    model: str
    anatomy: Anatomy
    ptflops_macs: int | None

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        return self.anatomy.boundaries

    @property
    def blocks(self) -> tuple[Boundary, ...]:
        return self.anatomy.blocks

    def table(self) -> Table:
        """The blocks as a Rich table."""
        table = Table(
            title=f"{self.model}: {len(self.blocks)} blocks", caption=self._caption(), caption_justify="left"
        )
        table.add_column("#", justify="right")
        table.add_column("boundary", no_wrap=True)
        table.add_column("type")
        table.add_column("feature")
        table.add_column("MMACs so far", justify="right")
        table.add_column("share", justify="right")
        for index, boundary in enumerate(self.blocks):
            shape = " × ".join(map(str, boundary.shape)) + f" ({boundary.layout.replace('_', ' ')})"
            cost = f"{boundary.macs / 1e6:,.1f}", f"{boundary.share:.1%}"
            table.add_row(str(index), boundary.name, boundary.call.type, shape, *cost)
        return table

    def _caption(self) -> str:
        cross = "" if self.ptflops_macs is None else f" (ptflops: {_giga(self.ptflops_macs)})"
        others = len(self.boundaries) - len(self.blocks)
        return f"backbone: {_giga(self.anatomy.macs)}{cross}. {others} more clean cuts can be named with at=."

    def __str__(self) -> str:
        text = io.StringIO()
        make_console(text).print(self.table())
        return text.getvalue()


def inspect(model: nn.Module, example_inputs: Any = None, *, show: bool = True) -> Inspection:
    """Print the boundaries of ``model``: name, type, feature shape, MACs so far, share of the backbone.

    Args:
        model: any classifier; it stays as it is.
        example_inputs: as for :func:`exitkit.attach`.
        show: print the table (the return value holds the same).

    Raises:
        ExitkitError: the model cannot be captured or has no boundary.
    """
    captured = capture(model, example_inputs)
    inspection = Inspection(
        type(model).__name__, find_boundaries(captured), ptflops_macs(captured.graph, captured.example)
    )
    if show:
        make_console().print(inspection.table())
    return inspection


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.2f} GMACs" if macs >= 1e8 else f"{macs / 1e6:.2f} MMACs"
