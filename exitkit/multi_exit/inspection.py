"""``inspect``: the boundaries of a model, and what each stage between them costs, as a table."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from exitkit.common.console import counted, make_console
from exitkit.surgery.boundaries import Anatomy, Boundary, find_boundaries
from exitkit.surgery.capturing import Capture, capture, untouched
from exitkit.surgery.macs import ptflops_macs

if TYPE_CHECKING:
    from rich.table import Table

_AXES = {
    "channels_first": "CHW",
    "channels_last": "HWC",
    "tokens": "TD",
    "sequence": "CT",
    "vector": "D",
    "other": "",
}


@dataclass(frozen=True)
class StageCost:
    """What one stage of a backbone costs for one sample; over the stages, all but the peak adds up to the backbone's.

    Attributes:
        name: the block that the stage ends with; ``"backbone"`` for the last stage, which ends with the logits.
        macs: its MACs.
        ptflops_macs: its MACs as ptflops counts them; None where ptflops is not installed.
        parameter_bytes: its parameters; those that an earlier stage reads too are counted there.
        activation_bytes: its peak of activation memory: the most bytes of values alive at any one operation, which are
            the operation's arguments, its result and whatever is used later. A view takes no bytes of its own, a value
            is freed after its last use; parameters, buffers and a kernel's own workspace are not counted.
    """

    name: str
    macs: int
    ptflops_macs: int | None
    parameter_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Inspection:
    """A backbone's anatomy and costs, printable. ``blocks`` are what ``every=`` counts; ``at=`` accepts any boundary.

    ``stages`` run from block to block: one up to each, and one from the last to the logits.
    """

    model: str
    anatomy: Anatomy
    stages: tuple[StageCost, ...]

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        return self.anatomy.boundaries

    @property
    def blocks(self) -> tuple[Boundary, ...]:
        return self.anatomy.blocks

    @property
    def ptflops_macs(self) -> int | None:
        """The backbone's MACs as ptflops counts them; None where ptflops is not installed."""
        counts = [stage.ptflops_macs for stage in self.stages if stage.ptflops_macs is not None]
        return sum(counts) if counts else None

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON holds: the stages, and the names that ``at=`` accepts."""
        return {
            "model": self.model,
            "macs": self.anatomy.macs,
            "stages": [asdict(stage) for stage in self.stages],
            "boundaries": [boundary.name for boundary in self.boundaries],
        }

    def table(self) -> Table:
        """The stages as a Rich table, with the feature at the end of each."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"{self.model}: {len(self.blocks)} blocks",
            caption=self._caption(),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        crossed = self.ptflops_macs is not None
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("boundary", no_wrap=True)
        table.add_column("type", overflow="ellipsis")
        table.add_column("feature", no_wrap=True)
        numbers = ("MMACs", *(["ptflops"] if crossed else []), "so far", "params\nMiB", "peak\nMiB")
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=True)
        shares = [*(block.share for block in self.blocks), 1.0]
        for index, (stage, share) in enumerate(zip(self.stages, shares, strict=True)):
            place = (
                (str(index), stage.name, self.blocks[index].call.type, _feature(self.blocks[index]))
                if index < len(self.blocks)
                else ("", stage.name, "", "logits")
            )
            cross = [] if stage.ptflops_macs is None else [f"{stage.ptflops_macs / 1e6:,.1f}"]
            memory = f"{_mebi(stage.parameter_bytes):,.2f}", f"{_mebi(stage.activation_bytes):,.2f}"
            table.add_row(*place, f"{stage.macs / 1e6:,.1f}", *cross, f"{share:.1%}", *memory)
        return table

    def _caption(self) -> str:
        cross = "" if self.ptflops_macs is None else f" (ptflops: {_giga(self.ptflops_macs)})"
        parameters = _mebi(sum(stage.parameter_bytes for stage in self.stages))
        peak = _mebi(max(stage.activation_bytes for stage in self.stages))
        others = len(self.boundaries) - len(self.blocks)
        uncounted = self.anatomy.costs.uncounted
        warning = (
            f" MACs of {', '.join(uncounted)} are counted as 0; torch.utils.flop_counter.register_flop_formula adds a formula."
            if uncounted
            else ""
        )
        return (
            f"backbone: {_giga(self.anatomy.macs)}{cross}, {parameters:,.2f} MiB of parameters, activations of one sample "
            f"peak at {peak:,.2f} MiB. {counted(others, 'more clean cut')} can be named with at=.{warning}"
        )

    def __str__(self) -> str:
        text = io.StringIO()
        make_console(text).print(self.table())
        return text.getvalue()


def inspect(model: nn.Module, example_inputs: Any = None, *, show: bool = True) -> Inspection:
    """Print the boundaries of ``model`` and the costs of its stages: feature shape, MACs, share so far, memory.

    Args:
        model: any classifier; it stays as it is.
        example_inputs: as for :func:`exitkit.attach`. Costs are those of one sample of this size; for text, of this
            length.
        show: print the table (the return value holds the same).

    Raises:
        ExitkitError: the model cannot be captured or has no boundary.
    """
    captured = capture(model, example_inputs)
    anatomy = find_boundaries(captured)
    inspection = Inspection(type(model).__name__, anatomy, _stage_costs(captured, anatomy))
    if show:
        make_console().print(inspection.table())
    return inspection


def _stage_costs(captured: Capture, anatomy: Anatomy) -> tuple[StageCost, ...]:
    costs = anatomy.costs
    with untouched(captured.backbone):
        cross = ptflops_macs(captured.graph, captured.example)
    cuts = [-1, *(block.position for block in anatomy.blocks), len(costs.macs) - 1]
    names = [*(block.name for block in anatomy.blocks), "backbone"]
    return tuple(
        StageCost(
            name,
            _spent(costs.macs, start, end),
            None if cross is None else _spent(cross, start, end),
            _spent(costs.parameter_bytes, start, end),
            max(costs.alive_bytes[start + 1 : end + 1]),
        )
        for name, (start, end) in zip(names, pairwise(cuts), strict=True)
    )


def _spent(so_far: tuple[int, ...], start: int, end: int) -> int:
    """What the nodes after position ``start`` and up to ``end`` cost, given what all up to each node do."""
    return so_far[end] - (so_far[start] if start >= 0 else 0)


def _feature(boundary: Boundary) -> str:
    """The activation that a head reads, and how many others are alive beside it: ``256 × 8 × 8 CHW +2``."""
    beside, axes = len(boundary.activations) - 1, _AXES[boundary.layout]
    if len(boundary.shape) == 4:
        axes = axes.replace("H", "TH")  # time, or depth
    return f"{' × '.join(map(str, boundary.shape))} {axes}" + (f" +{beside}" if beside else "")


def _mebi(count: int) -> float:
    return count / 2**20


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.2f} GMACs" if macs >= 1e8 else f"{macs / 1e6:.2f} MMACs"
