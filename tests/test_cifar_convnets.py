"""The networks of Shallow-Deep Networks, and ResNets of option B: sizes by hand, and where exits go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.models import cifar_mobilenet, cifar_resnet, cifar_vgg, cifar_wide_resnet, imagenet_msdnet
from exitkit.reproduction.backbones import sdn_resnet56_tiny
from exitkit.surgery.macs import count_macs
from tests.toy import images, names

CONVOLUTIONS = 14_714_688 + 8_448
"""Parameters of VGG-16's convolutions, and of the normalisation behind each."""


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def wide_resnet_size() -> int:
    """WRN-32-4 with biases, by hand."""
    total, before = 3 * 9 * 16 + 16, 16
    for width in (64, 128, 256):
        for block in range(5):
            total += 2 * before + 2 * width + 9 * before * width + width + 9 * width * width + width
            total += before * width + width if block == 0 else 0
            before = width
    return total + 2 * 256 + 256 * 10 + 10


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (cifar_vgg(), CONVOLUTIONS + 2 * 512 * 513 + 10 * 513),
        (cifar_vgg(200, image_size=64), CONVOLUTIONS + 2048 * 2049 + 1024 * 2049 + 200 * 1025),
        (cifar_mobilenet(), 3_217_226),
        (cifar_resnet(56, option="B"), 855_770),
        (cifar_wide_resnet(), wide_resnet_size()),
    ],
)
def test_parameters_are_those_of_the_published_networks(model: nn.Module, parameters: int) -> None:
    assert size(model) == parameters
    assert model.eval()(torch.zeros(2, 3, model.image_size, model.image_size)).dim() == 2  # type: ignore[call-overload]


@pytest.mark.parametrize(("build", "blocks"), [(cifar_vgg, 14), (cifar_mobilenet, 13), (cifar_wide_resnet, 15)])
def test_every_block_can_have_a_convolutional_exit(build: Callable[[], nn.Module], blocks: int) -> None:
    """Of VGG after every convolution: its linear layers, whose features are vectors, are one block in the end."""
    ee = exitkit.attach(build().eval(), images(channels=3, height=32, width=32), every=1, head="1L", method="sdn")
    assert len(ee.anatomy.blocks) == blocks
    assert len(ee.boundaries) == blocks - 1
    assert {boundary.layout for boundary in ee.boundaries} == {"channels_first"}


def test_vgg_has_convolutional_exits_at_the_published_places() -> None:
    """Shallow-Deep Networks: the add_ic of its code, made for 15, 30, 45, 60, 75 and 90% of the operations."""
    example = images(channels=3, height=32, width=32)
    ee = exitkit.attach(cifar_vgg().eval(), example, placement="sdn", head="conv", method="sdn")
    assert names(ee) == [f"blocks.{index}" for index in (1, 3, 5, 6, 8, 9)]


def test_a_wide_block_is_what_it_says() -> None:
    block = cifar_wide_resnet(blocks=1, widen=1).blocks[1].eval()  # 16 to 32 channels, halved
    x = torch.randn(2, 16, 8, 8)
    norm1, _, conv1, _, norm2, _, conv2 = block.layers  # type: ignore[misc]
    inner = F.conv2d(norm1(x).relu(), conv1.weight, conv1.bias, padding=1)
    added = F.conv2d(norm2(inner).relu(), conv2.weight, conv2.bias, stride=2, padding=1)
    shortcut = F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=2)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(block(x), added + shortcut, atol=1e-5)


def test_option_b_has_convolutions_where_shapes_change_alone() -> None:
    model = cifar_resnet(20, option="B")
    assert [name for name, part in model.named_modules() if name.endswith("shortcut")] == [
        "layer2.0.shortcut",
        "layer3.0.shortcut",
    ]
    assert not any("shortcut" in name for name in cifar_resnet(20).state_dict())


def test_the_resnet_of_tiny_imagenet_computes_as_much_as_that_of_cifar() -> None:
    """The first convolution halves images of 64 (code of Shallow-Deep Networks): stages of 32², 16² and 8² pixels, by hand."""
    stages = 0
    for before, width, pixels in ((16, 16, 32**2), (16, 32, 16**2), (32, 64, 8**2)):
        shortcut = 0 if before == width else before * width
        stages += pixels * (9 * before * width + 17 * 9 * width * width + shortcut)
    stem = 9 * 3 * 16 * 32**2
    for side, classes in ((32, 10), (64, 200)):
        model = cifar_resnet(56, classes, option="B", image_size=side).eval()  # type: ignore[arg-type]
        assert count_macs(model, torch.zeros(1, 3, side, side)) == stem + stages + 64 * classes
    tiny = sdn_resnet56_tiny().eval()
    assert tiny.conv1(torch.zeros(1, 3, 64, 64)).shape[2:] == (32, 32)  # type: ignore[operator]
    assert tiny.image_size == 64


def test_the_imagenet_msdnet_has_four_scales_and_the_published_channels() -> None:
    """32 channels and 16 more a layer, times 4 at the coarsest scale; layers 11, 21 and 31 drop a scale and halve the rest."""
    model = imagenet_msdnet().to("meta").eval()
    scales, coarsest, count = model.stem(torch.zeros(1, 3, 224, 224, device="meta")), [], []
    assert [tuple(maps.shape[1:]) for maps in scales] == [(32, 56, 56), (64, 28, 28), (128, 14, 14), (128, 7, 7)]
    for layer in model.layers:
        scales = layer(scales)
        coarsest.append(scales[-1].shape[1])
        count.append(len(scales))
    assert len(coarsest) == 38
    assert [coarsest[index] for index in (9, 16, 23, 30, 37)] == [768, 800, 720, 584, 1032]
    assert [count[index] for index in (9, 10, 20, 30)] == [4, 3, 2, 1]
    assert model.classifier(scales[-1]).shape == (1, 1000)
    assert [part.out_channels for part in model.classifier.modules() if isinstance(part, nn.Conv2d)] == [1032, 1032]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cifar_vgg(0), "num_classes=0"),
        (lambda: cifar_mobilenet(image_size=224), "image_size=224 must be 32 or 64"),  # type: ignore[arg-type]
        (lambda: cifar_wide_resnet(blocks=0), "blocks=0"),
        (lambda: cifar_resnet(20, option="C"), "option='C'"),  # type: ignore[arg-type]
        (lambda: cifar_resnet(20, image_size=224), "image_size=224 must be 32 or 64"),  # type: ignore[arg-type]
    ],
)
def test_networks_that_do_not_exist_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(exitkit.ArgumentError, match=message):
        call()
