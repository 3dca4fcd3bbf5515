"""A few samples of a run, small enough to lie in its directory: ``samples.json``."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from exitkit.common.checks import Index
from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing
from exitkit.common.schema import build, read_json, to_json
from exitkit.evaluation import ExitOutputs

FILE = "samples.json"
CLASSES = "classes.txt"
_MOST = 120
_OF_A_KIND = 8
_BUDGETS = (0.5, 0.75, 1.0)
_SIDE = 96
_CHARACTERS = 300
_IMAGE = "data:image/webp;base64,"
_ADDRESS = re.compile(re.escape(_IMAGE) + "[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True)
class Sample:
    """A sample to look at.

    Attributes:
        row: its place in the outputs.
        image: a picture of at most 96 pixels a side as a ``data:`` address, or None.
        text: its text, or None.
    """

    row: Index
    image: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.image is not None and not _ADDRESS.fullmatch(self.image):
            raise ArgumentError("an image is not a data: address of base64, as exitkit writes it")


@dataclass(frozen=True)
class _Document:
    """What ``samples.json`` holds."""

    classes: tuple[str, ...] | None
    samples: tuple[Sample, ...]


def write_samples(directory: str | Path, dataset: Any, outputs: Mapping[str, ExitOutputs]) -> None:
    """Write the samples worth looking at: at most 120, under a megabyte.

    They are those that left early, late, and early but wrong, by each method at half, three quarters and all of the
    backbone's MACs.

    Args:
        directory: of the run.
        dataset: what the outputs were collected on, in their order: items are ``(input, ...)``, the input an image tensor
            (C, H, W) or a text. Of other inputs nothing is written. An image is shown in its own range, from black to
            white, whatever it was normalised with.
        outputs: of each method, with labels.

    Raises:
        ExitkitError: a data set of another size than the outputs, or no labels.
    """
    for name, result in outputs.items():
        if len(result) != len(dataset):
            raise ArgumentError(
                f"dataset holds {len(dataset)} samples, but the outputs {name!r} {len(result)}; give the data set that they "
                "were collected on"
            )
    rows = _rows_worth_looking_at(outputs)
    names = class_names(dataset)
    shown = [_shown(dataset[row][0], row) for row in rows]
    samples = [sample for sample in shown if sample is not None]
    if not samples:
        (Path(directory) / FILE).unlink(missing_ok=True)  # of a run before this one
    else:
        document = {"classes": names, "samples": [asdict(sample) for sample in samples]}
        with replacing(Path(directory) / FILE) as temporary:
            temporary.write_text(to_json(document), encoding="utf-8")


def read_samples(directory: Path) -> tuple[tuple[Sample, ...], tuple[str, ...] | None]:
    """The samples of a run, none where it has none, and the names of the classes where they are known.

    Raises:
        ExitkitError: a damaged file.
    """
    path = directory / FILE
    if not path.exists():
        return (), None
    document = build(_Document, read_json(path, "delete it to go without"), repr(str(path)))
    return document.samples, document.classes


def _rows_worth_looking_at(outputs: Mapping[str, ExitOutputs]) -> list[int]:
    """The most telling of every kind first, each row once."""
    kinds = [kind for result in outputs.values() for kind in _kinds(result)]
    taken = dict.fromkeys(int(kind[place]) for place in range(_OF_A_KIND) for kind in kinds if place < len(kind))
    return list(taken)[:_MOST]


def _kinds(outputs: ExitOutputs) -> list[NDArray[np.int64]]:
    """At each budget the rows that left early and right, late, and early and wrong, the most telling first."""
    curve, right = outputs.curve(), outputs.correct.numpy()
    scores, last = outputs.scores().numpy(), len(outputs.macs) - 1
    kinds = []
    for budget in _BUDGETS:
        if curve.cost[0] >= budget:
            continue
        exits = outputs.exits_at(curve.at_budget(budget))
        everyone = np.arange(len(exits))
        sure, known = scores[everyone, exits], right[everyone, exits]
        order = np.lexsort((-sure, exits))
        wrong = order[~known[order] & (exits[order] < last)]
        kinds += [
            order[known[order] & (exits[order] < last)],
            order[::-1][: (exits == exits.max()).sum()],
            wrong[np.argsort(~right[wrong, last], kind="stable")],  # those the backbone would have had right
        ]
    return kinds


def _shown(value: Any, row: int) -> Sample | None:
    if isinstance(value, str):
        text = value if len(value) <= _CHARACTERS else value[:_CHARACTERS].rstrip() + " …"
        return Sample(row, text=text)
    if isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] in (1, 3) and value.is_floating_point():
        return Sample(row, image=_picture(value))
    return None


def _picture(pixels: Tensor) -> str:
    low, high = pixels.min(), pixels.max()
    grey = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    array = grey.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.thumbnail((_SIDE, _SIDE))
    written = io.BytesIO()
    image.save(written, "webp", quality=90)
    return _IMAGE + base64.b64encode(written.getvalue()).decode()


def class_names(dataset: Any) -> Sequence[str] | None:
    """``classes`` of torchvision's data sets, also below a subset; with a ``classes.txt`` in a data set's folder or in the
    one around it, the names that it gives them.
    """
    while dataset is not None:
        names = getattr(dataset, "classes", None)
        if names is not None:
            ids, root = [str(name) for name in names], getattr(dataset, "root", None)
            return ids if root is None else _named_in((Path(root) / CLASSES, Path(root).parent / CLASSES), ids)
        dataset = getattr(dataset, "dataset", None)
    return None


def _named_in(paths: Sequence[Path], ids: Sequence[str]) -> Sequence[str]:
    path = next((path for path in paths if path.is_file()), None)
    return ids if path is None else read_class_names(path, ids)


def read_class_names(path: Path, ids: Sequence[str]) -> Sequence[str]:
    """The names in a file of one class a line: the id and its name, or the names alone in the order of the ids.

    Raises:
        FileError: neither, or no text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}; write one class a line, in UTF-8") from error
    known = {first: name for first, _, name in (line.replace("\t", " ").partition(" ") for line in lines) if name}
    if known.keys() >= set(ids):
        return [known[one].strip() for one in ids]
    if len(lines) != len(ids):
        raise FileError(
            f"{str(path)!r} has {len(lines)} lines for {len(ids)} classes; write one a line: names in the order of the "
            f"classes, or an id and its name, such as '{ids[0]} NAME'"
        )
    return lines
