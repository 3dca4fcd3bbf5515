"""A linear layer that standardises what it reads while it learns, and is a plain linear layer when it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

_SLOWEST = 0.1
"""Weight of the newest batch in the statistics, once there were ten."""
_LEAST = 1e-5
"""Added to variances."""


class StandardisedLinear(nn.Linear):
    """W (x − μ) / σ + b with the running mean μ and deviation σ of each input: (B, D) → (B, C).

    A backbone's features have any scale (those of networks without normalisation deviate by tens), and an initialisation and
    a learning rate suit inputs of deviation 1. In training mode every batch is counted into μ and σ before they are used, so
    that it is the same function in both modes, for batches of one sample too. Without any batch μ = 0 and σ = 1.

    Attributes:
        mean, deviation: (D,) μ and σ, over all batches so far, later ones counting more once there were ten.
        batches: how many there were.
    """

    mean: Tensor
    deviation: Tensor
    batches: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))
        self.register_buffer("batches", torch.tensor(0))
        self.eval()  # counts after train(), not at the first look at an answer

    def forward(self, vector: Tensor) -> Tensor:
        if self.training:
            self._count(vector.detach())
        return F.linear(vector, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain linear layer that it is: W / σ and b − W μ / σ."""
        weight = self.weight / self.deviation
        return weight, self.bias - (weight * self.mean).sum(1)

    @torch.no_grad()
    def _count(self, vectors: Tensor) -> None:
        """A batch that is not finite counts for nothing: training stops at it, and may begin again."""
        mean, variance = _moments(vectors.float())
        finite = mean.isfinite().all() & variance.isfinite().all()
        self.batches += finite
        share = (1 / self.batches.clamp(min=1)).clamp(min=_SLOWEST)
        before = self.deviation.float().square() * (self.batches > 1)
        shift = mean - self.mean
        spread = (1 - share) * (before + share * shift.square()) + share * variance
        for kept, new in ((self.mean, self.mean + share * shift), (self.deviation, (spread + _LEAST).sqrt())):
            kept.copy_(torch.where(finite, new, kept))


def _moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of a batch (B, D); of several processes that learn together, over the parts of all."""
    variance, mean = torch.var_mean(vectors, dim=0, correction=0)
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return mean, variance
    first, second = mean.double(), variance.double() + mean.double().square()
    sums = len(vectors) * torch.stack([torch.ones_like(first), first, second])
    distributed.all_reduce(sums)
    first, second = sums[1] / sums[0], sums[2] / sums[0]
    return first.to(mean), (second - first.square()).clamp(min=0).to(mean)


class FoldedLinear(nn.Module):
    """The plain linear layer that a :class:`StandardisedLinear` is; made anew when that one has learned more."""

    def __init__(self, learned: StandardisedLinear) -> None:
        super().__init__()
        self._learned = (learned,)  # in a tuple, so that its parameters are not this module's
        self.weight, self.bias = (nn.Parameter(part.detach(), False) for part in learned.folded())
        self._versions = self._versions_now()

    def forward(self, vector: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._versions != self._versions_now():
            self._versions = self._versions_now()
            with torch.no_grad():
                for own, new in zip((self.weight, self.bias), self._learned[0].folded(), strict=True):
                    own.copy_(new)
        return F.linear(vector, self.weight, self.bias)

    def _versions_now(self) -> list[int]:
        tensors = (*self._learned[0].parameters(), *self._learned[0].buffers())
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def replaced(module: nn.Module, change: Callable[[str, StandardisedLinear], nn.Module]) -> None:
    """Put ``change(name, layer)`` in the place of every :class:`StandardisedLinear` within ``module``."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, StandardisedLinear)]
    for name, layer in layers:
        module.set_submodule(name, change(name, layer))
