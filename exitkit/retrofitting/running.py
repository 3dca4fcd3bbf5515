"""``retrofit``: from a pretrained classifier and data to exits with a guarantee, or an honest no."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from exitkit.calibration.risk_control import choose_threshold
from exitkit.common.batches import checked, split_batch
from exitkit.common.console import make_console, shows_progress
from exitkit.common.errors import ArgumentError
from exitkit.common.files import make_folder
from exitkit.evaluation.collecting import collect
from exitkit.evaluation.metrics import Interval
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.exits.classifiers import Head
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.attaching import warn_of_probabilities
from exitkit.multi_exit.model import MultiExitModel
from exitkit.retrofitting.alternatives import Alternative, beside, captured_alternatives, named, weighed
from exitkit.retrofitting.beginning import Wanted, search_for
from exitkit.retrofitting.candidates import Effort
from exitkit.retrofitting.choice import cheapest
from exitkit.retrofitting.finishing import finish
from exitkit.retrofitting.prices import Cost
from exitkit.retrofitting.result import Candidate, Retrofit
from exitkit.retrofitting.rounds import Search
from exitkit.retrofitting.samples import Data
from exitkit.retrofitting.verdict import Times, decide, engines, timed
from exitkit.surgery.capturing import Capture, capture
from exitkit.surgery.inputs import Example
from exitkit.surgery.replace_classifier import ends_in_softmax, outputs_of


def retrofit(
    model: nn.Module,
    train_loader: Iterable[Any],
    calibration_loader: Iterable[Any],
    *,
    max_drop: float = 0.01,
    confidence: float = 0.95,
    cost: Cost = "macs",
    batch_size: int = 1,
    effort: Effort = "standard",
    heads: Sequence[Head] | None = None,
    boundaries: Sequence[str] | None = None,
    alternatives: Sequence[nn.Module] | Mapping[str, nn.Module] = (),
    search_loader: Iterable[Any] | None = None,
    example_inputs: Any = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    channels_last: bool = False,
    optimize: bool = True,
    show_progress: bool = True,
) -> Retrofit:
    """Find the exits that save most within a promise, train them, guarantee the promise, and say whether to ship them.

    Candidates (boundaries × heads) are trained together on the frozen backbone in rounds from which fewer and fewer go on.
    The set of up to three exits with the least expected cost is trained to the end, ``calibration_loader`` gives its
    threshold a guarantee, and engine and backbone are timed side by side. The model itself is never changed.

    Args:
        model: a pretrained classifier whose output is logits (B, C).
        train_loader: what exits learn from, as :class:`exitkit.Trainer` takes it; a fifth of it is held out for the search.
            Without labels the exits imitate the backbone, and the promise is about disagreement with it.
        calibration_loader: samples that nothing has seen, not augmented, for the guarantee; those that are among the
            training data too are left out with a warning.
        max_drop: what may be lost against the model, in (0, 1): the promise.
        confidence: how often, over calibration splits, the promise is to hold.
        cost: what is to be saved: ``"macs"``, or ``"time"`` on this device at ``batch_size``, measured eagerly for the search.
        batch_size: how many samples are answered together in use.
        effort: what the search may cost, in epochs of the backbone's forward: ``"quick"`` 8, ``"standard"`` 30,
            ``"thorough"`` 90; finishing comes on top, with at most 5, 30 or 60 epochs of the chosen exits.
        heads: their kinds, names or functions as for :func:`exitkit.attach`; by default ``1L``, ``2L-256``, ``strided``,
            ``tail`` and ``branch-1`` to ``branch-3``.
        boundaries: names, as ``exitkit.inspect(model)`` lists them; by default up to eight, spread over the backbone.
        alternatives: smaller classifiers of the same classes that take the same inputs; they stand beside, alone and before
            the model.
        search_loader: samples to choose on instead of a part of ``train_loader``; better, where the backbone knows its
            training data by heart.
        example_inputs: as for :func:`exitkit.attach`.
        output_dir: where what was found is kept as it comes. Killed at any point, the same call goes on.
        seed: all random numbers follow from it.
        mixed_precision: what exits learn in, as for :class:`exitkit.Trainer`; choice and guarantee are in the model's own.
        channels_last: as for :class:`exitkit.Trainer`.
        optimize: whether engine and backbone are compiled to be timed, as for :func:`exitkit.compile`: as they will be used.
        show_progress: say on stderr what is done, and how long it takes.

    Raises:
        ArgumentError: loaders that cannot be read, too few calibration samples (the message says how many would do) or such
            that were trained on, a backbone no better than chance on the data, one class in the labels, a regression, other
            classes in ``alternatives``, an ``output_dir`` of another call.
        FileError: an ``output_dir`` that cannot be written, or of which a file is damaged.
        NotCapturableError: a model that cannot be captured or cut.
    """
    wanted = Wanted(max_drop, confidence, cost, batch_size, effort, seed, mixed_precision, channels_last, optimize)
    if isinstance(model, MultiExitModel):
        raise ArgumentError("model has exits already; give the classifier itself, exitkit.detach(model)")
    others = named(alternatives)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        make_folder(folder, "output_dir=")
    say = _speaker(show_progress)
    name = "samples of calibration_loader" if example_inputs is None else "example_inputs"
    captured = capture(model, _example(example_inputs, calibration_loader), name)
    if ends_in_softmax(captured):
        warn_of_probabilities(model)
    outputs = outputs_of(captured)
    if outputs == 1:
        raise ArgumentError(
            "model has 1 output, which is regression, and retrofit promises how often answers are kept; use "
            "exitkit.attach(model, method='pbee'), Trainer, and exitkit.collect(ee, loader).curve() for a threshold"
        )
    other_captures = captured_alternatives(others, captured.spec.batch(captured.example.tensors), outputs)
    data = Data.read(train_loader, calibration_loader, search_loader, max_drop, confidence, seed, len(others))
    if others:
        data.check_repeatable()
    with _kept(folder, say):
        search = search_for(wanted, captured, data, heads, boundaries, folder, show_progress, say)
        return _Run(wanted, captured, data, search, other_captures, time.monotonic()).result()


def _example(given: Any, calibration_loader: Iterable[Any]) -> Any:
    """The user's example, or two samples of the data."""
    if given is not None:
        return given
    for batch in checked(calibration_loader, "calibration_loader"):
        example = Example.of(split_batch(batch)[0]).with_batch(2)
        return example.spec.batch(example.tensors)
    return None


@dataclass
class _Run:
    """The search and everything after it."""

    wanted: Wanted
    captured: Capture
    data: Data
    search: Search
    others: Mapping[str, Capture]
    started: float

    def result(self) -> Retrofit:
        search = self.search
        chosen = self._chosen()
        model, kept = finish(search, chosen) if chosen else (None, ())
        answers = self._calibrated(model)
        policy = None if model is None else self._policy(answers)
        device = next(self.captured.backbone.parameters()).device
        engine, runs, compiled, why = engines(model, policy, self.captured, self.others, self.wanted.optimize)
        if why:
            search.say(f"timed without compiling: {why}")
        times = timed(engine, runs, compiled, self.data.calibration, self.wanted.batch_size, device)
        alternatives = self._alternatives(answers, times)
        decision = decide(policy, times, alternatives)
        if model is not None:
            model.policy = policy
        guarantee = None if policy is None else policy.guarantee
        cost = guarantee.cost if decision.verdict == "exits" and guarantee is not None else 1.0
        return Retrofit(
            decision.verdict, decision.instead, decision.reason, model, policy, engine, cost,
            self._drop(answers, policy), self._accuracy(answers, policy), times, self._candidates(kept), alternatives,
            search.spent, (time.monotonic() - self.started) / 60,
        )  # fmt: skip

    def _chosen(self) -> list[int]:
        """The candidates of the best set; none where no exit saves anything."""
        left, outputs = self.search.run()
        if outputs is None:
            return []
        best = cheapest(self.search.table(outputs, left), self.search.limit)
        chosen = [left[slot] for slot in best.exits]
        names = " and ".join(self.search.places[k].name for k in chosen) or "no exit"
        self.search.say(
            f"searched for {self.search.spent:.1f} epochs; best set: {names}, {best.cost:.1%} of the backbone"
        )
        return chosen

    def _calibrated(self, model: MultiExitModel | None) -> ExitOutputs:
        """The answers to the calibration samples; of the cheapest candidate too where no exit was chosen."""
        outputs = self.data.unseen(collect(model or self.search.part([0]), self.data.calibration))
        return outputs if self.data.labelled else outputs.against_backbone()

    def _policy(self, answers: ExitOutputs) -> ExitPolicy:
        name: Literal["accuracy_drop", "disagreement"] = "accuracy_drop" if self.data.labelled else "disagreement"
        wanted = self.wanted
        return choose_threshold(answers, wanted.max_drop, wanted.confidence, name, exclude=self.data.learned)

    def _lost(self, answers: ExitOutputs, policy: ExitPolicy | None) -> np.ndarray[Any, Any]:
        losses, _ = self.data.risk.losses(answers)
        if policy is None:
            return np.asarray(losses[:, -1])
        return np.asarray(losses[np.arange(len(losses)), answers.exits_at(policy)])

    def _drop(self, answers: ExitOutputs, policy: ExitPolicy | None) -> Interval:
        from scipy.stats import binomtest

        lost = self._lost(answers, policy)
        interval = binomtest(int(lost.sum()), len(lost)).proportion_ci(0.95, "exact")
        return Interval(float(interval.low), float(lost.mean()), float(interval.high))

    def _accuracy(self, answers: ExitOutputs, policy: ExitPolicy | None) -> tuple[float, float] | None:
        if not self.data.labelled:
            return None
        backbone = float(answers.accuracy()[-1])
        return backbone, backbone if policy is None else answers.at(policy).accuracy

    def _alternatives(self, answers: ExitOutputs, times: Times) -> tuple[Alternative, ...]:
        found: list[Alternative] = []
        for name, captured in self.others.items():
            other = beside(captured, self.data.calibration, answers)
            each = (times.others[name], times.backbone)
            found += weighed(name, other, self.data.risk, self.wanted.max_drop, self.data.confidence, each)
        return tuple(found)

    def _candidates(self, kept: Sequence[int]) -> tuple[Candidate, ...]:
        search, found = self.search, []
        for k, (place, trial) in enumerate(zip(search.places, search.trials, strict=True)):
            dropped = None if k in kept else trial.dropped or "the best set does without it"
            until, heads = search.prices.until[k], search.prices.heads[k]
            found.append(
                Candidate(
                    place.boundary.name,
                    place.head,
                    place.boundary.macs + place.macs,
                    until + heads,
                    trial.epochs,
                    trial.accuracy,
                    trial.saving,
                    dropped,
                )
            )
        return tuple(found)


def _speaker(show: bool) -> Callable[[str], None]:
    if not shows_progress(show):
        return lambda text: None
    console = make_console(sys.stderr)
    return lambda text: console.print(text, highlight=False)


@contextmanager
def _kept(folder: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(
            "stopped; nothing was kept: with output_dir= the same call goes on where it was stopped"
            if folder is None
            else f"stopped; what was found so far is kept in {str(folder)!r}: the same call goes on from there"
        )
        raise
