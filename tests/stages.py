"""An engine of three plain steps whose scores are columns of its input, so that a test says where each sample leaves."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from exitkit.engine import Engine
from exitkit.engine.loop import Loop
from exitkit.engine.program import Description, Inputs, Program, Step
from exitkit.methods.policy import ExitPolicy
from exitkit.surgery.inputs import CallSpec

POISON = 666.0


class Stage:
    """Answers with the input times the exit's number plus one; notes the batch sizes it ran on; waits while closed."""

    def __init__(self, exit_: int) -> None:
        self.exit = exit_
        self.sizes: list[int] = []
        self.rows: list[float] = []
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        self.sizes.append(len(x))
        self.rows += x[:, 2].tolist()
        self.entered.set()
        assert self.open.wait(20)
        if (x[:, 2] == POISON).any():
            raise RuntimeError("poisoned")
        score = x[:, self.exit] if self.exit < 2 else torch.ones(len(x))
        return [x, x * (self.exit + 1), score.double()]


def staged_engine(description: Description | None = None) -> tuple[Engine, list[Stage]]:
    """Takes (B, 3): the scores of exits 0 and 1, and a number to tell samples apart. τ = 0.5."""
    stages = [Stage(exit_) for exit_ in range(3)]
    steps = tuple(Step(one, one.exit, True, ("x",), ("x",), ("x",) if one.exit < 2 else ()) for one in stages)
    inputs = Inputs(CallSpec((None,), (), (0,)), ("x",), ((None, 3),), (torch.float32,), (None,), torch.device("cpu"))
    program = Program(inputs, steps, {"x": 0}, {}, 3, torch.float32)
    return Engine(Loop(program, ExitPolicy((0.5, 0.5), "confidence")), description), stages


def sample(leaves_at: int, number: float = 0.0) -> Tensor:
    """(1, 3): one sample that leaves at this exit."""
    return torch.tensor([[float(leaves_at == 0), float(leaves_at == 1), number]])
