"""Backbones that no library ships."""

from exitkit.models.cifar_resnets import cifar_resnet
from exitkit.models.msdnets import msdnet

__all__ = ["cifar_resnet", "msdnet"]
