"""Regimes: what is trained, what is frozen and which exits' losses count, phase by phase, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from exitkit.common.checks import Positive, check_fields
from exitkit.common.errors import ArgumentError, unknown_name


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimiser, a schedule and early stopping of its own.

    Exits are counted 0 … M, the backbone's own classifier being M. Stage m of the backbone ends at exit m, stage M at the
    backbone's logits. What is not named is frozen: parameters, BatchNorm statistics and dropout.

    Attributes:
        exits: those whose losses count; their internal classifiers learn.
        stages: the stages of the backbone that learn.
        alternate: exits whose losses alone count in every other step, beginning with the first step of the first epoch.
        share: how much of the run's epochs, relative to the other phases.
        lr: in the place of the trainer's rates, of the backbone too; by default these.
        backbone_lr: the backbone's, where it learns; by default ``lr``, or the trainer's.
    """

    exits: tuple[int, ...]
    stages: tuple[int, ...] = ()
    alternate: tuple[int, ...] | None = None
    share: Positive = 1.0
    lr: Positive | None = None
    backbone_lr: Positive | None = None

    def exits_at(self, epoch: int, step: int) -> tuple[int, ...]:
        """The exits whose losses count in a step of an epoch, both from 0; each epoch begins with the other turn."""
        return self.exits if self.alternate is None or (epoch + step) % 2 else self.alternate


def _range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def _everything(last: int) -> tuple[Phase, ...]:
    return (Phase(_range(0, last + 1), _range(0, last + 1)),)


REGIMES: dict[str, Callable[[int], tuple[Phase, ...]]] = {
    "disjoint": lambda last: (Phase(_range(0, last)),),
    "joint": _everything,
    "mixed": _everything,
    "mixed-gradual": lambda last: tuple(
        Phase(_range(last - i, last + 1), _range(0, last + 1)) for i in range(1, last + 1)
    ),
    "branch-wise": lambda last: tuple(Phase((m,), (m,)) for m in range(last + 1)),
    "separate": lambda last: tuple(Phase(_range(0, m + 1), _range(0, m + 1)) for m in range(last + 1)),
    "alternating": lambda last: (Phase(_range(0, last + 1), _range(0, last + 1), alternate=(last,)),),
}
"""Each regime's phases for a model whose backbone is exit ``last`` (Kubaty et al., section 2 and appendix A).

The backbone comes with weights, so that the paper's phase 1 (the backbone alone) is over: ``disjoint`` is its phase 3,
``mixed`` its phase 2. ``joint`` is phase 2 too: what differs in the paper is where the backbone starts, which is the
user's doing (attach to a fresh model, or to a pretrained one); no regime ever resets a weight. For phase 1, give
``(Phase((M,), range(M + 1)), …)``.

``mixed-gradual`` optimises the last i exits together with the backbone's own in phase i, so that the first of the paper's
phases is over as well. ``separate`` unfreezes the whole model in the paper; stages behind the last exit that counts would
have no gradient, so they are left out here.
"""


def phases_of(regime: str | Sequence[Phase], last: int, new_head: bool = False) -> tuple[Phase, ...]:
    """A regime's phases by its name, or a user's own, checked.

    With ``new_head``, the backbone's last layer was replaced and has learned nothing: it learns wherever exit ``last``
    counts, and in ``disjoint`` that counts too.

    Raises:
        ArgumentError: an unknown name, an exit or stage that does not exist, or a phase in which something cannot learn.
    """
    if isinstance(regime, str):
        if regime not in REGIMES:
            raise unknown_name("regime", regime, REGIMES, "Or give phases: a tuple of exitkit.training.Phase.")
        if regime == "disjoint" and new_head:
            return (Phase(_range(0, last + 1)),)
        return REGIMES[regime](last)
    phases = tuple(regime) if isinstance(regime, Iterable) else ()
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ArgumentError(
            f"regime={regime!r} is neither a name ({', '.join(map(repr, REGIMES))}) nor a tuple of "
            "exitkit.training.Phase"
        )
    for number, phase in enumerate(phases, 1):
        _check(phase, number, last, new_head)
    return phases


def epochs_of(phases: Sequence[Phase], epochs: int) -> tuple[int, ...]:
    """How many of the run's epochs each phase has, by its share.

    Raises:
        ArgumentError: too few for every phase to have one.
    """
    total = sum(phase.share for phase in phases)
    ends = [int(epochs * share / total + 0.5) for share in accumulate(phase.share for phase in phases)]
    lengths = tuple(end - start for start, end in pairwise([0, *ends]))
    if min(lengths) < 1:
        raise ArgumentError(
            f"epochs={epochs} are too few for {len(phases)} phases: every phase needs one, their lengths would be "
            f"{list(lengths)}"
        )
    return lengths


def _check(phase: Phase, number: int, last: int, new_head: bool) -> None:
    check_fields(phase, f"phase {number}: ")
    alternate = () if phase.alternate is None else phase.alternate
    for name, numbers in (("exits", phase.exits), ("stages", phase.stages), ("alternate", alternate)):
        whole = isinstance(numbers, tuple | list) and all(isinstance(m, int) for m in numbers)
        if not whole or sorted(set(numbers)) != list(numbers) or not set(numbers) <= set(range(last + 1)):
            raise ArgumentError(
                f"phase {number} has {name}={numbers}; give numbers from 0 to {last}, rising, each once"
            )
    if not phase.exits:
        raise ArgumentError(f"phase {number} has no exits; give those whose losses count")
    if phase.alternate is not None and (not phase.alternate or not set(phase.alternate) <= set(phase.exits)):
        raise ArgumentError(
            f"phase {number} alternates with exits {phase.alternate}; give some of {phase.exits}, or None"
        )
    if phase.stages and phase.stages[-1] > phase.exits[-1]:
        raise ArgumentError(
            f"phase {number} trains stage {phase.stages[-1]} of the backbone, which has no gradient: no exit behind it counts "
            f"(exits={phase.exits}); leave the stage out"
        )
    if phase.backbone_lr is not None and not phase.stages:
        raise ArgumentError(
            f"phase {number} sets backbone_lr={phase.backbone_lr!r}, but freezes the backbone; name the stages that learn, or "
            "leave it out"
        )
    if last in phase.exits and not phase.stages and not new_head:
        raise ArgumentError(
            f"phase {number} counts exit {last}, the backbone's own, but freezes the whole backbone; name its stages, or "
            f"leave exit {last} out"
        )
