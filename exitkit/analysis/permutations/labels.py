"""Variables for the units of a graph's tensors: which are the same, where they occur, and which others they carry along.

Every element of every activation carries the number of the unit it belongs to, such as its channel; 0 stands for what must
stay where it is. Units that an operator joins (the channels of two summands, a channel and its entry in a BatchNorm) are tied.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Units = Tensor
"""int64: the unit of every element; broadcast (stride 0) where it does not change."""

Ids = NDArray[np.int64]

Axis = tuple[str, int]
"""A tensor's name in the state dict and one of its axes."""


@dataclass
class Link:
    """Owners (n,) and what each carries along, in order (n, m): an attention head and its channels."""

    owners: Ids
    members: Ids


@dataclass
class Ledger:
    """What the operators say of the units.

    Attributes:
        count: how many units there are; unit 0 is fixed.
        ties: pairs of equal units.
        roles: pairs of a unit and a role; units that can be exchanged have the same roles.
        links: owners with their members.
        axes: the units of axes of tensors.
        grids: the units of every element of parameters that stand in elementwise operators.
        frozen: why units were fixed, in words.
    """

    count: int = 1
    ties: list[Ids] = field(default_factory=list)
    roles: list[Ids] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    axes: dict[Axis, Units] = field(default_factory=dict)
    grids: dict[str, Units] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    role_numbers: dict[Hashable, int] = field(default_factory=dict)

    def fresh(self, size: int) -> Units:
        """New units (size,)."""
        made = torch.arange(self.count, self.count + size)
        self.count += size
        return made

    def axis(self, name: str, axis: int, size: int) -> Units:
        """The units of a tensor's axis, the same whenever it is asked for."""
        if (name, axis) not in self.axes:
            self.axes[name, axis] = self.fresh(size)
        return self.axes[name, axis]

    def grid(self, name: str, shape: Sequence[int]) -> Units:
        """The units of a parameter's elements, the same whenever it is asked for."""
        if name not in self.grids:
            self.grids[name] = self.fresh(int(np.prod(shape))).reshape(tuple(shape))
        return self.grids[name]

    def tie(self, first: Units, second: Units) -> None:
        """The units of two tensors, broadcast, are the same."""
        pairs = _pairs(first, second)
        self.ties.append(pairs[pairs[:, 0] != pairs[:, 1]])

    def fix(self, units: Units) -> None:
        """These stay where they are."""
        self.tie(units, torch.zeros((), dtype=torch.int64))

    def role(self, units: Units, role: Hashable) -> None:
        """The units occur in a place of this name."""
        found = np.unique(dense(units).numpy())
        self.roles.append(np.stack([found, np.full_like(found, self.number(role))], 1))

    def role_by(self, units: Units, role: Hashable, index: Units) -> None:
        """The units occur at these indices of a place, which are not alike."""
        pairs = _pairs(units, index)
        numbers = {one: self.number((role, one)) for one in np.unique(pairs[:, 1]).tolist()}
        self.roles.append(np.stack([pairs[:, 0], [numbers[one] for one in pairs[:, 1].tolist()]], 1))

    def number(self, role: Hashable) -> int:
        return self.role_numbers.setdefault(role, len(self.role_numbers))

    def link(self, owners: Units, members: Units) -> None:
        """Each owner carries along the members that stand at its place, in order; members are exchanged with their owner only.

        Where the pairs do not divide into lists of one length, everything is fixed.
        """
        pairs = _pairs(owners, members, keep_order=True)
        unique, where = np.unique(pairs[:, 0], return_inverse=True)
        lists = [pairs[where == at, 1] for at in range(len(unique))]
        together = np.concatenate(lists)
        if len({len(one) for one in lists}) != 1 or len(np.unique(together)) != len(together) or 0 in together:
            self.fix(owners)
            self.fix(members)
            return
        link = Link(unique, np.stack(lists))
        number = len(self.links)
        self.links.append(link)
        rows = [
            np.stack([row, np.full_like(row, self.number(owner_role(number, at)))], 1) for at, row in enumerate(lists)
        ]
        self.roles.append(np.concatenate(rows))


def owner_role(link: int, owner: int) -> tuple[str, int, int]:
    """The role of the members that an owner of a link carries along."""
    return ("owner", link, owner)


def fixed(shape: Sequence[int]) -> Units:
    """Units of a tensor in which nothing moves."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def along(units: Units, axis: int, shape: Sequence[int]) -> Units:
    """Units (size,) of one axis, for a tensor of a shape."""
    wanted = [1] * len(shape)
    wanted[axis] = -1
    return units.reshape(wanted).expand(tuple(shape))


def varies(units: Units, axis: int) -> bool:
    """Whether the units change along an axis."""
    axis %= units.dim()
    if units.shape[axis] < 2 or units.stride(axis) == 0:
        return False
    part = dense(units, keep=axis)
    return not bool((part == part.narrow(axis, 0, 1)).all())


def varying(units: Units) -> tuple[int, ...]:
    """The axes along which the units change."""
    return tuple(axis for axis in range(units.dim()) if varies(units, axis))


def moves(units: Units) -> bool:
    """Whether anything in a tensor may move."""
    return bool(dense(units).any())


def dense(units: Units, keep: int | None = None) -> Units:
    """Without the axes along which the units are the same by construction, which become of size 1."""
    for axis in range(units.dim()):
        if units.shape[axis] > 1 and units.stride(axis) == 0 and axis != keep:
            units = units.narrow(axis, 0, 1)
    return units


def _pairs(first: Units, second: Units, keep_order: bool = False) -> Ids:
    """Distinct pairs (P, 2) of two broadcast tensors, sorted or as they come."""
    first, second = torch.broadcast_tensors(first, second)
    for axis in range(first.dim()):
        if first.shape[axis] > 1 and first.stride(axis) == second.stride(axis) == 0:
            first, second = first.narrow(axis, 0, 1), second.narrow(axis, 0, 1)
    stacked = torch.stack([first.reshape(-1), second.reshape(-1)], 1).numpy()
    codes = stacked[:, 0] * (stacked[:, 1].max() + 1) + stacked[:, 1]
    _, at = np.unique(codes, return_index=True)
    return stacked[np.sort(at) if keep_order else at]
