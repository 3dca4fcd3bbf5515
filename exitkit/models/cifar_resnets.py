"""CIFAR ResNets of He et al. 2015 (section 4.2), with parameter-free shortcuts (option A) or convolutions (option B)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.common.checks import check, is_count
from exitkit.common.errors import ArgumentError, FileError

Option = Literal["A", "B"]
Side = Literal[32, 64]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; where shapes change, the shortcut subsamples by 2 and pads channels with zeros (option A).

    Under option B it is a 1×1 convolution with batch normalisation there.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, option: Option = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - channels_in) // 2
        self.shortcut: nn.Module | None = None
        if option == "B" and (stride != 1 or self.padding):
            convolution = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """6n + 2 layers: three stages of n blocks with 16, 32 and 64 channels, the first on maps of 32×32."""

    def __init__(self, depth: int, num_classes: int = 10, option: Option = "A", image_size: Side = 32) -> None:
        super().__init__()
        if not is_count(depth) or depth < 8 or (depth - 2) % 6:
            raise ArgumentError(f"depth={depth!r} is not 6n + 2; use 20, 32, 44, 56, 110, ...")
        check("option", option, Option)
        check("image_size", image_size, Side)
        self.image_size = image_size
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, stride=image_size // 32, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1, option=option)
        self.layer2 = _stage(16, 32, blocks, stride=2, option=option)
        self.layer3 = _stage(32, 64, blocks, stride=2, option=option)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def cifar_resnet(
    depth: int = 20,
    num_classes: int = 10,
    weights: str | Path | None = None,
    option: Option = "A",
    image_size: Side = 32,
) -> CifarResNet:
    """A CIFAR ResNet, with pretrained weights from a safetensors file if one is given.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110.
        num_classes: outputs.
        weights: a file with the keys of github.com/akamaster/pytorch_resnet_cifar10; its models take images in [0, 1]
            normalised with the ImageNet mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225).
        option: shortcuts where shapes change: ``"A"``, without parameters, or ``"B"``, a 1×1 convolution with batch
            normalisation, as Shallow-Deep Networks and Zero Time Waste have them.
        image_size: side of the images; those of 64 (Tiny ImageNet) are halved by the first convolution, as in the code of
            Shallow-Deep Networks.

    Raises:
        ExitkitError: an impossible depth, another option or size, or weights that do not fit.
    """
    model = CifarResNet(depth, num_classes, option, image_size)
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into ``model``, casting to the model's dtype; all keys and shapes must fit.

    Raises:
        ExitkitError: an unreadable file, or keys and shapes that do not fit.
    """
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise FileError(f"weights={str(path)!r} cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    cast = {key: value.to(own[key].dtype) if key in own else value for key, value in tensors.items()}
    for key in own:
        if key.endswith("num_batches_tracked"):
            cast.setdefault(key, torch.zeros((), dtype=torch.long))
    # Compared first: load_state_dict overwrites what fits before it raises.
    given, wanted = ({key: tuple(value.shape) for key, value in state.items()} for state in (cast, own))
    if given != wanted:
        key = next(key for key in (*wanted, *given) if given.get(key) != wanted.get(key))
        raise FileError(
            f"weights={str(path)!r} do not fit {type(model).__name__}: {key!r} has shape {given.get(key, 'none')} in the file "
            f"and {wanted.get(key, 'none')} in the model"
        )
    model.load_state_dict(cast)


def _stage(channels_in: int, channels: int, blocks: int, stride: int, option: Option) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride, option)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
