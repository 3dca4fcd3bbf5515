"""Which weights a backbone has: every value counts, precision does not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import exitkit
from exitkit import ExitkitError, MultiExitModel
from exitkit.surgery.fingerprint import fingerprint_of, same_weights, weights_digest
from tests.toy import TinyNet, images

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def wide() -> nn.Linear:
    """10,000 weights in one tensor."""
    return nn.Linear(100, 100)


@pytest.mark.parametrize("place", [0, 1, 77, 78, 5_000, 9_998, 9_999])
def test_one_other_value_is_noticed_wherever_it_is(wide: nn.Linear, place: int) -> None:
    edited = copy.deepcopy(wide)
    with torch.no_grad():
        edited.weight.view(-1)[place] += 0.5
    assert weights_digest(wide) != weights_digest(edited)
    assert not same_weights(fingerprint_of(wide), fingerprint_of(edited))


def test_values_that_changed_places_are_noticed(wide: nn.Linear) -> None:
    edited = copy.deepcopy(wide)
    with torch.no_grad():
        edited.weight.view(-1)[[3, 4]] = edited.weight.view(-1)[[4, 3]]
    assert weights_digest(wide) != weights_digest(edited)
    assert not same_weights(fingerprint_of(wide), fingerprint_of(edited))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_converted_model_is_recognised(wide: nn.Linear, dtype: torch.dtype) -> None:
    other = copy.deepcopy(wide).to(dtype)
    assert same_weights(fingerprint_of(wide), fingerprint_of(other))
    assert same_weights(fingerprint_of(other), fingerprint_of(copy.deepcopy(other).float()))
    with torch.no_grad():
        other.weight[50, 51] += 0.5
    assert not same_weights(fingerprint_of(wide), fingerprint_of(other))


def test_memory_layout_is_no_part_of_it() -> None:
    net = nn.Conv2d(8, 8, 3)
    assert weights_digest(net) == weights_digest(copy.deepcopy(net).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_exits_do_not_load_on_a_sparsely_edited_backbone(
    tmp_path: Path, tiny_net: TinyNet, dtype: torch.dtype
) -> None:
    exitkit.attach(tiny_net, images()).save_pretrained(tmp_path)
    backbone = copy.deepcopy(tiny_net).to(dtype)
    MultiExitModel.from_pretrained(backbone, tmp_path)
    with torch.no_grad():
        backbone.blocks[1].conv1.weight.view(-1)[101] += 0.5  # of 576, of which every ninth was looked at
    with pytest.raises(ExitkitError, match=r"another backbone: 'blocks\.1\.conv1\.weight 8×8×3×3' has other values"):
        MultiExitModel.from_pretrained(backbone, tmp_path)
