"""Placement: which boundaries get an exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from exitkit.common.checks import Bounds, Share, check
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.surgery.boundaries import Anatomy, Boundary

Pattern = Literal["dense-sparse", "sparse-dense", "sdn"]
SDN_SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Of the compute, where Shallow-Deep Networks (Kaya et al. 2019, section 4) has its six exits."""
SPREAD = (0.15, 0.45, 0.75)
"""Shares of the backbone's MACs near which exits are by default: few, as each takes time from every sample that comes by."""

_LISTED = "exitkit.inspect(model) lists the boundaries"


def place(
    anatomy: Anatomy,
    every: int | None = None,
    at: Sequence[str | int] | None = None,
    at_cost: Sequence[float] | None = None,
    placement: str | None = None,
    first: int | None = None,
) -> tuple[Boundary, ...]:
    """The boundaries chosen by one of the first four arguments, in execution order; by default the blocks nearest to
    :data:`SPREAD`. ``first`` is the block that ``every`` begins with.

    Raises:
        ExitkitError: several arguments at once, a value out of range, or an unknown boundary name.
    """
    given = {"every": every, "at": at, "at_cost": at_cost, "placement": placement}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ArgumentError(
            f"{' and '.join(named)} were given together; exits are placed by one of {', '.join(given)}"
        )
    if first is not None and every is None:
        raise ArgumentError(f"first={first!r} is the block that every= begins with; give every= too")
    if at is not None:
        return _at(anatomy, at)
    if at_cost is not None:
        return _at_cost(anatomy, at_cost)
    if placement is not None:
        return _patterned(anatomy, placement)
    if every is None and len(anatomy.blocks) - 1 > len(SPREAD):
        return _at_cost(anatomy, SPREAD)
    return _every(anatomy, 1 if every is None else every, first)


def _every(anatomy: Anatomy, every: int, first: int | None) -> tuple[Boundary, ...]:
    inner = anatomy.blocks[:-1]
    if not inner:
        raise ArgumentError(
            f"the backbone has too few blocks ({len(anatomy.blocks)}) for every=, since no exit follows the last one; use "
            f"at=[{anatomy.boundaries[0].name!r}]"
        )
    remedy = f"the backbone has {len(anatomy.blocks)} blocks, and no exit follows the last; {_LISTED}"
    check("every", every, Annotated[int, Bounds(least=1, most=len(inner))], remedy)
    check("first", first, Annotated[int, Bounds(least=0, most=len(inner) - 1)] | None, remedy)
    return inner[every - 1 if first is None else first :: every]


def _at(anatomy: Anatomy, wanted: Sequence[str | int]) -> tuple[Boundary, ...]:
    example = wanted if isinstance(wanted, str | int) else anatomy.boundaries[0].name
    check("at", wanted, list | tuple, f"at=[{example!r}]")
    by_name = _by_name(anatomy)
    chosen: dict[int, Boundary] = {}
    for boundary in (_found(anatomy, by_name, one) for one in wanted):
        if chosen.setdefault(boundary.position, boundary).read != boundary.read:
            raise ArgumentError(
                f"at={wanted!r} reads two activations at {boundary.call.name!r}; an exit reads one of them"
            )
    if not chosen:
        raise ArgumentError(f"at=[] must name at least one boundary; {_LISTED}")
    if len(chosen) < len(wanted):
        raise ArgumentError(
            f"at={wanted!r} has {counted(len(wanted), 'entry', 'entries')}, but {counted(len(chosen), 'place')}: one is named "
            "twice; name each once"
        )
    return tuple(chosen[position] for position in sorted(chosen))


def _found(anatomy: Anatomy, by_name: dict[str, Boundary], one: object) -> Boundary:
    """A boundary by any of its names, or a block by the number that :func:`exitkit.inspect` prints."""
    if isinstance(one, int) and not isinstance(one, bool):
        if not 0 <= one < len(anatomy.blocks):
            raise ArgumentError(
                f"at: {one} is no block's number; they go from 0 to {len(anatomy.blocks) - 1}, and {_LISTED}"
            )
        return anatomy.blocks[one]
    if not isinstance(one, str) or one not in by_name:
        raise unknown_name("at", one, by_name, f"{_LISTED}.")
    return by_name[one]


def _by_name(anatomy: Anatomy) -> dict[str, Boundary]:
    """Boundaries by every name they have; ``name[i]`` reads the i-th of several activations."""
    named: dict[str, Boundary] = {}
    for boundary in anatomy.boundaries:
        variants = [replace(boundary, read=index) for index in range(len(boundary.activations))]
        for name in (*boundary.aliases, boundary.call.name):
            named |= {f"{name}[{variant.read}]": variant for variant in variants} | {name: boundary}
    return named


def _at_cost(anatomy: Anatomy, shares: Sequence[float]) -> tuple[Boundary, ...]:
    """The block nearest to each share of the backbone's MACs; two shares never take the same block."""
    check("at_cost", shares, list | tuple, "shares of the backbone's MACs, such as at_cost=[0.25, 0.5]")
    candidates = list(anatomy.blocks[:-1])
    chosen: list[Boundary] = []
    for index, share in enumerate(shares):
        check(f"at_cost[{index}]", share, Share, "each is a share of the backbone's MACs")
        free = [boundary for boundary in candidates if boundary not in chosen]
        if not free:
            raise ArgumentError(
                f"at_cost has {len(shares)} shares, but only {len(candidates)} blocks can have an exit"
            )
        chosen.append(min(free, key=lambda boundary: abs(boundary.share - share)))
    if not chosen:
        raise ArgumentError("at_cost=[] must hold at least one share, such as at_cost=[0.25, 0.5]")
    return tuple(sorted(chosen, key=lambda boundary: boundary.position))


def _patterned(anatomy: Anatomy, placement: str) -> tuple[Boundary, ...]:
    """Kubaty et al., placement ablation: on 16 blocks, 1-7 and 11, or 1, 4 and 8-14 (counted from 0); or SDN's shares."""
    check("placement", placement, Pattern)
    if placement == "sdn":
        return _at_cost(anatomy, SDN_SHARES)
    blocks = anatomy.blocks
    count = len(blocks)
    half, quarter = count // 2, max(1, count // 4)
    if placement == "dense-sparse":
        indices = {*range(1, half), *range(half - 1 + quarter, count - 1, quarter)}
    else:
        indices = {1, *range(quarter, half, quarter), *range(half, count - 1)}
    chosen = tuple(blocks[index] for index in sorted(indices) if 0 < index < count - 1)
    if not chosen:
        raise ArgumentError(f"placement={placement!r} needs at least 3 blocks; the backbone has {count}. Use every=1")
    return chosen
