"""From what a graph says of its units to groups of them that can be exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from exitkit.analysis.permutations.labels import Axis, Ids, Ledger, owner_role

_SEED = 20231


@dataclass(frozen=True)
class Part:
    """What each unit of a group has of one kind: m elements that may be exchanged within it.

    Attributes:
        indices: for every axis of a tensor, (n, m, k): where the m elements of each of the n units stand, k places each.
    """

    indices: dict[Axis, Ids]

    @property
    def elements(self) -> int:
        return int(next(iter(self.indices.values())).shape[1])


@dataclass(frozen=True)
class Group:
    """Units that can be exchanged for one another: channels, of one element each, or attention heads, of many.

    Attributes:
        units: how many, n.
        parts: what each unit has.
    """

    units: int
    parts: tuple[Part, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that move."""
        return tuple(dict.fromkeys(name for part in self.parts for name, _ in part.indices))

    def __str__(self) -> str:
        inner = (
            "" if all(part.elements == 1 for part in self.parts) else f" of {[part.elements for part in self.parts]}"
        )
        names = self.tensors
        return f"{self.units} units{inner} in {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"


class _Resolved:
    """The units once all ties are known.

    Attributes:
        of: the class of every unit; class ``of[0]`` is fixed.
        axes: the classes along every axis that moves.
        kind: of every class a number that sums up its roles; equal for those that can be exchanged.
    """

    def __init__(self, ledger: Ledger) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate([*ledger.ties, np.zeros((1, 2), np.int64)])
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(ledger.count, ledger.count))
        classes, self.of = connected_components(graph, directed=False)
        self.axes: dict[Axis, Ids] = {axis: self.of[units.numpy()] for axis, units in ledger.axes.items()}
        fixed = np.zeros(classes, bool)
        fixed[self.of[0]] = True
        for name, units in ledger.grids.items():
            found = _single_axis(self.of[units.numpy()])
            if found is None or any(name == other for other, _ in ledger.axes):
                fixed[self.of[units.numpy()]] = True
                fixed[[one for (other, _), row in self.axes.items() if other == name for one in row]] = True
            else:
                self.axes[name, found[0]] = found[1]
        self.fixed = fixed
        self.kind, self._number = self._kinds(ledger, classes)

    def _kinds(self, ledger: Ledger, classes: int) -> tuple[Ids, Ids]:
        """Sums of random 64-bit numbers, one for each role and each axis that a class stands in."""
        numbers = np.random.default_rng(_SEED).integers(2**63, size=len(ledger.role_numbers) + len(self.axes))
        kind = np.zeros(classes, np.int64)
        if ledger.roles:
            rows = np.concatenate(ledger.roles)
            rows = np.unique(np.stack([self.of[rows[:, 0]], rows[:, 1]], 1), axis=0)
            np.add.at(kind, rows[:, 0], numbers[rows[:, 1]])
        for at, row in enumerate(self.axes.values()):
            np.add.at(kind, row, numbers[len(ledger.role_numbers) + at])
        return kind, numbers


def _single_axis(grid: Ids) -> tuple[int, Ids] | None:
    """The axis along which alone the classes change, and the classes along it; None where there is none, as in no units."""
    if not grid.size:
        return None
    changing = [axis for axis in range(grid.ndim) if (grid != grid.take([0], axis)).any()]
    if len(changing) != 1:
        return None
    return changing[0], np.moveaxis(grid, changing[0], 0).reshape(grid.shape[changing[0]], -1)[:, 0]


def groups_of(ledger: Ledger) -> tuple[Group, ...]:
    """Every group of units that can be exchanged, in the order of the graph; what may not move is in none."""
    resolved = _Resolved(ledger)
    free = set(np.flatnonzero(~resolved.fixed).tolist())
    where = {axis: _places(row, free) for axis, row in resolved.axes.items()}
    made: list[tuple[int, Group]] = []
    used: set[int] = set()
    for parts in _bundles(ledger, resolved):
        group = _group(parts, where)
        members = {int(one) for part in parts for one in part.ravel()}
        if group is not None and not members & used:
            used |= members
            made.append((min(members), group))
    alike: dict[int, list[int]] = {}
    for one in sorted(free - used):
        alike.setdefault(int(resolved.kind[one]), []).append(one)
    for classes in alike.values():
        group = _group([np.array(classes)[:, None]], where) if len(classes) > 1 else None
        if group is not None:
            made.append((min(classes), group))
    return tuple(group for _, group in sorted(made, key=lambda pair: pair[0]))


def _bundles(ledger: Ledger, resolved: _Resolved) -> Iterator[list[Ids]]:
    """Owners with all that they carry along, where owners can be exchanged: lists of classes (n, m), one for each kind."""
    together: dict[tuple[int, ...], list[int]] = {}
    for number, link in enumerate(ledger.links):
        owners = resolved.of[link.owners]
        order = np.argsort(owners, kind="stable")
        together.setdefault(tuple(owners[order].tolist()), []).append(number)
    for owners, links in together.items():
        if len(set(owners)) < len(owners) or len({int(resolved.kind[one]) for one in owners}) > 1:
            continue
        columns, kinds = [], []
        for number in links:
            order = np.argsort(resolved.of[ledger.links[number].owners], kind="stable")
            columns.append(resolved.of[ledger.links[number].members[order]])
            kinds.append(_without_owners(resolved, ledger, columns[-1], links))
        members, kind = np.concatenate(columns, 1), np.concatenate(kinds, 1)
        _, first = np.unique(members[0], return_index=True)
        members, kind = members[:, np.sort(first)], kind[:, np.sort(first)]
        if resolved.fixed[members].any() or resolved.fixed[list(owners)].any() or (kind != kind[0]).any():
            continue
        if len(np.unique(members)) < members.size:
            continue
        parts = [members[:, kind[0] == one] for one in dict.fromkeys(kind[0].tolist())]
        yield [np.array(owners)[:, None], *parts]


def _without_owners(resolved: _Resolved, ledger: Ledger, members: Ids, links: Sequence[int]) -> Ids:
    """The members' kinds, but for the roles that say whose they are."""
    kind = resolved.kind[members].copy()
    for number in links:
        link = ledger.links[number]
        for owner, carried in enumerate(link.members):
            role = ledger.role_numbers[owner_role(number, owner)]
            kind[np.isin(members, resolved.of[carried])] -= resolved._number[role]
    return kind


def _places(row: Ids, free: set[int]) -> dict[int, list[int]]:
    """The indices at which each class that may move stands."""
    found: dict[int, list[int]] = {}
    for index, one in enumerate(row.tolist()):
        if one in free:
            found.setdefault(one, []).append(index)
    return found


def _group(parts: Sequence[Ids], where: dict[Axis, dict[int, list[int]]]) -> Group | None:
    """The group of some classes (n, m) each; None where no tensor has them, or nothing could change places."""
    made = []
    for part in parts:
        indices = {}
        for axis, places in where.items():
            if all(int(one) in places for one in part.ravel()):
                indices[axis] = np.array([[places[int(one)] for one in row] for row in part])
        if indices:
            made.append(Part(indices))
    units = len(parts[0])
    if not made or (units < 2 and all(part.elements < 2 for part in made)):
        return None
    return Group(units, tuple(made))
