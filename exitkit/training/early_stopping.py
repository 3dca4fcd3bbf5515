"""Early stopping with one counter per exit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """Stop when no exit improved for ``patience`` evaluations (Kubaty et al., appendix A).

    ``patience`` None never stops. An exit's counter is reset by a strictly better score: accuracy, or for regression the
    negative loss (section 4.1). ``steps`` counts optimiser steps since the last evaluation, where evaluations go by steps.
    """

    patience: int | None
    best: list[float] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)
    steps: int = 0

    def update(self, scores: Sequence[float]) -> bool:
        """Record an evaluation; whether any exit improved."""
        if not self.best:
            self.best, self.waited = [-math.inf] * len(scores), [0] * len(scores)
        improved = [new > old for new, old in zip(scores, self.best, strict=True)]
        self.best = [max(new, old) for new, old in zip(scores, self.best, strict=True)]
        self.waited = [0 if better else waited + 1 for better, waited in zip(improved, self.waited, strict=True)]
        return any(improved)

    @property
    def stop(self) -> bool:
        return self.patience is not None and bool(self.waited) and min(self.waited) >= self.patience

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.steps = list(state["best"]), list(state["waited"]), state["steps"]
