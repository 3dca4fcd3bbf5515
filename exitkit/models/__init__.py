"""Backbones that no library ships."""

from exitkit.models.cifar_resnets import cifar_resnet
from exitkit.models.msdnets import msdnet
from exitkit.models.nature_cnns import nature_cnn

__all__ = ["cifar_resnet", "msdnet", "nature_cnn"]
