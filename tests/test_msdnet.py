"""The CIFAR MSDNet against the numbers of the published code, and against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit import ExitkitError
from exitkit.models import msdnet
from exitkit.models.msdnets import MSDNet
from exitkit.surgery.macs import count_macs
from tests.toy import all_equal, images, names, staged

SIDES = (32, 16, 8)


@pytest.fixture(scope="module")
def net() -> MSDNet:
    torch.manual_seed(0)
    return msdnet().eval()


def cifar(batch: int = 2) -> Tensor:
    return images(batch, channels=3, height=32, width=32)


def columns(model: MSDNet, x: Tensor) -> list[list[tuple[int, ...]]]:
    """Shape of every scale without the batch dimension, after the stem and after every layer."""
    scales = model.stem(x)
    shapes = [[tuple(maps.shape[1:]) for maps in scales]]
    for layer in model.layers:
        scales = layer(scales)
        shapes.append([tuple(maps.shape[1:]) for maps in scales])
    return shapes


def test_shapes_of_every_scale_after_every_layer(net: MSDNet) -> None:
    """16 channels and 6 more a layer, times 1, 2 and 4; layers 9 and 17 drop the finest scale and halve the rest."""
    halved = {9: (16 + 9 * 6) // 2, 17: (35 + 8 * 6) // 2}
    shapes = columns(net, cifar())
    assert shapes[0] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    for after in range(1, 25):
        start = max((n for n in halved if n <= after), default=0)
        channels = halved.get(start, 16) + 6 * (after - start)
        finest = (after - 1) // 8
        assert shapes[after] == [(channels * 2**s, SIDES[s], SIDES[s]) for s in range(finest, 3)]
    assert shapes[24] == [(332, 8, 8)]
    assert net(cifar()).shape == (2, 10)


def test_parameters_and_exit_channels_of_the_published_code() -> None:
    """kalviny/MSDNet-PyTorch, check_msdnet/log.txt: nBlocks 10, base 4, step 2, hence 22 layers and 10 classifiers."""
    model = msdnet(layers=4 + 9 * 2)
    coarsest = [scales[-1][0] for scales in columns(model.eval(), cifar(1))][4::2]
    assert coarsest == [160, 208, 256, 164, 212, 260, 308, 188, 236, 284]
    classifiers = [9 * 128 * (channels + 128) + 4 * 128 + 129 * 10 for channels in coarsest]
    assert sum(map(torch.numel, model.classifier.parameters())) == classifiers[-1]
    assert sum(map(torch.numel, model.parameters())) + sum(classifiers[:-1]) == 4_839_544


@pytest.mark.parametrize(("growth", "channels"), [(6, 16), (12, 4)])
def test_macs_by_hand(growth: int, channels: int) -> None:
    """At growth 12 the first layers have fewer channels than their bottlenecks could."""
    model, pixels = msdnet(growth=growth, channels=channels), [side**2 for side in SIDES]
    total = 9 * channels * (3 * pixels[0] + 2 * channels * pixels[1] + 8 * channels * pixels[2])
    for layer in range(1, 25):
        made, read = range((layer - 1) // 8, 3), range(max(layer - 2, 0) // 8, 3)
        for scale in made:
            sources = [source for source in (scale - 1, scale) if source in read]
            new = growth * 2**scale // len(sources)
            for source in sources:
                width = channels * 2**source
                inner = min(width, new * 2**source)
                total += width * inner * pixels[source] + 9 * inner * new * pixels[scale]
        channels += growth
        if layer in (9, 17):
            total += sum(channels * (channels // 2) * 4**scale * pixels[scale] for scale in made)
            channels //= 2
    total += 9 * 128 * (channels * 4 * 4**2 + 128 * 2**2) + 128 * 10
    assert count_macs(model, cifar(1)) == total
    assert growth != 6 or total == 86_111_488


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"layers": 3},
        {"layers": 5},
        {"layers": 7, "growth": 4, "channels": 8},
        {"layers": 4, "growth": 1, "growth_factors": (1,), "bottleneck_factors": (4,)},
        {"layers": 8, "growth": 5, "growth_factors": (1, 2, 4, 4), "bottleneck_factors": (1, 2, 4, 4)},
    ],
)
def test_a_gradient_reaches_every_parameter(arguments: dict[str, Any]) -> None:
    model = msdnet(num_classes=7, **arguments).train()
    F.cross_entropy(model(cifar(4)), torch.arange(4)).backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


def test_only_the_coarsest_scale_is_classified(net: MSDNet) -> None:
    with torch.no_grad():
        scales = net.stem(cifar())
        for layer in net.layers:
            scales = layer(scales)
        assert len(scales) == 1
        torch.testing.assert_close(net.classifier(scales[-1]), net(cifar()), rtol=0, atol=0)


def test_a_layer_keeps_its_input_in_front_unless_it_reduces(net: MSDNet) -> None:
    with torch.no_grad():
        scales = net.stem(cifar())
        for number, layer in enumerate(net.layers, start=1):
            grown = layer(scales)
            assert len(grown) == len(scales) - (number in (9, 17))
            if number not in (9, 17):
                assert all(torch.equal(new[:, : old.shape[1]], old) for old, new in zip(scales, grown, strict=True))
            scales = grown


def test_the_same_answer_twice_and_from_loaded_weights(net: MSDNet) -> None:
    torch.manual_seed(1)
    other = msdnet().eval()
    with torch.no_grad():
        first = net(cifar())
        assert not torch.equal(other(cifar()), first)
        other.load_state_dict(net.state_dict())
        assert torch.equal(net(cifar()), first)
        assert torch.equal(other(cifar()), first)


def test_initial_weights_are_those_of_the_published_code() -> None:
    """Normal with variance 2 / (k² · out), no bias in convolutions, a zero bias in the linear layer."""
    model = msdnet()
    conv = model.classifier[0][0]
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.01)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.classifier[-1].bias.abs().max() == 0


# exits at wide cuts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper(net: MSDNet) -> exitkit.MultiExitModel:
    """The exits of the paper: after layers 4, 6, ..., 22, and the backbone's own after the 24th."""
    return exitkit.attach(net, at=[f"layers.{i}" for i in range(3, 23, 2)], method="sdn").eval()


def test_the_papers_exits_read_the_coarsest_scale(paper: exitkit.MultiExitModel) -> None:
    assert [exit_.name for exit_ in paper.exits] == [*(f"layers.{i}" for i in range(3, 23, 2)), "backbone"]
    assert [len(boundary.activations) for boundary in paper.boundaries] == [3, 3, 3, 2, 2, 2, 2, 1, 1, 1]
    coarsest = [160, 208, 256, 164, 212, 260, 308, 188, 236, 284]
    assert [boundary.shape for boundary in paper.boundaries] == [(channels, 8, 8) for channels in coarsest]
    assert paper.anatomy.macs == 86_111_488


def test_every_layer_is_a_block(paper: exitkit.MultiExitModel) -> None:
    assert [block.name for block in paper.anatomy.blocks] == [f"layers.{i}" for i in range(24)]
    assert names(exitkit.attach(msdnet(layers=6), every=2, head="1L")) == ["layers.1", "layers.3"]


def test_stages_carry_every_scale(paper: exitkit.MultiExitModel, net: MSDNet) -> None:
    partition = paper.partition()
    for batch in (1, 3):
        x = cifar(batch)
        with torch.no_grad():
            out, expected = paper(x), net(x)
        assert torch.equal(out.logits[-1], expected)
        assert all_equal(staged(partition, x), [*out.features, expected])


# wrong arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0 must be a whole number at least 1"),
        ({"layers": 24.0}, r"layers=24\.0 must be a whole number"),
        ({"layers": True}, "layers=True must be a whole number"),
        ({"growth": -6}, "growth=-6 must be a whole number"),
        ({"channels": "16"}, "channels='16' must be a whole number"),
        ({"growth_factors": (1, 0, 4)}, r"growth_factors\[1\]=0 must be a whole number"),
        ({"bottleneck_factors": (1, 2, 0.5)}, r"bottleneck_factors\[2\]=0\.5 must be a whole number"),
        (
            {"growth_factors": (1, 2)},
            r"growth_factors=\(1, 2\) and bottleneck_factors=\(1, 2, 4\).*one number per scale",
        ),
        ({"growth_factors": (), "bottleneck_factors": ()}, "one number per scale"),
        ({"growth": 3, "growth_factors": (1, 3, 4)}, r"growth=3 .*odd number.*use an even growth"),
        ({"layers": 1}, "layers=1 leaves more than the coarsest of 3 scales.*use a multiple of 3"),
        ({"layers": 4}, "layers=4 leaves"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=rf"(?s){message}"):
        msdnet(**arguments)
