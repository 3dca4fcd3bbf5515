"""Backbones that no library ships."""

from exitkit.models.cifar_convnets import cifar_mobilenet, cifar_vgg, cifar_wide_resnet
from exitkit.models.cifar_resnets import cifar_resnet
from exitkit.models.msdnets import imagenet_msdnet, msdnet
from exitkit.models.nature_cnns import nature_cnn

__all__ = [
    "cifar_mobilenet",
    "cifar_resnet",
    "cifar_vgg",
    "cifar_wide_resnet",
    "imagenet_msdnet",
    "msdnet",
    "nature_cnn",
]
