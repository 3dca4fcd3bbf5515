"""Forwards that the capture cannot see are refused by name."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.toy import Noise, TinyNet, images


class CallCount(nn.Module):
    """Depends on Python state: how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Faulty(TinyNet):
    """A fault after the block ``index``, inside a list of (block, fault) pairs."""

    def __init__(self, fault: nn.Module, index: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(block, fault) if i == index else block for i, block in enumerate(self.blocks))
        )


@pytest.mark.parametrize("fault", [Noise, CallCount])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_forward_the_capture_cannot_see_is_refused_by_name(fault: type[nn.Module], index: int) -> None:
    with pytest.raises(ExitkitError, match=rf"refused.*module 'blocks\.{index}.*(random|state)"):
        exitkit.attach(Faulty(fault(), index), images(), at=["blocks.0", "blocks.1", "blocks.2"])


@pytest.mark.parametrize("fault", [Noise, CallCount])
def test_a_fault_after_the_last_exit_is_refused_too(fault: type[nn.Module]) -> None:
    with pytest.raises(ExitkitError, match=r"refused.*logits.*(random|state)"):
        exitkit.attach(Faulty(fault(), 3), images())


def test_a_branch_on_the_batch_size_is_refused() -> None:
    class Branch(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] == 2 else -super().forward(x)

    with pytest.raises(ExitkitError, match=r"Branch.*batch"):
        exitkit.attach(Branch(), images())
