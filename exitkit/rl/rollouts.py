"""Rollouts: what the exits learn from, collected by the exits themselves with what they have learned so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.checks import Bounds, Count, Index, check_fields
from exitkit.common.errors import ArgumentError
from exitkit.common.hashes import digest
from exitkit.rl.environments import Bools, EnvironmentFailedError, Games
from exitkit.surgery.capturing import evaluation_mode
from exitkit.training.feature_cache.heads_alone import HeadsAlone

Acting = Literal["exits", "exits+policy", "policy"]


@dataclass(frozen=True)
class Plan:
    """How states are collected, as :func:`exitkit.rl.clone` was told.

    Attributes:
        steps: in all, summed over the environments.
        rollout: steps in each environment between two times of learning.
        epochs: passes over a rollout.
        batch_size: states in one step of the optimiser.
        acting: whose action is taken.
        seed: of environments, of the draw of exits, and of the order of states.
    """

    steps: Count
    rollout: Annotated[int, Bounds(least=2)]  # of two steps at most one begins an episode anew
    epochs: Count
    batch_size: Count
    acting: Acting
    seed: Index

    def __post_init__(self) -> None:
        check_fields(self)

    def rounds(self, environments: int) -> int:
        """How many rollouts there are, at least one."""
        return max(1, round(self.steps / (self.rollout * environments)))


class Moment(NamedTuple):
    """One step of all environments: what the policy was given, and where it was really asked for an action."""

    inputs: tuple[Tensor, ...]
    counts: Bools


@dataclass
class Rollouts:
    """A loader for :class:`exitkit.Trainer` whose every pass collects one rollout, and yields it in several orders.

    After the last round a pass collects a tenth as many rollouts, at least one, and yields each once: fresh states, on which
    an ensemble is fitted.

    A checkpoint holds the actions taken so far, not the environments: :meth:`restore` takes them again, so that no file holds
    anything to unpickle. The result is the same to the bit where an environment's course follows from its seed and actions.

    Attributes:
        watch: told after every round how many there were; what it returns is for the record.
        view: the heads alone; batches are reduced features and the policy's logits, from the forward that chose the actions.
        round: how many rollouts were learned from.
        measured: of the last rollout: the mean return of the episodes that ended in it, and how often each exit's answer was
            the policy's, before learning from it.
        failure: what an environment raised in the middle of a rollout. What was collected until then is learned from first.
    """

    games: Games
    plan: Plan
    watch: Callable[[int], dict[str, float]] = lambda _: {}
    view: HeadsAlone = field(init=False)
    round: int = field(init=False, default=0)
    measured: dict[str, float] = field(init=False, default_factory=dict)
    failure: EnvironmentFailedError | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model = self.games.model
        self.view = HeadsAlone(self.model)
        self.rounds = self.plan.rounds(self.games.count)
        self._taken: list[NDArray[np.int64]] = []
        self._rollout: list[Moment] = []
        self.games.reset(self.plan.seed, 0)

    def __len__(self) -> int:
        return self.plan.epochs * -(-self.plan.rollout * self.games.count // self.plan.batch_size)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...]]]:
        """Batches of the heads' inputs, one tuple in each, as :func:`exitkit.common.batches.split_batch` takes them."""
        if self.round >= self.rounds:
            for _ in range(max(1, self.rounds // 10)):
                yield from self._batches(self._collected(), 1)
                self._rollout = []
            return
        yield from self._batches(self._collected(), self.plan.epochs)
        self._rollout = []
        self.round += 1
        self.measured |= self.watch(self.round)

    def state(self) -> dict[str, Any]:
        taken = np.array(self._taken, np.int32).reshape(-1, self.games.count)
        return {
            "plan": self._about(),
            "round": self.round,
            "actions": torch.from_numpy(taken),
            "rollout": [[*moment.inputs, torch.from_numpy(moment.counts)] for moment in self._rollout],
            "measured": dict(self.measured),
            "seen": digest(self.games.inputs),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from :meth:`state`.

        Raises:
            ArgumentError: it is another run's.
        """
        if state is None or state["plan"] != self._about():
            was = "another kind of run" if state is None else f"clone with {state['plan']}"
            raise ArgumentError(
                f"the checkpoint is of {was}, this run is clone with {self._about()}; continue with the same, use another "
                "output_dir, or start again by resume='never'"
            )
        self.round, self.measured = state["round"], state["measured"]
        self._rollout = [Moment(tuple(inputs), counts.numpy()) for *inputs, counts in state["rollout"]]
        self._taken = [actions.numpy().astype(np.int64) for actions in state["actions"]]
        self.games.reset(self.plan.seed, 0)
        for actions in self._taken:
            self.games.step(actions)
        if digest(self.games.inputs) != state["seen"]:
            warnings.warn(
                "the environment did not come to the same state by the same seeds and actions; the run goes on from this one, "
                "not exactly as it would have",
                stacklevel=2,
            )

    def _about(self) -> dict[str, Any]:
        return {**asdict(self.plan), "environments": self.games.count}

    def _collected(self) -> list[tuple[Tensor, ...]]:
        """The features of a rollout, step by step: of a new one, or of the one that a checkpoint brought.

        Raises:
            EnvironmentFailedError: the environment raised in the rollout before, or at the first step of this one.
        """
        if self._rollout:
            with self._looking():
                return [self._looked_at(moment)[0] for moment in self._rollout]
        if self.failure is not None:
            raise self.failure
        features: list[tuple[Tensor, ...]] = []
        totals: list[float] = []
        agreed: list[Bools] = []
        with self._looking():
            for _ in range(self.plan.rollout):
                moment = Moment(self.games.inputs, self.games.counts)
                parts, answers = self._looked_at(moment)
                actions = np.take_along_axis(answers, self._drawn(answers.shape)[None], axis=0)[0]
                try:
                    step = self.games.step(actions)
                except EnvironmentFailedError as error:
                    if not features:
                        raise
                    self.failure = error
                    break
                self._taken.append(actions)
                self._rollout.append(moment)
                features.append(parts)
                totals += [episode.total for episode in step.finished]
                agreed.append((answers == answers[-1])[:, moment.counts])
        shares = np.concatenate(agreed, axis=1).mean(1)
        self.measured = {f"agreement/exit{m}": float(share) for m, share in enumerate(shares[:-1])}
        if totals:
            self.measured["return"] = float(np.mean(totals))
        return features

    @contextmanager
    def _looking(self) -> Iterator[None]:
        with evaluation_mode(self.model), torch.no_grad():
            yield

    def _looked_at(self, moment: Moment) -> tuple[tuple[Tensor, ...], NDArray[np.int64]]:
        """What the heads read where an action counts, and the action (M + 1, n) that each exit would take everywhere."""
        device = self.model.example.tensors[0].device  # the trainer moves the model there
        parts, heads = self.view.read(self.model, tuple(tensor.to(device) for tensor in moment.inputs))
        rows = torch.from_numpy(np.flatnonzero(moment.counts)).to(heads[-1].device)
        return tuple(part[rows] for part in parts), torch.stack([logits.argmax(1) for logits in heads]).cpu().numpy()

    def _drawn(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """(n,): the exit whose action each environment is given, drawn for each step by itself."""
        exits, count = shape
        generator = np.random.default_rng((self.plan.seed, 0, len(self._taken)))
        if self.plan.acting == "policy":
            return np.full(count, exits - 1)
        return generator.integers(exits - (self.plan.acting == "exits"), size=count)

    def _batches(self, features: Sequence[tuple[Tensor, ...]], passes: int) -> Iterator[tuple[tuple[Tensor, ...]]]:
        parts = [torch.cat(column) for column in zip(*features, strict=True)]
        for number in range(passes):
            order = np.random.default_rng((self.plan.seed, 1, self.round, number)).permutation(len(parts[-1]))
            for rows in torch.from_numpy(order).to(parts[-1].device).split(self.plan.batch_size):
                yield (tuple(part[rows] for part in parts),)
