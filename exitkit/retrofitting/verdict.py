"""The verdict: exits only where the guaranteed policy saves compute and, side by side on this device, time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from exitkit.common.batches import move, split_batch
from exitkit.common.console import counted
from exitkit.common.errors import ExitkitError
from exitkit.engine.backbone_alone import compile_backbone
from exitkit.engine.compiling import compile
from exitkit.engine.engine import Engine
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.model import MultiExitModel
from exitkit.retrofitting.alternatives import Alternative
from exitkit.surgery.capturing import Capture
from exitkit.surgery.inputs import Example, call_on

Verdict = Literal["exits", "backbone"]
_ROUNDS = 7
_SAMPLES = 512
"""Timed in a round, at most."""
_SECONDS = 2.0
"""That a round of the backbone takes, at most, for fewer samples where they are slow."""

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds per sample, measured in turn on the same batches: medians of several rounds.

    Attributes:
        device: the device's kind and, on a CPU, its threads.
        batch_size: how many samples were answered together.
        compiled: whether engine and backbone were compiled, both, or ran eagerly, both.
        backbone: of the backbone.
        exits: of the engine at the policy; None where there was no policy to time.
        others: of the alternatives by name.
    """

    device: str
    batch_size: int
    compiled: bool
    backbone: float
    exits: float | None
    others: dict[str, float]

    @property
    def saved(self) -> float:
        """The share of the backbone's time that the engine saves; below 0 where it is slower."""
        return 0.0 if self.exits is None else 1 - self.exits / self.backbone


@dataclass(frozen=True)
class Decision:
    """What to ship: ``instead``, or where that is None what ``verdict`` says; ``reason`` says it in words and numbers."""

    verdict: Verdict
    instead: str | None
    reason: str


def engines(
    model: MultiExitModel | None,
    policy: ExitPolicy | None,
    captured: Capture,
    others: Mapping[str, Capture],
    optimize: bool,
) -> tuple[Engine | None, dict[str, Call], bool, str]:
    """The engine, the ways of answering to be timed, whether they are compiled, and why not where they were to be.

    All are compiled, or, where one cannot be, none.
    """
    reason = ""
    if optimize:
        try:
            engine = None if model is None else compile(model, policy, optimize=True)
            runs: dict[str, Call] = {"": compile_backbone(captured)}
            runs |= {name: compile_backbone(other) for name, other in others.items()}
            return engine, runs, True, ""
        except (ExitkitError, RuntimeError, OSError) as error:  # no C++ compiler, a layer that Inductor cannot lower
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    engine = None if model is None else compile(model, policy)
    runs = {"": _eager(captured)} | {name: _eager(other) for name, other in others.items()}
    return engine, runs, False, reason


def _eager(captured: Capture) -> Call:
    """The captured graph, as an engine that is not compiled runs it."""
    return lambda batch: captured.graph(*captured.spec.tensors(batch))


def timed(
    engine: Engine | None,
    runs: Mapping[str, Call],
    compiled: bool,
    loader: Iterable[Any],
    batch_size: int,
    device: torch.device,
) -> Times:
    """Side by side on samples of ``loader``, put together into batches of ``batch_size``."""
    ways: dict[str | None, Call] = {}
    ways.update(runs.items())
    if engine is not None:
        ways[None] = lambda batch, engine=engine: call_on(engine, batch)  # type: ignore[misc]
    batches = list(itertools.islice(_batches(loader, batch_size, device), max(1, _SAMPLES // batch_size)))
    seconds: dict[str | None, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        started = time.perf_counter()
        for batch in batches[:3]:
            ways[""](batch)
        each = (time.perf_counter() - started) / min(3, len(batches))
        batches = batches[: max(1, int(_SECONDS / max(each, 1e-6)))]
        for _ in range(_ROUNDS + 1):
            for name, run in ways.items():
                seconds[name].append(_once(run, batches, device))
    samples = batch_size * len(batches)
    medians = {name: 1e3 * statistics.median(times[1:]) / samples for name, times in seconds.items()}
    kind = device.type if device.type != "cpu" else f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    others = {name: value for name, value in medians.items() if name}
    return Times(kind, batch_size, compiled, medians[""], medians.get(None), others)


def _once(run: Call, batches: Sequence[Any], device: torch.device) -> float:
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _batches(loader: Iterable[Any], size: int, device: torch.device) -> Iterator[Any]:
    """Batches of exactly ``size`` samples out of those of each of the loader's own, repeated where they are fewer."""
    for batch in loader:
        example = Example.of(move(split_batch(batch)[0], device))
        count = len(example.tensors[0])
        if count < size:
            whole = example.with_batch(size)
            yield whole.spec.batch(whole.tensors)
        for start in range(0, count - size + 1, size):
            yield example.spec.batch(tuple(tensor[start : start + size] for tensor in example.tensors))


def decide(policy: ExitPolicy | None, times: Times | None, alternatives: Sequence[Alternative]) -> Decision:
    """Whether exits beat the backbone, and whether an alternative beats both."""
    verdict, why = _exits_or_backbone(policy, times)
    exits = verdict == "exits" and policy is not None and times is not None
    cost = policy.guarantee.cost if exits and policy is not None and policy.guarantee is not None else 1.0
    slowest = float("inf") if times is None else (times.exits if exits and times.exits else times.backbone)
    cheaper = [one for one in alternatives if one.promised and one.cost < cost and one.milliseconds < slowest]
    if not cheaper:
        return Decision(verdict, None, f"{why}: ship the {verdict}")
    best = min(cheaper, key=lambda one: one.cost)
    reason = f"{why}; but {best.name} keeps the same promise for {best.cost:.1%} of the MACs: ship that instead"
    return Decision(verdict, best.name, reason)


def _exits_or_backbone(policy: ExitPolicy | None, times: Times | None) -> tuple[Verdict, str]:
    if policy is None or policy.guarantee is None or times is None or times.exits is None:
        return "backbone", "no exit saves anything within the promise on the samples of the search"
    cost = policy.guarantee.cost
    if not policy.guarantee.found:
        return "backbone", f"the cheapest policy with a guarantee costs {cost:.1%} of the MACs"
    measured = (
        f"{times.exits:.3g} against {times.backbone:.3g} ms per sample at batch size {times.batch_size}, {times.device}"
        f"{'' if times.compiled else ', not compiled'}"
    )
    if times.saved <= 0:
        return "backbone", (
            f"the cheapest policy with a guarantee saves {1 - cost:.1%} of the MACs and costs {-times.saved:.1%} more time "
            f"({measured})"
        )
    return (
        "exits",
        f"the guaranteed policy saves {1 - cost:.1%} of the MACs and {times.saved:.1%} of the time ({measured})",
    )
