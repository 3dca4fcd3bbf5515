"""Which boundaries get an exit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import exitkit
from exitkit.surgery.boundaries import Anatomy
from exitkit.surgery.placement import place
from tests.toy import TinyNet, images, names


@pytest.fixture(scope="module")
def resnet50() -> Anatomy:
    torchvision_models = pytest.importorskip("torchvision.models")
    model = torchvision_models.resnet50(weights=None)
    return exitkit.inspect(model, images(channels=3, height=32, width=32), show=False).anatomy


def indices(anatomy: Anatomy, **arguments: Any) -> list[int]:
    return [anatomy.blocks.index(boundary) for boundary in place(anatomy, **arguments)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, list(range(15))), (2, [1, 3, 5, 7, 9, 11, 13]), (3, [2, 5, 8, 11, 14]), (8, [7]), (15, [14])],
)
def test_every_counts_blocks_and_never_takes_the_last(resnet50: Anatomy, every: int, expected: list[int]) -> None:
    assert indices(resnet50, every=every) == expected


@pytest.mark.parametrize(
    ("every", "first", "expected"), [(1, 1, list(range(1, 15))), (3, 1, [1, 4, 7, 10, 13]), (4, 0, [0, 4, 8, 12])]
)
def test_every_begins_with_the_first(resnet50: Anatomy, every: int, first: int, expected: list[int]) -> None:
    assert indices(resnet50, every=every, first=first) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"every": 1, "first": 15}, "first=15 must be a whole number"),
        ({"every": 1, "first": -1}, "first=-1"),
        ({"first": 1}, "first=1 is the block that every= begins with"),
        ({"at": [0], "first": 1}, "give every= too"),
    ],
)
def test_a_first_block_that_is_none_is_refused(resnet50: Anatomy, where: dict[str, Any], message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        place(resnet50, **where)


def test_sdn_places_by_compute(resnet50: Anatomy) -> None:
    assert indices(resnet50, placement="sdn") == indices(resnet50, at_cost=[0.15, 0.3, 0.45, 0.6, 0.75, 0.9])


def test_dense_sparse(resnet50: Anatomy) -> None:
    assert indices(resnet50, placement="dense-sparse") == [1, 2, 3, 4, 5, 6, 7, 11]


def test_sparse_dense(resnet50: Anatomy) -> None:
    assert indices(resnet50, placement="sparse-dense") == [1, 4, 8, 9, 10, 11, 12, 13, 14]


def test_at_cost_takes_the_nearest_block(resnet50: Anatomy) -> None:
    shares = torch.tensor([block.share for block in resnet50.blocks[:-1]])
    wanted = [0.15, 0.3, 0.45, 0.9]
    assert indices(resnet50, at_cost=wanted) == [int((shares - share).abs().argmin()) for share in wanted]


def test_at_cost_by_hand(tiny_net: TinyNet) -> None:
    """Shares of the blocks: about 26, 51, 75 and 100%."""
    assert names(exitkit.attach(tiny_net, images(), at_cost=[0.7, 0.3])) == ["blocks.0", "blocks.2"]


def test_at_cost_never_takes_a_block_twice(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images(), at_cost=[0.5, 0.5])) in (
        ["blocks.0", "blocks.1"],
        ["blocks.1", "blocks.2"],
    )


def test_by_default_three_exits_are_spread_over_the_cost(resnet50: Anatomy) -> None:
    shares = torch.tensor([block.share for block in resnet50.blocks[:-1]])
    assert indices(resnet50) == [int((shares - share).abs().argmin()) for share in (0.15, 0.45, 0.75)]


def test_by_default_every_block_where_there_are_no_more_than_three(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images())) == ["blocks.0", "blocks.1", "blocks.2"]


def test_at_orders_by_execution(tiny_net: TinyNet) -> None:
    assert names(exitkit.attach(tiny_net, images(), at=["blocks.2", "stem"])) == ["stem", "blocks.2"]


def test_at_takes_the_numbers_that_inspect_prints(tiny_net: TinyNet, capsys: pytest.CaptureFixture[str]) -> None:
    exitkit.inspect(tiny_net, images())
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit())
    assert len(printed) == 4
    for number, name in printed.items():
        assert names(exitkit.attach(tiny_net, images(), at=[int(number)])) == [name]
    assert names(exitkit.attach(tiny_net, images(), at=[2, "blocks.0"])) == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([4], "4 is no block's number; they go from 0 to 3"),
        ([-1], "-1 is no block's number"),
        ([True], "at=True is unknown"),
        (["blocks.2", "stem", "blocks.2"], "one is named twice"),
        (["blocks.2", 2], "one is named twice"),
        (["blocks", "blocks.3"], "one is named twice"),
        (0, "at=\\[0\\]"),
    ],
)
def test_wrong_at_is_refused(tiny_net: TinyNet, at: Any, message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        exitkit.attach(tiny_net, images(), at=at)


def test_at_takes_the_name_of_any_call_that_ends_there(tiny_net: TinyNet) -> None:
    """``blocks`` ends with its last child."""
    assert names(exitkit.attach(tiny_net, images(), at=["blocks"])) == ["blocks.3"]


def test_no_boundary_inside_a_residual_block(tiny_net: TinyNet) -> None:
    found = exitkit.inspect(tiny_net, images(), show=False).boundaries
    inside = [name for boundary in found for name in (boundary.name, *boundary.aliases) if ".conv" in name]
    assert inside == []
