"""The network of Mnih et al. 2015, "Human-level control through deep reinforcement learning", as a policy."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from exitkit.common.checks import Count, check


class Pixels(nn.Module):
    """Frames of numbers from 0 to 255, of whatever dtype, in [0, 1]."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.float() / 255


def nature_cnn(actions: int, frames: int = 4) -> nn.Sequential:
    """Frames (B, ``frames``, 84, 84) of 0 … 255 to logits (B, ``actions``): three convolutions and two linear layers.

    Exits go before each next layer with weights. Zero Time Waste (appendix A.2) has them after the first two convolutions:
    ``at=["relu1", "relu2"]``.

    Args:
        actions: how many there are to choose from.
        frames: that are seen at once, the last one newest.

    Raises:
        ArgumentError: numbers below 1.
    """
    check("actions", actions, Count)
    check("frames", frames, Count)
    return nn.Sequential(
        OrderedDict(
            pixels=Pixels(),
            conv1=nn.Conv2d(frames, 32, 8, stride=4),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 4, stride=2),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(64, 64, 3),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64 * 7 * 7, 512),
            relu4=nn.ReLU(),
            actions=nn.Linear(512, actions),
        )
    )
