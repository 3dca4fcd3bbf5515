"""Methods: frozen compositions of a link, a combiner and a criterion. The heads are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from exitkit.common.checks import Count, check, check_fields
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, unknown_name
from exitkit.exits.gpf import Variant
from exitkit.methods.criteria import Criterion, Tolerance, as_criterion

Ensemble = Literal["none", "geometric", "additive", "mean"]


@dataclass(frozen=True)
class Method:
    """An early-exit method as a composition of parts.

    Attributes:
        name: what tables call it.
        cascade: each exit also reads the logits of the one before it.
        detach: whether no gradient goes back through a cascade (False: Zero Time Waste, appendix C.3).
        ensemble: how each exit's answer is combined with those before it: by a fitted product or sum of probabilities, or
            by their mean (anytime prediction).
        ensemble_final: whether the backbone's own answer is combined too (then τ > 1 is not the original model).
        criterion: the score that decides: its name, or a :class:`~exitkit.methods.criteria.Criterion` (kept by name).
        past_future: instead of a cascade, each exit reads the states of all before it and imitates those to come:
            ``"paper"``, as its authors have it, or ``"ztw"``, as the code of Zero Time Waste has it.
        width: of those states; by default that of the tokens where all exits read tokens of one width, otherwise 128.
    """

    name: str
    cascade: bool = False
    detach: bool = True
    ensemble: Ensemble = "none"
    ensemble_final: bool = False
    criterion: str | Criterion = "confidence"
    past_future: Variant | None = None
    width: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "criterion", as_criterion(self.criterion).name)
        if self.past_future is not None and self.cascade:
            raise ArgumentError("cascade=True and past_future are two links; choose one")
        if not self.detach and not self.cascade:
            raise ArgumentError("detach=False lets gradients through a cascade, and there is none; set cascade=True")
        if self.width is not None and self.past_future is None:
            raise ArgumentError(
                f"width={self.width!r} is for past_future alone: the width of the states that exits hand on"
            )
        if self.ensemble_final and self.ensemble == "none":
            raise ArgumentError(
                "ensemble_final=True needs an ensemble: set ensemble='geometric', 'additive' or 'mean'"
            )

    @property
    def score(self) -> Criterion:
        """The criterion itself."""
        return as_criterion(self.criterion)

    @property
    def linked(self) -> bool:
        """Whether exits read one another: by a cascade, by states, or in an ensemble."""
        return self.cascade or self.past_future is not None or self.ensemble != "none"


SDN = partial(Method, "sdn")
"""Shallow-Deep Networks (Kaya et al. 2019): independent exits, confidence."""

ZTW = partial(Method, "ztw", cascade=True, ensemble="geometric")
"""Zero Time Waste (Wołczyk et al. 2021): cascade links and a geometric ensemble, confidence."""


def PBEE(times: int | None = None, **parts: Any) -> Method:
    """Patience-based early exit (Zhou et al. 2020): SDN's exits; leave when enough of them agree in a row.

    For regression the criterion becomes ``"tolerance"``: leave above τ = −a, when ``times`` changes in a row are below a.

    Raises:
        ArgumentError: ``times`` beside a criterion, which it is short for.
    """
    if times is None:
        return Method("pbee", **{"criterion": "patience", **parts})
    tolerance = Tolerance(times)
    if "criterion" in parts:
        raise ArgumentError(f"times={times} is short for criterion={tolerance.name!r}; give one of them")
    return Method("pbee", criterion=tolerance, **parts)


def GPF(variant: Variant = "paper", width: int | None = None, **parts: Any) -> Method:
    """Global Past-Future (Liao et al. 2021), as its authors' code has it: leaves at low entropy.

    ``variant="ztw"`` is the reading of Zero Time Waste's code: ReLU, no factor 2, and confidence.
    """
    check("variant", variant, Variant)
    criterion = "confidence" if variant == "ztw" else "entropy"
    return Method("gpf", past_future=variant, width=width, **{"criterion": criterion, **parts})


def BranchyNet(nats: bool = False, **parts: Any) -> Method:
    """BranchyNet (Teerapittayanon et al. 2016): independent exits, low entropy, with τ = 1 − H / ln C.

    With ``nats=True`` it is leaving at an entropy below T nats, as the paper counts: τ = −T.
    """
    return Method("branchynet", **{"criterion": "nats" if nats else "entropy", **parts})


PRESETS: dict[str, Any] = {"sdn": SDN, "pbee": PBEE, "ztw": ZTW, "gpf": GPF, "branchynet": BranchyNet}


_BY_DEFAULT = ("confidence", "entropy", "patience")
"""The criteria that methods have where none is asked for; a regression has tolerance in their place."""


def as_method(method: str | Method) -> Method:
    """A preset's name, or a :class:`Method` as it is.

    Raises:
        ExitkitError: an unknown name.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in PRESETS:
        made: Method = PRESETS[method]()
        return made
    raise unknown_name("method", method, PRESETS, "Or give a config such as exitkit.ZTW(ensemble='additive').")


def for_outputs(method: Method, outputs: int, model: str) -> Method:
    """``method`` for a model with so many outputs; one output is regression, where samples leave by tolerance.

    Raises:
        ExitkitError: the method combines or compares probabilities, and there are none, or predictions, and there are none.
    """
    if outputs > 1:
        check_task(method.score, outputs)
        return method
    one = f"{model} has 1 output, which is regression"
    if method.ensemble != "none":
        raise ArgumentError(
            f"{one}, and the ensemble of method={method.name!r} combines probabilities; leave it out, as in "
            "exitkit.ZTW(ensemble='none'), which is the cascade alone, or use 'sdn', 'pbee' or 'gpf'"
        )
    if method.score.regression:
        return method
    if method.criterion not in _BY_DEFAULT:
        raise ArgumentError(
            f"{one}, and criterion={method.criterion!r} scores classes; use 'tolerance': samples leave once predictions stop "
            "changing. Or give a binary classifier two outputs (logits 0 and z are the same decision)"
        )
    return replace(method, criterion=Tolerance())


def check_task(criterion: Criterion, outputs: int) -> None:
    """Whether a criterion scores what a model with so many outputs answers.

    Raises:
        ArgumentError: a regression's for classes, or the other way round.
    """
    if criterion.regression != (outputs == 1):
        raise ArgumentError(
            f"criterion={criterion.name!r} is for {'regression' if criterion.regression else 'classes'}, but the model has "
            f"{counted(outputs, 'output')}; use {'tolerance' if outputs == 1 else 'patience'!r}"
        )
