"""A folder of repeated runs: a run of each seed, and what they give together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exitkit.common.errors import ArgumentError
from exitkit.evaluation import Runs
from exitkit.report.run import Run, read_run

_SEED = "seed-"
_MACHINE = ("device", "torch", "python")


def seeds_in(directory: str | Path) -> dict[int, Path]:
    """The folder of each seed, where ``exitkit train --seeds`` wrote several; empty for a run."""
    found = {path: path.name.removeprefix(_SEED) for path in Path(directory).glob(f"{_SEED}*") if path.is_dir()}
    return dict(sorted((int(seed), path) for path, seed in found.items() if seed.isdecimal()))


def seed_folder(directory: str | Path, seed: int) -> Path:
    """Where the run of one seed lies in a folder of repeated runs."""
    return Path(directory) / f"{_SEED}{seed}"


def read_repeated(directory: str | Path) -> dict[str, Runs]:
    """Each method's outputs over the seeds of a folder of repeated runs.

    Raises:
        ExitkitError: no seeds there, a damaged file, or seeds whose settings differ.
    """
    folders = seeds_in(directory)
    if not folders:
        raise ArgumentError(f"{str(directory)!r} holds no {_SEED}0, {_SEED}1, …; make them by exitkit train --seeds 3")
    runs = {seed: read_run(folder, regression=True) for seed, folder in folders.items()}
    (first, one), *others = runs.items()
    for seed, other in others:
        if differing := _differing(_setting(one, first), _setting(other, seed)):
            raise ArgumentError(
                f"{_SEED}{first} and {_SEED}{seed} in {str(directory)!r} are of different settings ({differing}), and are not "
                "averaged; train them with one recipe"
            )
    return {
        method: Runs(tuple(run.results[method].outputs for run in runs.values()), tuple(runs))
        for method in one.results
    }


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two settings differ first, or nothing."""
    key = next((key for key in {**one, **other} if one.get(key) != other.get(key)), None)
    return "" if key is None else f"{key} is {one.get(key)!r} and {other.get(key)!r}"


def _setting(run: Run, seed: int) -> dict[str, Any]:
    """What a run says of itself by dotted key, but for its seed and the machine."""
    known = {"methods": ", ".join(run.results), **run.about}
    setting = _dotted({name: value for name, value in known.items() if name not in _MACHINE})
    setting.pop("trainer.seed", None)
    weights = Path(str(setting.get("weights")))
    if weights.parent.name == f"{_SEED}{seed}":  # of a backbone that was trained with each seed too
        setting["weights"] = str(weights.parent.parent)
    return setting


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by keys such as ``trainer.lr``."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        named |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named
