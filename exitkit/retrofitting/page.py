"""The page of a verdict: what was decided in one sentence and one picture, then what it rests on."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit.common.console import in_minutes
from exitkit.common.errors import ArgumentError
from exitkit.common.files import replacing
from exitkit.evaluation.plots import labelled, new_figure
from exitkit.report.figures import Drawn, embedded
from exitkit.report.pages import rendered

if TYPE_CHECKING:
    from exitkit.retrofitting.result import Retrofit


def write_page(result: Retrofit, path: str | PathLike[str]) -> None:
    """One HTML file that needs nothing else.

    Raises:
        ArgumentError: a path that does not end in ``.html``.
        FileError: it cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"path={str(path)!r} must end in .html")
    page = rendered(
        "retrofitting/page.html",
        {"in_minutes": in_minutes, "percent": lambda share, digits=1: f"{share:.{digits}%}"},
        result=result,
        picture=picture(result),
    )
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")


def picture(result: Retrofit) -> Drawn:
    """Accuracy (or agreement) against cost: every candidate, the backbone, the alternatives, and what was chosen."""
    figure = new_figure(5.0, 3.9)
    axes = labelled(figure.add_subplot(), "average cost, a share of the model's MACs", _measure(result))
    tried = [(one.cost, one.accuracy) for one in result.candidates if one.accuracy is not None]
    if tried:
        axes.plot(*zip(*tried, strict=True), "o", color="0.6", markersize=4, label="candidates, each alone")
    right = (1.0, 1.0) if result.accuracy is None else result.accuracy
    axes.plot(1, right[0], "s", color="C7", markersize=8, label="model without exits")
    for number, one in enumerate(result.alternatives):
        reached = 1 - one.risk if one.accuracy is None else one.accuracy
        axes.plot(one.cost, reached, "^", color=f"C{number + 2}", markersize=7, label=one.name)
    guarantee = None if result.policy is None else result.policy.guarantee
    if guarantee is not None:
        reached = 1 - result.drop.value if result.accuracy is None else right[1]
        axes.plot(guarantee.cost, reached, "*", color="C0", markersize=14, label="exits at the guaranteed policy")
    axes.set_xlim(0, 1.08)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=2)
    listed = ", ".join(f"{one.head} after {one.boundary}" for one in result.chosen) or "none"
    return embedded(figure, "front", f"{_measure(result)} against cost; exits chosen: {listed}. {result.reason}.")


def _measure(result: Retrofit) -> str:
    return "agreement with the model" if result.accuracy is None else "accuracy"
