"""The papers' backbones, by the names that recipes have them under: functions of the number of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from exitkit import models
from exitkit.common.errors import ArgumentError
from exitkit.common.torchvision_guard import import_torchvision

_TINY = 64
"""Side of the images of Tiny ImageNet."""


def resnet20(num_classes: int = 10) -> nn.Module:
    """The CIFAR ResNet-20 (He et al. 2015)."""
    return models.cifar_resnet(20, num_classes)


def resnet56(num_classes: int = 10) -> nn.Module:
    """The CIFAR ResNet-56 with shortcuts of option A, of which weights are published."""
    return models.cifar_resnet(56, num_classes)


def sdn_resnet56(num_classes: int = 10) -> nn.Module:
    """The ResNet-56 of Shallow-Deep Networks, with shortcuts of option B."""
    return _of_models("cifar_resnet")(56, num_classes, option="B")


def vgg16(num_classes: int = 10) -> nn.Module:
    """The VGG-16 with BatchNorm of Shallow-Deep Networks."""
    return _of_models("cifar_vgg")(num_classes)


def mobilenet(num_classes: int = 10) -> nn.Module:
    """Its MobileNet V1."""
    return _of_models("cifar_mobilenet")(num_classes)


def wide_resnet(num_classes: int = 10) -> nn.Module:
    """Its WideResNet-32-4."""
    return _of_models("cifar_wide_resnet")(num_classes)


def sdn_resnet56_tiny(num_classes: int = 200) -> nn.Module:
    """On the 64×64 images of Tiny ImageNet, as are the next three."""
    return _of_models("cifar_resnet")(56, num_classes, option="B", image_size=_TINY)


def vgg16_tiny(num_classes: int = 200) -> nn.Module:
    """See :func:`sdn_resnet56_tiny`."""
    return _of_models("cifar_vgg")(num_classes, image_size=_TINY)


def mobilenet_tiny(num_classes: int = 200) -> nn.Module:
    """See :func:`sdn_resnet56_tiny`."""
    return _of_models("cifar_mobilenet")(num_classes, image_size=_TINY)


def wide_resnet_tiny(num_classes: int = 200) -> nn.Module:
    """See :func:`sdn_resnet56_tiny`."""
    return _of_models("cifar_wide_resnet")(num_classes, image_size=_TINY)


def msdnet_cifar(num_classes: int = 100) -> nn.Module:
    """The CIFAR MSDNet: 3 scales, 24 layers."""
    return models.msdnet(num_classes)


def msdnet_small(num_classes: int = 10) -> nn.Module:
    """A CIFAR MSDNet of 10 layers, for a CPU."""
    return models.msdnet(num_classes, layers=10)


def msdnet_18(num_classes: int = 100) -> nn.Module:
    """A CIFAR MSDNet of 18 layers, for the positions 0 to 17 of Kubaty et al., appendix E.2."""
    return models.msdnet(num_classes, layers=18)


def msdnet_imagenet(num_classes: int = 1000) -> nn.Module:
    """The ImageNet MSDNet: 4 scales, 38 layers."""
    return _of_models("imagenet_msdnet")(num_classes)


def resnet34_cifar(num_classes: int = 100) -> nn.Module:
    """torchvision's ResNet-34 on 32×32 images."""
    return _torchvision("resnet34", num_classes, 32)


def resnet50_tiny(num_classes: int = 200) -> nn.Module:
    """torchvision's ResNet-50 on the 64×64 images of Tiny ImageNet."""
    return _torchvision("resnet50", num_classes, _TINY)


def vit_t_cifar(num_classes: int = 100) -> nn.Module:
    """ViT-T for CIFAR-100 (Kubaty et al., appendix E.3): patches of 4, width 256, MLP 256, 7 layers, 8 heads."""
    return _vit(num_classes, 32, patch_size=4, embed_dim=256, depth=7, num_heads=8, mlp_ratio=1.0)


def vit_small_cifar(num_classes: int = 10) -> nn.Module:
    """The same of half the width, in patches of 8, for a CPU."""
    return _vit(num_classes, 32, patch_size=8, embed_dim=128, depth=7, num_heads=4, mlp_ratio=1.0)


def vit_t_tiny(num_classes: int = 200) -> nn.Module:
    """ViT-T of :func:`vit_t_cifar` on 64×64 images, in patches of 8."""
    return _vit(num_classes, _TINY, patch_size=8, embed_dim=256, depth=7, num_heads=8, mlp_ratio=1.0)


def vit_t(num_classes: int = 1000) -> nn.Module:
    """ViT-T for ImageNet (appendix E.5): patches of 16, width 192, MLP 768, 12 layers, 3 heads."""
    return _vit(num_classes, 224, patch_size=16, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0)


def vit_s(num_classes: int = 1000) -> nn.Module:
    """ViT-S for ImageNet: width 384, 6 heads."""
    return _vit(num_classes, 224, patch_size=16, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0)


def _of_models(name: str) -> Callable[..., nn.Module]:
    """A backbone of :mod:`exitkit.models`, some of which may not be there yet."""
    if not hasattr(models, name):
        raise ArgumentError(f"exitkit.models has no {name}")
    make: Callable[..., nn.Module] = getattr(models, name)
    return make


def _torchvision(name: str, num_classes: int, side: int) -> nn.Module:
    return _sized(import_torchvision("models", name).get_model(name, num_classes=num_classes), side)


def _sized(model: nn.Module, side: int) -> nn.Module:
    """The model, saying how large its images are."""
    model.image_size = side  # type: ignore[assignment]
    return model


def _vit(num_classes: int, side: int, **size: Any) -> nn.Module:
    import_torchvision(needed_for="timm")
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, img_size=side, **size)
    return model
