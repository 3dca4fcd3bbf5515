"""The search's training: all candidates at once on the frozen backbone, in rounds from which fewer and fewer go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from exitkit.calibration.risks import Risk
from exitkit.common.batches import move, split_batch
from exitkit.common.console import counted, in_minutes
from exitkit.common.errors import DivergedError
from exitkit.common.files import replacing
from exitkit.evaluation.collecting import collect
from exitkit.evaluation.outputs import ExitOutputs
from exitkit.multi_exit.model import MultiExitModel
from exitkit.retrofitting.candidates import Effort, Place, is_light
from exitkit.retrofitting.choice import Answers, choices, cost_at_price
from exitkit.retrofitting.prices import Prices
from exitkit.retrofitting.samples import Split, has_numbers, part_of
from exitkit.surgery.capturing import evaluation_mode
from exitkit.surgery.inputs import call_on
from exitkit.training.distributed import random_state, seed_everything, set_random_state
from exitkit.training.trainer import Trainer

BUDGETS: dict[Effort, float] = {"quick": 8.0, "standard": 30.0, "thorough": 90.0}
"""What the search may cost, in epochs of the backbone's forward over the samples that are learned from."""

PRICES = (2.0, 3.0)
"""What a mistake costs, in backbones, where candidates are compared after the first and the second of three rounds.

Training to the end takes about two thirds of the mistakes of the first round away, and half of those of the second: at what
the promise makes a mistake cost, a late boundary, which learns at once and never saves much, would win over an early one.
"""

_LIGHT_PRICE = 10.0
"""The same for light heads, which have learned to the end by then."""

_KEPT = 3
"""One candidate in so many goes on, of each kind of head."""

_BACKWARD = 3.0
"""A training step of a head costs about so many forwards of it."""

_LIGHT_EPOCHS: dict[Effort, int] = {"quick": 5, "standard": 15, "thorough": 40}
_SHARE_OF_LIGHT = 6
"""Without a cache, light heads get one part in so many of the budget."""


@dataclass
class Trial:
    """What is known of one candidate.

    Attributes:
        epochs: trained so far, in passes over the samples that are learned from.
        accuracy: of it alone on the samples of the search (agreement with the backbone where there are no labels).
        saving: what it alone saves there at the limit, as a share of the backbone.
        dropped: why it did not go on; None for those that reached the choice.
    """

    epochs: float = 0.0
    accuracy: float | None = None
    saving: float | None = None
    dropped: str | None = None


@dataclass
class Search:
    """A search under way.

    Attributes:
        pool: all candidates as the exits of one model; their weights are trained in place.
        limit: the average loss on the samples of the search that a choice may have.
        labelled: whether the samples have labels.
        training: options of the trainer.
        directory: where products are kept, or None.
        say: tells the user a line.
    """

    pool: MultiExitModel
    places: tuple[Place, ...]
    prices: Prices
    split: Split
    risk: Risk
    limit: float
    labelled: bool
    training: dict[str, Any]
    effort: Effort
    directory: Path | None
    say: Callable[[str], None]
    trials: list[Trial] = field(init=False)
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seed(self) -> int:
        return int(self.training["seed"])

    def __post_init__(self) -> None:
        self.trials = [Trial() for _ in self.places]

    def run(self) -> tuple[list[int], ExitOutputs | None]:
        """Train; the candidates that are left, and their answers to the samples of the search; None where none is left."""
        light = [k for k, place in enumerate(self.places) if is_light(place.head)]
        heavy = [k for k in range(len(self.places)) if k not in light]
        left = []
        if light:
            left += self._trained_once("light", light)
        if heavy:
            left += self._halved(heavy)
        left.sort()
        return left, self.answers_of(left, "search") if left else None

    def _trained_once(self, name: str, candidates: list[int]) -> list[int]:
        """Heads that shrink their feature first learn from a cache: one pass of the backbone, then next to nothing."""
        epochs = _LIGHT_EPOCHS[self.effort]
        cached = has_numbers(self.split.train)
        if not cached:
            epochs = max(1, int(BUDGETS[self.effort] / _SHARE_OF_LIGHT / self._cost(candidates)))
        left = self._train(name, candidates, epochs, 1.0, cached)
        passes = 1 if cached else epochs
        self._spend(passes * self._prefix(candidates) + epochs * _BACKWARD * self._heads(candidates))
        return self._keep(left, name, _LIGHT_PRICE)

    def _halved(self, candidates: list[int]) -> list[int]:
        """Rounds of about equal cost, in each of which fewer candidates learn for longer."""
        left = candidates
        for number, price in enumerate((*PRICES, None), 1):
            if not left:
                break
            name = f"round-{number}"
            each = (BUDGETS[self.effort] - self.spent) / (len(PRICES) + 2 - number)
            passes = each / self._cost(left)
            epochs = max(1, int(passes))
            share = min(1.0, passes / epochs)
            cost = epochs * share * self._cost(left)
            left = self._train(name, left, epochs, share, cache=False)
            self._spend(cost)
            left = self._keep(left, name, price)
        return left

    def _spend(self, epochs: float) -> None:
        """Note so many forwards of the backbone, and say how long the rest of the search may take at the pace so far."""
        self.spent += epochs
        budget = BUDGETS[self.effort]
        minutes = (time.monotonic() - self.started) / 60 * (budget / self.spent - 1)
        self.say(
            f"{self.spent:.1f} of {budget:.0f} epochs of the search spent; {in_minutes(minutes, 'at most ')} left"
        )

    def _cost(self, candidates: Sequence[int]) -> float:
        """Of one pass, in forwards of the backbone: up to the last boundary, and a training step of every head."""
        return self._prefix(candidates) + _BACKWARD * self._heads(candidates)

    def _prefix(self, candidates: Sequence[int]) -> float:
        return max(self.places[k].boundary.share for k in candidates)

    def _heads(self, candidates: Sequence[int]) -> float:
        return sum(self.places[k].macs for k in candidates) / max(self.pool.anatomy.macs, 1)

    def _train(self, name: str, candidates: list[int], epochs: int, share: float, cache: bool) -> list[int]:
        """Train some candidates; those whose loss stayed finite. Done already where their weights lie in the directory."""
        path = self.product(name)
        self.say(
            f"{name.replace('-', ' ')}: {counted(len(candidates), 'candidate')}, {counted(epochs, 'epoch')} of "
            f"{round(share * self.split.samples):,} samples"
        )
        if path is not None and path.exists():
            return self._read(path, candidates, epochs * share)
        while candidates:
            part = self.part(candidates)
            before = [_copied(head) for head in part.classifiers]
            try:
                # a run of its own for each number of candidates, so that one that is continued finds its own checkpoint
                self.fit(part, part_of(self.split.train, share), epochs, cache, f"{name}-{len(candidates)}")
                break
            except DivergedError as error:
                if error.exit is None:
                    raise
                lost = candidates[error.exit]
                self.trials[lost].dropped = f"its loss was not finite in {name.replace('-', ' ')}"
                for head, weights in zip(part.classifiers, before, strict=True):
                    head.load_state_dict(weights)
                candidates = [k for k in candidates if k != lost]
        if path is not None:
            with replacing(path) as temporary:
                save_file(self._weights(candidates), temporary)
            for run in path.parent.glob(f"{name}-[0-9]*"):
                remove_run(run)
        for k in candidates:
            self.trials[k].epochs += epochs * share
        return candidates

    def fit(
        self,
        model: MultiExitModel,
        train: Iterable[Any],
        epochs: int,
        cache: bool,
        name: str,
        val: Iterable[Any] | None = None,
        patience: int | None = None,
    ) -> None:
        """One run of the trainer, whose checkpoints lie in a folder of its own."""
        directory = None if self.directory is None else self.directory / name
        options = self.training | {"epochs": epochs, "cache": cache, "patience": patience, "output_dir": directory}
        Trainer(model, **options).fit(train, val)

    def part(self, candidates: Sequence[int]) -> MultiExitModel:
        """The pool with some candidates alone; weights are shared."""
        left_out = set(range(len(self.places))) - set(candidates)
        return self.pool.prune_exits(left_out) if left_out else self.pool

    def answers_of(self, candidates: Sequence[int], name: str) -> ExitOutputs:
        """What candidates say about the samples of the search."""
        return self.collected(self.part(candidates), self.product(f"{name}-outputs"))

    def product(self, name: str) -> Path | None:
        """Where a product is kept, if it is."""
        return None if self.directory is None else self.directory / f"{name}.safetensors"

    def collected(self, model: MultiExitModel, path: Path | None = None) -> ExitOutputs:
        """A model's answers to the samples of the search, augmented alike in every pass; kept at ``path``, and read there."""
        if path is not None and path.exists():
            return ExitOutputs.load(path)
        state = random_state()
        seed_everything(self.split.search, self.seed)
        outputs = collect(model, self.split.search)
        set_random_state(state)
        if path is not None:
            outputs.save(path)
        return outputs

    def table(self, outputs: ExitOutputs, candidates: Sequence[int]) -> Answers:
        """Scores, losses and costs for the choice, a column for each candidate."""
        until, heads = self.prices.of(candidates)
        places = [self.places[k].boundary.position for k in candidates]
        return Answers(outputs.scores()[:, :-1].numpy(), self.losses(outputs), places, until, heads)

    def losses(self, outputs: ExitOutputs) -> NDArray[np.float64]:
        """(N, M+1) what answering at each exit loses."""
        return self.risk.losses(outputs if self.labelled else outputs.against_backbone())[0]

    def _finite(self, candidates: list[int], name: str) -> list[int]:
        """Those whose answers to the samples of the search are finite: a rate too high shows in evaluation alone, at times."""
        part, sound = self.part(candidates), torch.ones(len(candidates), dtype=torch.bool)
        with evaluation_mode(part), torch.no_grad():
            for batch in self.split.search:
                inputs = move(split_batch(batch)[0], next(part.parameters()).device)
                _, heads = call_on(part.run_heads, inputs)
                sound &= torch.stack([head.isfinite().all() for head in heads[:-1]]).cpu()
        for k, fine in zip(candidates, sound.tolist(), strict=True):
            if not fine:
                self.trials[k].dropped = f"{name.replace('-', ' ')}: its answers were not finite"
        return [k for k, fine in zip(candidates, sound.tolist(), strict=True) if fine]

    def _keep(self, candidates: list[int], name: str, price: float | None) -> list[int]:
        """Of every kind of head the best third, all without a price; why the others are dropped is noted.

        Kinds are not compared with one another before the choice, since they learn at different speeds.
        """
        candidates = self._finite(candidates, name) if candidates else []
        if not candidates:
            return []
        outputs = self.answers_of(candidates, name)
        table = self.table(outputs, candidates)
        accuracy = (outputs if self.labelled else outputs.against_backbone()).accuracy()
        for choice in choices(table, self.limit, most=1):
            for slot in choice.exits:
                trial = self.trials[candidates[slot]]
                trial.accuracy, trial.saving = float(accuracy[slot]), max(0.0, 1 - choice.cost)
        if price is None:
            return candidates
        kinds: dict[str, list[int]] = {}
        for slot, k in enumerate(candidates):
            kinds.setdefault(self.places[k].head, []).append(slot)
        kept = []
        for slots in kinds.values():
            costs = {slot: cost_at_price(table, slot, price) for slot in slots}
            order = sorted(slots, key=lambda slot: costs[slot])
            count = math.ceil(len(order) / _KEPT)
            kept += order[:count]
            for slot in order[count:]:
                self.trials[candidates[slot]].dropped = (
                    f"behind {self.places[candidates[order[0]]].name} in {name.replace('-', ' ')}: {costs[slot]:.2f} against "
                    f"{costs[order[0]]:.2f} runs of the model per sample, a mistake counted as {price:g} runs"
                )
        return sorted(candidates[slot] for slot in kept)

    def _weights(self, candidates: Sequence[int]) -> dict[str, torch.Tensor]:
        return {
            f"{k}.{name}": value.detach().cpu().contiguous()
            for k in candidates
            for name, value in self.pool.classifiers[k].state_dict().items()
        }

    def _read(self, path: Path, candidates: list[int], epochs: float) -> list[int]:
        stored = load_file(path)
        left = []
        for k in candidates:
            own = {name.removeprefix(f"{k}."): value for name, value in stored.items() if name.startswith(f"{k}.")}
            if own:
                self.pool.classifiers[k].load_state_dict(own)
                self.trials[k].epochs += epochs
                left.append(k)
            else:
                self.trials[k].dropped = f"its loss was not finite in {path.stem.replace('-', ' ')}"
        return left


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def remove_run(folder: Path) -> None:
    """Remove checkpoints and cached features of a run whose product is written."""
    if folder.is_dir():
        for file in folder.iterdir():
            file.unlink(missing_ok=True)
        folder.rmdir()
