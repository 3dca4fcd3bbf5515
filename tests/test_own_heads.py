"""Heads of one's own: functions from a feature to a module, and convolutions with a stride and a width."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit import MultiExitModel
from exitkit.exits import Feature, SDNPool, conv, msdnet
from exitkit.exits.classifiers import HeadSpec, InternalClassifier, make_head
from tests.toy import TinyNet, images


def averaged(feature: Feature, width: int = 6) -> nn.Module:
    """A convolution of kernel 1, the mean over all places, tanh."""
    return nn.Sequential(nn.Conv2d(feature.maps[0], width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())


class Flat(nn.Module):
    """A class does as well as a function."""

    def __init__(self, feature: Feature) -> None:
        super().__init__()
        self.layer = nn.Linear(feature.maps[0], 4)

    def forward(self, maps: Tensor) -> Tensor:
        vector: Tensor = self.layer(maps.mean((2, 3)))
        return vector


def body(feature: Feature, head: Any) -> nn.Module:
    return make_head(feature, 3, HeadSpec.parse(head), cascade=False).body


def maps(channels: int = 6, height: int = 20, width: int = 20, side: int | None = 84) -> Feature:
    return Feature((channels, height, width), "channels_first", image_side=side)


@pytest.mark.parametrize("method", ["sdn", "ztw", "gpf"])
def test_an_own_head_is_priced_and_linked_as_any_other(tiny_net: TinyNet, method: str) -> None:
    ee = exitkit.attach(tiny_net, images(), every=1, method=method, head=averaged)
    assert [logits.shape for logits in ee(images(5)).logits] == [(5, 3)] * 4
    if method == "sdn":
        assert ee.exits[0].macs == ee.boundaries[0].macs + 8 * 6 * 64 + 6 * 3
    if method == "ztw":
        second = ee.classifiers[1]
        assert isinstance(second, InternalClassifier)
        assert second.linear.in_features == 6 + 3


def test_an_own_head_computes_what_its_module_does(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, images(), at=["blocks.1"], method="sdn", head=averaged).eval()
    x = images(4)
    feature = tiny_net.blocks[1](tiny_net.blocks[0](tiny_net.stem(x)))
    head = ee.classifiers[0]
    assert isinstance(head, InternalClassifier)
    weight, bias = head.body[0].weight, head.body[0].bias  # type: ignore[index]
    vector = torch.tanh(F.conv2d(feature, weight, bias).mean((2, 3)))
    assert torch.allclose(ee(x).logits[0], vector @ head.linear.weight.T + head.linear.bias, atol=1e-6)


def test_an_own_head_learns_runs_and_is_packed(tiny_net: TinyNet, tmp_path: Path) -> None:
    ee = exitkit.attach(tiny_net.eval(), images(), at=["blocks.1"], head=averaged)
    x, labels = torch.randn(32, 1, 8, 8), torch.randint(3, (32,))
    before = [parameter.clone() for parameter in ee.added_parameters()]
    exitkit.Trainer(ee, regime="disjoint", epochs=1, show_progress=False).fit([(x, labels)])
    assert not all(torch.equal(old, new) for old, new in zip(before, ee.added_parameters(), strict=True))
    wanted = ee(x).logits
    assert torch.allclose(exitkit.compile(ee, 0.0)(x).logits, wanted[0], atol=1e-5)
    exitkit.export(ee, tmp_path / "model.pt2", threshold=2.0)
    assert torch.allclose(exitkit.load(tmp_path / "model.pt2", trust=True)(x).logits, wanted[-1], atol=1e-5)


@pytest.mark.parametrize(
    "head", [averaged, partial(averaged, width=5), Flat, "tests.test_own_heads:averaged(width=7)"]
)
def test_own_heads_come_back_by_their_import_path(tiny_net: TinyNet, tmp_path: Path, head: Any) -> None:
    ee = exitkit.attach(tiny_net.eval(), images(), every=1, head=head)
    ee.save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(tiny_net, tmp_path)
    assert isinstance(again.head, str)
    assert again.head.startswith("tests.test_own_heads:")
    assert again.head == ee.head
    for mine, other in zip(ee(images(4)).logits, again(images(4)).logits, strict=True):
        assert torch.equal(mine, other)


def test_a_function_that_cannot_be_imported_is_given_on_loading(tiny_net: TinyNet, tmp_path: Path) -> None:
    def local(feature: Feature) -> nn.Module:
        return averaged(feature, 3)

    ee = exitkit.attach(tiny_net.eval(), images(), every=2, head=local)
    ee.save_pretrained(tmp_path)
    with pytest.raises(exitkit.ArgumentError, match=r"<locals>\.local'.*import tests.test_own_heads first, or.*head="):
        MultiExitModel.from_pretrained(tiny_net, tmp_path)
    again = MultiExitModel.from_pretrained(tiny_net, tmp_path, head=local)
    assert torch.equal(ee(images(4)).logits[0], again(images(4)).logits[0])
    with pytest.raises(exitkit.ExitkitError, match=r"expected .*Give the function that made these heads as head="):
        MultiExitModel.from_pretrained(tiny_net, tmp_path, head=averaged)  # of another width


@pytest.mark.parametrize("name", ["antigravity:fly", "os:getcwd", "builtins:exec", "tests.toy:images"])
def test_a_saved_name_imports_nothing_and_calls_no_builtin(tiny_net: TinyNet, tmp_path: Path, name: str) -> None:
    from exitkit.exits.own import check_imported

    if name == "tests.toy:images":  # a function of an imported module: it may be called, and makes no module
        with pytest.raises(exitkit.ArgumentError, match=r"tests.toy:images'.*(fails|Module)"):
            exitkit.attach(tiny_net, images(), every=2, head=name)
        return
    if name == "os:getcwd":
        name = "posix:getcwd"
    with pytest.raises(exitkit.ArgumentError, match="no imported module defines that function"):
        check_imported(name)


def shapeless(feature: Feature) -> nn.Module:
    return nn.Conv2d(feature.maps[0], 2, 1)


def moody(feature: Feature) -> nn.Module:
    return averaged(feature, random.randint(2, 10**6))


def broken(feature: Feature) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 3))


_SHARED = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 3))


def shared(feature: Feature) -> nn.Module:
    return _SHARED


class Sliced(nn.Module):
    """Averages of the first few channels: one more at every call, or as many as modules were made."""

    made = 0

    def __init__(self, feature: Feature, grows: bool) -> None:
        super().__init__()
        Sliced.made += 1
        self.grows, self.width = grows, 2 + Sliced.made % 2

    def forward(self, maps: Tensor) -> Tensor:
        self.width += self.grows
        return maps.mean((2, 3))[:, : self.width]


@pytest.mark.parametrize("grows", [True, False])
def test_a_head_whose_width_changes_is_refused(tiny_net: TinyNet, grows: bool) -> None:
    with pytest.raises(
        exitkit.ArgumentError, match=r"Sliced.*different widths.*: [234], [345], [234]\nIts width must"
    ):
        exitkit.attach(tiny_net, images(), every=2, head=partial(Sliced, grows=grows))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (shapeless, r"shapeless' for the feature channels_first \(8, 8, 8\) makes torch.float32 \(3, 2, 8, 8\)"),
        (
            moody,
            r"moody'.*two modules of different structure: \(0\): Conv2d.* and \(0\): Conv2d.*\nIts structure must follow",
        ),
        (broken, r"broken'.*fails: RuntimeError"),
        (shared, r"shared'.*same module twice"),
        (lambda feature: 3, "returned int; return a torch.nn.Module"),
        (_SHARED, "one module for all exits; give a function"),
        (partial(averaged, Feature((8, 8, 8), "channels_first")), "arguments by position"),
        ("tests.test_own_heads:nothing", "cannot be imported"),
        ("no_such_module_here:head", "cannot be imported"),
        ("conv(3)", "its arguments must be names"),
        ("conv(stride=", "head='conv.stride=' is unknown"),
        ("conv(stride=0)", "stride=0 must be a whole number at least 1"),
        ("conv(width='wide')", "width='wide' is unknown|width='wide' must be"),
        ("conv(padding=1)", r"argument='padding' is unknown\. Allowed: 'stride', 'width'"),
        ("conv(strid=2)", r"argument='strid' is unknown\. Did you mean 'stride'\?"),
        ("strided(stride=3)", "'strided' takes no arguments; leave stride out"),
        ("wide(width=3)", "is unknown"),
        ("convv", r"head='convv' is unknown\. Did you mean 'conv'\? Allowed are 'auto'"),
    ],
)
def test_heads_that_make_no_vectors_are_refused(tiny_net: TinyNet, head: Any, message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        exitkit.attach(tiny_net, images(), every=2, head=head)


# stride and width of the convolution


def test_the_head_for_policies_has_stride_four_and_keeps_the_channels() -> None:
    """Zero Time Waste, appendix A.2: 3 × 3, stride 4, channels kept, SDN pooling."""
    made, x = body(maps(), "conv(stride=4, width='same')"), torch.randn(2, 6, 20, 20)
    convolution, pool = made[0], SDNPool()  # type: ignore[index]
    wanted = pool(F.conv2d(x, convolution.weight, convolution.bias, stride=4, padding=1).relu()).flatten(1)
    assert wanted.shape == (2, 6 * 16)
    assert torch.allclose(made(x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "head", [partial(conv, stride=3, width=5), "conv(stride=3, width=5)", "separable(stride=3, width=5)"]
)
def test_stride_and_width_are_as_given(head: Any) -> None:
    x = torch.randn(2, 6, 20, 20)
    assert body(maps(), head)(x).shape == (2, 5 * 16)
    assert {part.stride for part in body(maps(), head).modules() if isinstance(part, nn.Conv2d)} >= {(3, 3)}


def test_a_convolution_with_arguments_has_a_short_name(tiny_net: TinyNet, tmp_path: Path) -> None:
    ee = exitkit.attach(tiny_net.eval(), images(), every=2, head=partial(conv, stride=2, width=3))
    assert ee.head == "conv(stride=2, width=3)"
    ee.save_pretrained(tmp_path)
    assert MultiExitModel.from_pretrained(tiny_net, tmp_path).exits == ee.exits


def test_msdnet_exits_are_two_strided_convolutions_and_a_mean() -> None:
    """The published classifier: conv-BN-ReLU to 128 channels twice, 2 × 2 average pooling on 8 × 8 maps."""
    made, x = body(maps(10, 8, 8, 32), "msdnet").eval(), torch.randn(2, 10, 8, 8)
    first, second = (part for part in made.modules() if isinstance(part, nn.Conv2d))
    assert (first.weight.shape, second.weight.shape) == ((128, 10, 3, 3), (128, 128, 3, 3))
    for norm in (part for part in made.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.eps = 1e-30  # torch 2.11 refuses 0
    inner = F.conv2d(x, first.weight, stride=2, padding=1).relu()
    wanted = F.avg_pool2d(F.conv2d(inner, second.weight, stride=2, padding=1).relu(), 2).flatten(1)
    assert torch.allclose(made(x), wanted, atol=1e-5)
    assert body(maps(10, 7, 7), partial(msdnet, width="same"))(torch.randn(2, 10, 7, 7)).shape == (2, 10)


def test_channels_last_maps_reach_msdnet_exits_in_order() -> None:
    last = body(Feature((8, 6, 10), "channels_last", image_side=32), "msdnet").eval()
    assert last(torch.randn(2, 8, 6, 10)).shape == (2, 128)
