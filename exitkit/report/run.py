"""A run's directory, read: outputs of each method, and what else is known about them.

======================================  ==============================================================================
``outputs-METHOD.safetensors``          every exit's predictions (:class:`exitkit.ExitOutputs`); at least one
``exits/METHOD/``                       the exits, as ``save_pretrained`` writes them; optional
``backbone.safetensors``                the backbone's weights, where the run trained it; optional
``inputs.safetensors``                  a few test samples as the model takes them, to time a package on; optional
``calibration-METHOD.safetensors``      the same on other samples, for choosing thresholds; optional
``results.json``                        ``about`` the run, and the stages of each method; optional
``samples.json``                        a few samples (:mod:`exitkit.report.samples`); optional
``classes.txt``                         names of the classes, one a line; by default the data set's; optional
``thresholds.json``                     what ``exitkit calibrate`` chose; optional
``validation-METHOD.safetensors``       the outputs on what early stopping and the ensemble saw; optional
======================================  ==============================================================================

A folder of repeated runs holds a run of each seed: ``seed-0/``, ``seed-1/``, …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from exitkit.common.checks import Count, Positive
from exitkit.common.console import printable
from exitkit.common.errors import ArgumentError, FileError, unknown_name
from exitkit.common.files import replacing
from exitkit.common.hashes import digest
from exitkit.common.schema import build, read_json, to_json
from exitkit.evaluation import ExitOutputs, RegressionOutputs
from exitkit.evaluation.files import is_regression
from exitkit.evaluation.paired import check_comparable
from exitkit.methods.policy import ExitPolicy
from exitkit.report.samples import CLASSES, Sample, read_class_names, read_samples
from exitkit.report.stages import Stage

T = TypeVar("T")
_LISTED = 8
"""Folders that an error names."""
_OUTPUTS, _CALIBRATION, _SUFFIX = "outputs-", "calibration-", ".safetensors"
RESULTS, THRESHOLDS = "results.json", "thresholds.json"
BACKBONE, INPUTS = "backbone.safetensors", "inputs.safetensors"


@dataclass(frozen=True)
class Check:
    """What a chosen threshold gave on samples that it was not chosen on.

    Attributes:
        samples: how many.
        risk: the risk that is bounded, measured.
        cost: average cost, as a share of the backbone.
        accuracy: or None without labels.
        backbone_accuracy: or None without labels.
    """

    samples: Count
    risk: float
    cost: Positive
    accuracy: float | None
    backbone_accuracy: float | None


@dataclass(frozen=True)
class Calibrated:
    """A threshold with its guarantee, and how it fared on other samples (None where all were used)."""

    chosen: ExitPolicy
    check: Check | None


@dataclass(frozen=True)
class _Signed:
    """As it stands in the file: with a digest, so that a damaged threshold is noticed."""

    chosen: ExitPolicy
    check: Check | None
    sha256: str

    @classmethod
    def of(cls, one: Calibrated) -> _Signed:
        return cls(one.chosen, one.check, _digest(one))

    def calibrated(self) -> Calibrated:
        return Calibrated(self.chosen, self.check)


def _digest(one: Calibrated) -> str:
    """Of what JSON keeps."""
    return digest(to_json({"chosen": one.chosen.to_dict(), "check": one.check and asdict(one.check)}))


@dataclass(frozen=True, eq=False)
class Result:
    """What a run holds of one method; ``stages`` is empty and ``calibrated`` None where nothing was written."""

    outputs: ExitOutputs
    stages: tuple[Stage, ...] = ()
    calibrated: Calibrated | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """A run's directory: what it says about itself, its methods, and the names of the classes where known."""

    directory: Path
    about: dict[str, Any]
    results: dict[str, Result]
    classes: tuple[str, ...] | None


def read_run(directory: str | Path, *, regression: bool = False) -> Run:
    """Read a run.

    Args:
        directory: of the run.
        regression: whether it may be one, whose outputs are :class:`exitkit.evaluation.RegressionOutputs`.

    Raises:
        ExitkitError: no directory, no outputs in it, a damaged file, or a regression that is not asked for.
    """
    directory = Path(directory)
    paths = _outputs_in(directory)
    samples, classes = read_samples(directory)
    about, stages = _read_results(directory / RESULTS)
    thresholds = _read_thresholds(directory)
    results = {}
    for name, path in paths.items():
        outputs = (_either if regression else ExitOutputs.load)(path)
        fitting = tuple(sample for sample in samples if 0 <= sample.row < len(outputs))
        measured = stages.get(name, ())
        if measured and len(measured) != len(outputs.macs):
            raise FileError(
                f"{str(directory / RESULTS)!r} has {len(measured)} stages for {name!r}, whose outputs have "
                f"{len(outputs.macs)}; they are of different runs"
            )
        results[name] = Result(outputs, measured, thresholds.get(name), fitting)
    if (directory / CLASSES).exists():
        count = next(iter(results.values())).outputs.log_probs.shape[2]
        classes = tuple(read_class_names(directory / CLASSES, classes or [str(number) for number in range(count)]))
    return Run(directory, about, results, classes)


def read_comparison(places: Sequence[str | Path]) -> dict[str, ExitOutputs]:
    """Outputs by name, from run directories (all their methods) and single files of outputs.

    Names are those of the methods, with the run's before them where several places are given.

    Raises:
        ExitkitError: nothing there, the same place twice, outputs of other samples or another backbone, or a regression and a
            classifier.
    """
    found: dict[str, ExitOutputs] = {}
    for place in map(Path, places):
        directory, paths = (place.parent, {_name(place): place}) if place.is_file() else (place, _outputs_in(place))
        for name, path in paths.items():
            full = name if len(places) == 1 else f"{directory.resolve().name}/{name}"
            if full in found:
                raise ArgumentError(f"{full!r} comes twice in {[str(place) for place in places]}; name each run once")
            found[full] = _either(path)
    check_comparable(found)
    return found


def holds_regression(directory: str | Path) -> bool:
    """Whether any outputs of a run are a regression's."""
    return any(map(is_regression, Path(directory).glob(f"{_OUTPUTS}*{_SUFFIX}")))


def exits_folder(directory: str | Path, name: str) -> Path:
    """Where a run keeps the exits of method ``name``."""
    return Path(directory) / "exits" / name


def outputs_file(directory: str | Path, name: str) -> Path:
    """Where a run keeps the outputs of the test samples by the exits of a result."""
    return Path(directory) / f"{_OUTPUTS}{name}{_SUFFIX}"


def validation_file(directory: str | Path, name: str) -> Path:
    """Where a run keeps the outputs on its validation samples: what early stopping and the ensemble saw."""
    return Path(directory) / f"validation-{name}{_SUFFIX}"


def calibration_outputs(directory: str | Path, name: str) -> ExitOutputs | None:
    """The outputs that a run keeps for choosing the thresholds of method ``name``; None where it has none."""
    path = Path(directory) / f"{_CALIBRATION}{name}{_SUFFIX}"
    return ExitOutputs.load(path) if path.exists() else None


def write_thresholds(directory: str | Path, chosen: dict[str, Calibrated]) -> Path:
    """Put thresholds into a run's ``thresholds.json``; those of other methods stay."""
    path = Path(directory) / THRESHOLDS
    merged = _read_thresholds(path.parent) | chosen
    document = {name: asdict(_Signed.of(one)) for name, one in merged.items()}
    with replacing(path) as temporary:
        temporary.write_text(to_json(document, indent=2), encoding="utf-8")
    return path


def named(results: dict[str, Result], names: str | None) -> dict[str, Result]:
    """Of the results those with the comma-separated ``names``; all for None.

    Raises:
        ExitkitError: a name that is not among them.
    """
    wanted = list(results) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in results:
            raise unknown_name("outputs", name, results)
    return {name: results[name] for name in wanted}


def _either(path: Path) -> ExitOutputs:
    """Outputs of a classifier or of a regression."""
    return (RegressionOutputs if is_regression(path) else ExitOutputs).load(path)


def _outputs_in(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise ArgumentError(
            f"RUN_DIR {str(directory)!r} is not a directory; give one that exitkit bench, train or demo wrote"
        )
    paths = {_name(path): path for path in sorted(directory.glob(f"{_OUTPUTS}*{_SUFFIX}"))}
    if not paths and (below := _runs_below(directory)):
        listed = ", ".join(str(folder) for folder in below[:_LISTED]) + (", ..." if len(below) > _LISTED else "")
        raise ArgumentError(
            f"RUN_DIR {str(directory)!r} holds no run itself, but {len(below)} below it\nGive one of them, or several of the "
            f"same data: {listed}"
        )
    if not paths and (directory / "retrofit.json").exists():
        raise ArgumentError(
            f"RUN_DIR {str(directory)!r} is of exitkit retrofit, whose page is {directory / 'report.html'}; give one that "
            "exitkit bench, train or demo wrote"
        )
    if not paths:
        raise ArgumentError(
            f"RUN_DIR {str(directory)!r} holds no results: no {_OUTPUTS}METHOD{_SUFFIX}. Make a run with exitkit bench --out "
            f"{directory}, or write there with outputs.save({str(directory / (_OUTPUTS + 'mine' + _SUFFIX))!r})"
        )
    return paths


def _runs_below(directory: Path) -> list[Path]:
    """Folders of runs, once or with several seeds, in a folder of them, or in the ``runs/`` of ``exitkit reproduce --out``."""
    outputs = f"{_OUTPUTS}*{_SUFFIX}"
    folders = sorted(one for parent in (directory, directory / "runs") for one in parent.glob("*") if one.is_dir())
    return [one for one in folders if any(one.glob(outputs)) or any(one.glob(f"seed-*/{outputs}"))]


def _name(path: Path) -> str:
    return printable(path.name.removesuffix(_SUFFIX).removeprefix(_OUTPUTS))


def _read_results(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Stage, ...]]]:
    """What a run says about itself, and the stages of each method."""
    document = _content(path, dict[str, Any])
    about = build(dict[str, Any], document.get("about", {}), repr(str(path)))
    methods = build(dict[str, dict[str, Any]], document.get("methods", {}), repr(str(path)))
    stages = {name: one.get("stages", []) for name, one in methods.items()}
    return about, build(dict[str, tuple[Stage, ...]], stages, repr(str(path)))


def _read_thresholds(directory: Path) -> dict[str, Calibrated]:
    path = directory / THRESHOLDS
    signed = _content(path, dict[str, _Signed])
    read = {name: one.calibrated() for name, one in signed.items()}
    for name, one in read.items():
        if _digest(one) != signed[name].sha256:
            raise FileError(
                f"{str(path)!r} is damaged: the threshold of {name!r} is not what was chosen; calibrate again"
            )
    return read


def _content(path: Path, kind: type[T]) -> T:
    """What a file of the run holds, as it is declared; nothing where there is none.

    Raises:
        FileError: a damaged file.
    """
    data = read_json(path, "delete it, or run its command again") if path.exists() else {}
    return build(kind, data, repr(str(path)))
