"""Methods: frozen compositions of a link, a combiner and a criterion. The heads are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from exitkit.criteria import Criterion
from exitkit.errors import ExitkitError, unknown_name


@dataclass(frozen=True)
class Method:
    """An early-exit method as a composition of parts.

    Attributes:
        name: what tables call it.
        cascade: each exit also reads the logits of the one before it.
        ensemble: how each exit's answer is combined with those before it.
        ensemble_final: whether the backbone's own answer is combined too (then τ > 1 is not the original model).
        criterion: the score that decides.
    """

    name: str
    cascade: bool = False
    ensemble: Literal["none", "geometric", "additive"] = "none"
    ensemble_final: bool = False
    criterion: Criterion = "confidence"

    def __post_init__(self) -> None:
        if self.ensemble not in (allowed := ("none", "geometric", "additive")):
            raise unknown_name("ensemble", self.ensemble, allowed)
        if self.criterion not in get_args(Criterion):
            raise unknown_name("criterion", self.criterion, get_args(Criterion))
        if self.ensemble_final and self.ensemble == "none":
            raise ExitkitError("ensemble_final=True needs an ensemble: set ensemble='geometric' or 'additive'")


SDN = partial(Method, "sdn")
"""Shallow-Deep Networks (Kaya et al. 2019): independent exits, confidence."""

PBEE = partial(Method, "pbee", criterion="patience")
"""Patience-based early exit (Zhou et al. 2020): SDN's exits; leave when enough of them agree in a row."""

ZTW = partial(Method, "ztw", cascade=True, ensemble="geometric")
"""Zero Time Waste (Wołczyk et al. 2021): cascade links and a geometric ensemble, confidence."""

PRESETS: dict[str, Any] = {"sdn": SDN, "pbee": PBEE, "ztw": ZTW}


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
