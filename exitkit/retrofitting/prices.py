"""What candidates cost, as shares of the backbone: in MACs, or in this device's own time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from exitkit.common.batches import move
from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing
from exitkit.engine.profiling import median_seconds
from exitkit.multi_exit.model import MultiExitModel
from exitkit.retrofitting.candidates import Place
from exitkit.surgery.capturing import evaluation_mode
from exitkit.surgery.hooks import HookPoint, recording
from exitkit.surgery.inputs import Example, argument, as_call

Cost = Literal["macs", "time"]
_REPEATS = 5
_FORMAT = "exitkit-retrofit-1"


@dataclass(frozen=True)
class Prices:
    """Shares of the backbone's cost.

    Attributes:
        until: (K,) of the backbone up to each candidate's boundary.
        heads: (K,) of its head.
    """

    until: tuple[float, ...]
    heads: tuple[float, ...]

    def of(self, candidates: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``until`` and ``heads`` of some candidates."""
        return np.array([self.until[k] for k in candidates]), np.array([self.heads[k] for k in candidates])


def in_macs(pool: MultiExitModel, places: Sequence[Place]) -> Prices:
    """By counted MACs."""
    whole = max(pool.anatomy.macs, 1)
    return Prices(tuple(place.boundary.share for place in places), tuple(place.macs / whole for place in places))


def in_time(pool: MultiExitModel, places: Sequence[Place], inputs: Any) -> Prices:
    """By the medians of measured times of one batch, eager: how long a step takes depends on more than its MACs."""
    device = next(pool.parameters()).device
    example = Example.of(move(inputs, device))
    args, kwargs = as_call(example.spec.batch(example.tensors))
    backbone = pool.backbone
    with evaluation_mode(pool), torch.inference_mode():
        features, _ = pool.run_heads(*args, **kwargs)

        def run_until(point: HookPoint) -> None:
            with recording(backbone, [point], stop=True):
                backbone(*args, **kwargs)

        def run_head(slot: int) -> None:
            reads = [argument(backbone.forward, key, args, kwargs) for key in pool.specs[slot].inputs]
            pool.classifiers[slot](features[slot], None, reads)

        whole = median_seconds(lambda: backbone(*args, **kwargs), device, _REPEATS)
        points = {spec.boundary.position: spec.hook for spec in pool.specs}  # in the order in which they run
        until = [median_seconds(partial(run_until, point), device, _REPEATS) for point in points.values()]
        heads = [median_seconds(partial(run_head, slot), device, _REPEATS) / whole for slot in range(len(places))]
    rising = np.minimum(np.maximum.accumulate(until) / whole, 1.0).tolist()
    at = dict(zip(points, rising, strict=True))
    return Prices(tuple(at[place.boundary.position] for place in places), tuple(heads))


def kept_prices(path: Path | None, settings: dict[str, Any], measure: Callable[[], Prices]) -> Prices:
    """The prices of a run that began at ``path`` with the same settings, so that it goes on with them; else new ones, kept.

    Raises:
        ArgumentError: a run with other settings.
        FileError: a damaged file, or one of another version.
    """
    if path is None:
        return measure()
    if not path.exists():
        prices = measure()
        with replacing(path) as temporary:
            content = {"format": _FORMAT, "settings": settings, "prices": asdict(prices)}
            temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
        return prices
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind, was = found["format"], dict(found["settings"])
        prices = Prices(*(tuple(map(float, found["prices"][name])) for name in ("until", "heads")))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise FileError(f"{str(path)!r} is damaged ({type(error).__name__}); use another output_dir") from error
    if kind != _FORMAT:
        raise FileError(f"{str(path)!r} was written by another version of exitkit; use another output_dir")
    for name, value in json.loads(json.dumps(settings)).items():
        if was.get(name) != value:
            raise ArgumentError(
                f"output_dir={str(path.parent)!r} holds a search with {name}={str(was.get(name))[:80]}, this call has "
                f"{str(value)[:80]}; call with the same, or use another output_dir"
            )
    return prices
