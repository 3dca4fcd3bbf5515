"""Backbones that no library ships."""

from exitkit.models.cifar_resnet import cifar_resnet

__all__ = ["cifar_resnet"]
