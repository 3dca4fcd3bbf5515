"""Backbones that no library ships."""

from exitkit.models.cifar_resnet import cifar_resnet
from exitkit.models.msdnet import msdnet

__all__ = ["cifar_resnet", "msdnet"]
