"""Several measurements of several models side by side: a row for each measurement, a column for each model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.analysis.dominance import GradientDominance
from exitkit.analysis.information import Information
from exitkit.analysis.measurement import Measurement
from exitkit.analysis.path_results import Connectivity
from exitkit.analysis.rank import Rank
from exitkit.analysis.surface import Landscape
from exitkit.common.files import replacing
from exitkit.common.schema import build, read_json, to_json
from exitkit.evaluation.plots import new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "analysis"
"""Of a run's directory, where its measurements are by default."""

_INDEX = "analysis.json"


@dataclass(frozen=True)
class Kind:
    """A measurement as a reader meets it.

    Attributes:
        result: its class.
        title: what it is called.
        says: what the picture shows, and what it cannot.
    """

    result: type[Measurement]
    title: str
    says: str


KINDS = {
    "dominance": Kind(
        GradientDominance,
        "Gradient dominance",
        "Whose gradient the training step follows, exit by exit, and how large a share of the step is each exit's. Later "
        "exits reach more of the backbone, so that random gradients rise with depth too: look at the distance to the grey "
        "area, not at the height. It is one moment of training, and leaves out what the optimiser makes of the gradient.",
    ),
    "rank": Kind(
        Rank,
        "Numerical rank",
        "How many directions the features fill, block by block. A higher rank is a richer feature, not a better one; the "
        "number depends on the definition and the samples under the table, so that only curves measured alike can be "
        "compared, and one at the dotted line says nothing of the model.",
    ),
    "information": Kind(
        Information,
        "Mutual information I(X; Z)",
        "How well noisy features tell the samples apart, for several sizes of the noise. The size decides the number, so that "
        "only orderings between curves of the same noise mean something, and in the hatched band there are too few samples to "
        "tell.",
    ),
    "connectivity": Kind(
        Connectivity,
        "Mode connectivity",
        "The loss on the straight line from the first model to this one, hidden units permuted to fit. A barrier between two "
        "regimes means little before it is compared with the barrier between two seeds of one regime.",
    ),
    "landscape": Kind(
        Landscape,
        "Loss landscape",
        "The objective, divided by the number of exits, on a plane of two random directions around the model, in the same "
        "colours for all. It shows two directions of millions; how sharp it looks cannot be compared across architectures or "
        "widths.",
    ),
}
"""The measurements by the names that the command line has for them."""


@dataclass(frozen=True)
class Overview:
    """Measurements by kind and, within each, by model."""

    rows: Mapping[str, Mapping[str, Measurement]]

    def figure(self, kind: str) -> Figure:
        """The models side by side, on axes or in colours of the same scale; below, what the first was measured with."""
        models = self.rows[kind]
        figure = new_figure(max(5.0, 3.4 * len(models)), 4.0)
        panels = figure.subplots(1, len(models), squeeze=False, sharey=kind != "landscape")[0]
        for panel, (name, measured) in zip(panels, models.items(), strict=True):
            measured.draw(panel)
            panel.set_title(name, fontsize=9)
        if kind == "landscape":
            for panel in panels:
                panel.locator_params(nbins=4)
            figure.colorbar(panels[-1].collections[0], ax=list(panels), format="%.2g", label="objective / exits")
        return next(iter(models.values())).with_note(figure)

    def figures(self, kind: str) -> dict[str, Figure]:
        """The same, a figure for each model."""
        made = {}
        for name, measured in self.rows[kind].items():
            made[name] = new_figure(4.4, 3.4)
            measured.draw(made[name].add_subplot())
            made[name].axes[0].set_title(name, fontsize=9)
        if kind != "landscape":
            limits = [figure.axes[0].get_ylim() for figure in made.values()]
            for figure in made.values():
                figure.axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        return made

    def write(self, folder: str | Path) -> None:
        """Write every measurement (safetensors, PNG, CSV), a picture for each kind, and an index of them.

        Raises:
            FileError: ``folder`` cannot be written to.
        """
        folder = Path(folder)
        index: dict[str, dict[str, str]] = {}
        for kind, models in self.rows.items():
            index[kind] = {}
            for number, (name, measured) in enumerate(models.items()):
                stem = f"{kind}-{number}-{re.sub(r'[^0-9A-Za-z]+', '-', name)[:40]}"
                index[kind][name] = f"{stem}.safetensors"
                measured.save(folder / f"{stem}.safetensors")
                measured.plot(folder / f"{stem}.png")
                measured.table().to_csv(folder / f"{stem}.csv")
            write_figure(self.figure(kind), folder / f"{kind}.png")
        with replacing(folder / _INDEX) as temporary:
            temporary.write_text(to_json(index, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Overview | None:
        """What :meth:`write` wrote; None where there is nothing.

        Raises:
            FileError: a damaged file.
        """
        path = Path(folder) / _INDEX
        if not path.exists():
            return None
        data: Any = read_json(path, "delete the folder, or run exitkit analyse again")
        index = build(dict[str, dict[str, str]], data, repr(str(path)))
        return cls(
            {
                kind: {name: KINDS[kind].result.load(path.parent / Path(file).name) for name, file in models.items()}
                for kind, models in index.items()
                if kind in KINDS
            }
        )
