"""Backbones of the recipes that no library has by name. A recipe names them ``benchmarks.recipes.models:FUNCTION``."""

from __future__ import annotations

from typing import Any

from torch import nn

from exitkit.common.torchvision_guard import import_torchvision
from exitkit.models import cifar_resnet, msdnet


def resnet56(num_classes: int = 10) -> nn.Module:
    """The CIFAR ResNet-56 of Zero Time Waste."""
    return cifar_resnet(56, num_classes)


def resnet34_cifar(num_classes: int = 100) -> nn.Module:
    """torchvision's ResNet-34 on 32×32 images."""
    model: nn.Module = import_torchvision("models", "resnet34_cifar").resnet34(num_classes=num_classes)
    model.image_size = 32  # type: ignore[assignment]
    return model


def vit_t_cifar(num_classes: int = 100) -> nn.Module:
    """ViT-T for CIFAR-100 (Kubaty et al., appendix E.3): patches of 4, width 256, MLP 256, 7 layers, 8 heads."""
    import_torchvision(needed_for="timm")
    import timm

    size: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 256,
        "depth": 7,
        "num_heads": 8,
        "mlp_ratio": 1.0,
    }
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **size)
    return model


def msdnet_cifar(num_classes: int = 100) -> nn.Module:
    """The CIFAR MSDNet of Phuong and Lampert: 3 scales, 24 layers."""
    return msdnet(num_classes)
