"""Training: a backbone that does not change, heads that learn, runs that continue, and what is refused."""

from __future__ import annotations

import copy
import csv
import functools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import exitkit
from exitkit import ArgumentError, DivergedError, ExitkitError, FileError, MultiExitModel, Trainer
from exitkit.training import EnsembleFit, fit_ensemble
from exitkit.training.checkpoint import load_checkpoint
from exitkit.training.early_stopping import EarlyStopping
from exitkit.training.ensemble import fit_ensemble_on, penalty
from exitkit.training.same_run import data_of
from tests.toy import TinyNet

Loaders = Callable[..., DataLoader[tuple[Tensor, ...]]]
State = dict[str, Tensor]
EXAMPLE = torch.zeros(2, 1, 8, 8)
CHECKPOINT = "checkpoint.pt"


def trainer(ee: MultiExitModel, **options: Any) -> Trainer:
    return Trainer(ee, **({"epochs": 1, "lr": 1e-2, "show_progress": False} | options))


def state_of(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def identical(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def noisy(samples: int = 200, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Images of which a third has a wrong label, so that the best ensemble is not an infinitely sure one."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.arange(samples) % 3
    images = torch.randn(samples, 1, 8, 8, generator=generator) + seen.view(-1, 1, 1, 1) - 1
    wrong = torch.rand(samples, generator=generator) < 1 / 3
    labels = torch.where(wrong, torch.randint(0, 3, (samples,), generator=generator), seen)
    return DataLoader(TensorDataset(images, labels), batch_size=50)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state per process; forget it before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# the backbone --------------------------------------------------------------------------------------------------------


def test_the_backbone_is_bit_identical_after_fit(tiny_net: TinyNet, loader: Loaders) -> None:
    """Weights, BatchNorm statistics, training flags and requires_grad, from a mixed start."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="ztw")
    tiny_net.train()
    tiny_net.blocks[1].eval()
    tiny_net.stem.weight.requires_grad_(False)
    before = state_of(tiny_net)
    flags = [part.training for part in tiny_net.modules()]
    gradients = [parameter.requires_grad for parameter in tiny_net.parameters()]
    trainer(ee, epochs=2).fit(loader(), loader())
    assert identical(state_of(ee.backbone), before)
    assert [part.training for part in tiny_net.modules()] == flags
    assert [parameter.requires_grad for parameter in tiny_net.parameters()] == gradients
    assert all(parameter.grad is None for parameter in tiny_net.parameters())


def test_the_backbone_is_in_eval_mode_while_exits_are_trained(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    seen: set[bool] = set()
    tiny_ee.train()
    handle = tiny_ee.backbone.dropout.register_forward_hook(lambda module, *_: seen.add(module.training))
    trainer(tiny_ee).fit(loader())
    handle.remove()
    assert seen == {False}


def test_flags_are_restored_after_an_error(tiny_ee: MultiExitModel) -> None:
    tiny_ee.train()
    with pytest.raises(ExitkitError):
        trainer(tiny_ee).fit([])
    assert all(part.training for part in tiny_ee.backbone.modules())
    assert all(parameter.requires_grad for parameter in tiny_ee.backbone.parameters())


# learning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sdn", "ztw"])
def test_loss_falls_and_exits_beat_chance(tiny_net: TinyNet, loader: Loaders, method: str) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method=method)
    history = trainer(ee, epochs=3).fit(loader(shuffle=True))
    assert all(last < first for first, last in zip(history[0].loss, history[-1].loss, strict=True))
    assert (exitkit.collect(ee, loader(seed=1)).accuracy()[:-1] > 0.6).all()


def test_history_records_every_epoch(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    history = trainer(tiny_ee, epochs=2).fit(loader(), loader(seed=1))
    assert [record.epoch for record in history] == [0, 1]
    assert all(len(record.loss) == 3 and len(record.accuracy or ()) == 4 for record in history)


def test_without_validation_there_is_no_accuracy(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    assert trainer(tiny_ee).fit(loader())[0].accuracy is None


def test_recorded_accuracy_is_that_of_the_heads(tiny_net: TinyNet, loader: Loaders) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")
    history = trainer(ee).fit(loader(), loader(seed=1))
    assert history[0].accuracy == pytest.approx(exitkit.collect(ee, loader(seed=1)).accuracy().tolist())


def test_recorded_loss_is_the_mean_cross_entropy(tiny_net: TinyNet, loader: Loaders) -> None:
    """At a learning rate near 0 the heads stay as they are."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn", head="conv")  # standardises nothing
    outputs = exitkit.collect(ee, loader(32))
    expected = [F.nll_loss(outputs.log_probs[:, m], outputs.labels).item() for m in range(3)]
    assert trainer(ee, lr=1e-12).fit(loader(32, batch=16))[0].loss == pytest.approx(expected, rel=1e-4)


def test_heads_trained_in_parallel_equal_heads_trained_alone(tiny_net: TinyNet, loader: Loaders) -> None:
    both = exitkit.attach(tiny_net, EXAMPLE, at=["blocks.0", "blocks.2"], method="sdn")
    for index, name in enumerate(["blocks.0", "blocks.2"]):
        alone = exitkit.attach(tiny_net, EXAMPLE, at=[name], method="sdn")
        alone.classifiers[0].load_state_dict(both.classifiers[index].state_dict())
        together = copy.deepcopy(both)
        for ee in (together, alone):
            trainer(ee, epochs=2).fit(loader(shuffle=True))
        assert identical(state_of(together.classifiers[index]), state_of(alone.classifiers[0]))


def test_training_is_reproducible(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    one, other = copy.deepcopy(tiny_ee), copy.deepcopy(tiny_ee)
    for ee, seed in ((one, 1), (other, 2)):
        torch.manual_seed(seed)
        trainer(ee, epochs=2).fit(loader(shuffle=True))
    assert identical(state_of(one), state_of(other))


def test_the_seed_decides_the_order(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    one, other = copy.deepcopy(tiny_ee), copy.deepcopy(tiny_ee)
    for ee, seed in ((one, 1), (other, 2)):
        trainer(ee, seed=seed).fit(loader(shuffle=True))
    assert not identical(state_of(one), state_of(other))


def test_milestones_divide_the_rate_by_ten(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    """With a rate that falls to nothing after epoch 1, epoch 2 changes next to nothing."""
    one, two = copy.deepcopy(tiny_ee), copy.deepcopy(tiny_ee)
    trainer(one, epochs=1, milestones=[]).fit(loader())
    trainer(two, epochs=9, milestones=[1, 1, 1, 1, 1, 1, 1, 1]).fit(loader())
    moved = [
        (a - b).abs().max() for a, b in zip(one.classifiers.parameters(), two.classifiers.parameters(), strict=True)
    ]
    assert max(moved) < 1e-6


def test_dict_batches_train_as_tuples_do(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    other = copy.deepcopy(tiny_ee)
    trainer(tiny_ee).fit(loader())
    trainer(other).fit([{"x": images, "labels": labels} for images, labels in loader()])
    assert identical(state_of(tiny_ee), state_of(other))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images that come one after another, nobody knows how many."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((torch.randn(1, 8, 8), torch.tensor(i % 3)) for i in range(24))


def test_a_loader_of_unknown_length_trains(tiny_ee: MultiExitModel) -> None:
    assert len(trainer(tiny_ee, epochs=2).fit(DataLoader(Stream(), batch_size=8))) == 2


def test_a_second_fit_trains_again(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    fitting = trainer(tiny_ee)
    fitting.fit(loader())
    before = state_of(tiny_ee.classifiers)
    fitting.fit(loader(seed=1))
    assert not identical(state_of(tiny_ee.classifiers), before)


# the ensemble --------------------------------------------------------------------------------------------------------


def entropies(ee: MultiExitModel, batches: DataLoader[tuple[Tensor, ...]]) -> list[Tensor]:
    """Cross-entropy of each combiner's answer, with gradient."""
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    logits = ee.eval()(images).logits
    return [F.cross_entropy(logits[m], labels) for m in range(len(ee.combiners))]


@pytest.fixture(params=["geometric", "additive"])
def fitted(request: pytest.FixtureRequest, tiny_net: TinyNet) -> tuple[list[float], list[float], MultiExitModel]:
    """Cross-entropies before the fit, those that it returned, and the model."""
    config = exitkit.ZTW(ensemble=request.param, ensemble_final=True)
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method=config)
    trainer(ee, epochs=2).fit(noisy())
    for combiner in ee.combiners:
        combiner.log_weights.data.fill_(0.5)
        combiner.log_prior.data.copy_(torch.tensor([0.5, 0.0, -0.5]))
    before = [value.item() for value in entropies(ee, noisy())]
    return before, fit_ensemble(ee, noisy()), ee


def test_the_fit_lowers_every_cross_entropy(fitted: tuple[list[float], list[float], MultiExitModel]) -> None:
    before, after, ee = fitted
    assert all(new < old - 1e-3 for new, old in zip(after, before, strict=True))
    assert [value.item() for value in entropies(ee, noisy())] == pytest.approx(after, abs=1e-4)


def test_the_fit_ends_where_the_gradient_is_zero(fitted: tuple[list[float], list[float], MultiExitModel]) -> None:
    ee = fitted[2]
    for combiner, loss in zip(ee.combiners, entropies(ee, noisy()), strict=True):
        gradients = torch.autograd.grad(loss + penalty(combiner, 0.01), list(combiner.parameters()))
        assert max(gradient.abs().max().item() for gradient in gradients) < 2e-3


def test_the_fit_leaves_the_heads_alone(tiny_ee: MultiExitModel) -> None:
    before = state_of(tiny_ee.classifiers)
    fit_ensemble(tiny_ee, noisy())
    assert identical(state_of(tiny_ee.classifiers), before)
    assert all(parameter.grad is None for parameter in tiny_ee.classifiers.parameters())


def test_fit_trains_heads_and_ensemble(tiny_ee: MultiExitModel) -> None:
    before = state_of(tiny_ee)
    trainer(tiny_ee).fit(noisy())
    added = [name for name in before if not name.startswith("backbone.")]
    assert [name for name in added if torch.equal(tiny_ee.state_dict()[name], before[name])] == []


def test_the_fit_keeps_confidences_apart_on_separable_data(tiny_net: TinyNet, loader: Loaders) -> None:
    """Heads that are always right on the training set must not drive every confidence to exactly 1."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, head="conv")
    trainer(ee, epochs=4).fit(loader())
    assert (exitkit.collect(ee, loader(seed=1)).scores()[:, :-1] == 1).double().mean() < 0.5


@pytest.mark.parametrize("seed", [116, 248, 257, 301])
def test_the_fit_survives_answers_that_overflow_float32(tiny_ee: MultiExitModel, seed: int) -> None:
    """Heads that know next to nothing. In float32 the line search came to NaN (and to a raw RuntimeError for 301)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 0.02 * torch.randn(60, 4, 3, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)
    start = state_of(tiny_ee.combiners)
    heads = SimpleNamespace(run_heads=lambda batch: ((), batch[..., 0].unbind(1)))
    for _ in range(2):  # the second one starts where the first ended
        reached = fit_ensemble_on(tiny_ee, heads, [(logits[..., None], labels)], lambda part: part, EnsembleFit())  # type: ignore[arg-type]
        assert all(parameter.isfinite().all() for parameter in tiny_ee.combiners.parameters())
    for m, loss in enumerate(reached):
        mean = logits[:, : m + 1].log_softmax(-1).mean(1)  # the combiner's answer before the fit, up to a constant
        assert loss < F.cross_entropy(mean, labels)
    assert not identical(state_of(tiny_ee.combiners), start)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 200.0])
def test_a_combiner_that_is_not_finite_is_fitted_from_a_new_one(tiny_ee: MultiExitModel, value: float) -> None:
    trainer(tiny_ee).fit(noisy())
    other = copy.deepcopy(tiny_ee)
    for combiner, new in zip(tiny_ee.combiners, other.combiners, strict=True):
        combiner.log_weights.data.fill_(value)
        new.log_weights.data.fill_(-math.log(len(new.log_weights)))
        new.log_prior.data.zero_()
        combiner.log_prior.data.zero_()
    assert fit_ensemble(tiny_ee, noisy()) == fit_ensemble(other, noisy())
    assert identical(state_of(tiny_ee.combiners), state_of(other.combiners))


def test_float16_is_named_where_training_in_it_ends_in_numbers_that_are_none(
    tiny_ee: MultiExitModel, loader: Loaders
) -> None:
    """Adam's 1e-8 is 0 in float16; the remedy was a lower rate, which changes nothing."""
    batches = [(images.half(), labels) for images, labels in loader(64)]
    with pytest.raises(DivergedError, match=r"model\.float\(\)"):
        Trainer(tiny_ee.half(), epochs=3, lr=1e-3, show_progress=False).fit(batches)


def test_training_where_the_caller_turned_gradients_off(tiny_net: TinyNet) -> None:
    trained = []
    for off in (False, True):
        torch.manual_seed(0)
        ee = exitkit.attach(tiny_net, EXAMPLE, every=2)
        with torch.set_grad_enabled(not off):
            trainer(ee).fit(noisy())
            fit_ensemble(ee, noisy())
        assert torch.is_grad_enabled()
        trained.append(state_of(ee))
    assert identical(*trained)


def test_training_in_inference_mode_is_refused(tiny_ee: MultiExitModel) -> None:
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"torch\.inference_mode\(\).*call it outside"):
        trainer(tiny_ee).fit(noisy())


def test_answers_that_are_not_finite_are_refused_and_leave_the_combiners_alone(tiny_ee: MultiExitModel) -> None:
    tiny_ee.classifiers[1].linear.weight.data.fill_(float("nan"))
    before = state_of(tiny_ee.combiners[1])
    with pytest.raises(DivergedError, match="answers of the exits up to exit 1 are not finite"):
        fit_ensemble(tiny_ee, noisy())
    assert identical(state_of(tiny_ee.combiners[1]), before)


def test_the_ensemble_is_fitted_on_held_out_samples_where_there_are_some(
    tiny_ee: MultiExitModel, loader: Loaders
) -> None:
    start = state_of(tiny_ee.combiners)
    trainer(tiny_ee).fit(loader(), noisy(seed=1))
    for batches, same in ((noisy(seed=1), True), (loader(), False)):
        other = copy.deepcopy(tiny_ee)
        other.combiners.load_state_dict(start)
        fit_ensemble(other, batches)
        assert identical(state_of(other.combiners), state_of(tiny_ee.combiners)) == same


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_batches_come_to_the_same_ensemble_as_all_samples_at_once(tiny_ee: MultiExitModel, optimizer: Any) -> None:
    trainer(tiny_ee, epochs=2).fit(noisy())
    other = copy.deepcopy(tiny_ee)
    whole = fit_ensemble(tiny_ee, noisy(), EnsembleFit(penalty=0.1))
    rate = {"sgd": 0.3, "adam": 0.02}[optimizer]
    parts = fit_ensemble(other, noisy(), EnsembleFit(optimizer=optimizer, epochs=40, penalty=0.1, lr=rate))
    assert parts == pytest.approx(whole, abs=2e-3)
    for one, two in zip(tiny_ee.combiners, other.combiners, strict=True):
        assert torch.allclose(one.log_weights, two.log_weights, atol=0.1)


def test_without_a_penalty_the_fit_follows_the_cross_entropy_alone(tiny_ee: MultiExitModel) -> None:
    trainer(tiny_ee, epochs=2).fit(noisy())
    held, free = (fit_ensemble(copy.deepcopy(tiny_ee), noisy(), EnsembleFit(penalty=value)) for value in (1.0, 0))
    assert all(two <= one + 1e-6 for one, two in zip(held, free, strict=True))
    assert sum(free) < sum(held) - 1e-4


def test_all_samples_count_however_many_there_are(tiny_ee: MultiExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tiny_ee).fit(noisy())
    other = copy.deepcopy(tiny_ee)
    images, labels = (torch.cat(column) for column in zip(*noisy(), strict=True))
    labels[::3] = -1
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    in_memory = fit_ensemble(tiny_ee, batches)
    monkeypatch.setattr("exitkit.training.ensemble._MEMORY_FLOATS", 100)
    assert fit_ensemble(other, batches) == pytest.approx(in_memory, abs=1e-6)
    assert identical(state_of(other.combiners), state_of(tiny_ee.combiners))


def test_where_the_ensemble_is_fitted_can_be_said(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    start = state_of(tiny_ee.combiners)
    trainer(tiny_ee, ensemble_on="train", ensemble_fit=EnsembleFit(penalty=0.5)).fit(loader(), noisy(seed=1))
    other = copy.deepcopy(tiny_ee)
    other.combiners.load_state_dict(start)
    fit_ensemble(other, loader(), EnsembleFit(penalty=0.5))
    assert identical(state_of(other.combiners), state_of(tiny_ee.combiners))
    with pytest.raises(ArgumentError, match=r"ensemble_on='validation'.*no val_loader"):
        trainer(tiny_ee, ensemble_on="validation").fit(loader())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "newton"}, "optimizer='newton' is unknown"),
        ({"epochs": 0}, "epochs=0"),
        ({"penalty": -1}, "penalty=-1"),
        ({"lr": 0.1}, "lr=0.1 is for optimizer='sgd' or 'adam'"),
        ({"batch_size": 4}, "batch_size=4 is for"),
    ],
)
def test_fits_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        EnsembleFit(**given)


# early stopping ------------------------------------------------------------------------------------------------------


def test_it_stops_when_no_exit_improved_for_long_enough() -> None:
    stopping = EarlyStopping(2)
    stops = []
    for accuracy in ([0.5, 0.5], [0.6, 0.5], [0.6, 0.6], [0.6, 0.6], [0.5, 0.5]):
        stopping.update(accuracy)
        stops.append(stopping.stop)
    assert stops == [False, False, False, False, True]


def test_one_exit_that_improves_keeps_all_in_training() -> None:
    stopping = EarlyStopping(1)
    for step in range(5):
        stopping.update([0.5, 0.1 * step])
    assert not stopping.stop


def test_update_says_whether_any_exit_improved() -> None:
    stopping = EarlyStopping(3)
    assert [stopping.update(accuracy) for accuracy in ([0.5, 0.5], [0.4, 0.6], [0.5, 0.6])] == [True, True, False]


def test_equal_is_not_better() -> None:
    stopping = EarlyStopping(1)
    stopping.update([0.5])
    stopping.update([0.5])
    assert stopping.stop


def test_without_patience_it_never_stops() -> None:
    stopping = EarlyStopping(None)
    for _ in range(50):
        stopping.update([0.0])
    assert not stopping.stop


def test_stopping_continues_from_its_state() -> None:
    one, other = EarlyStopping(2), EarlyStopping(2)
    one.update([0.5])
    one.update([0.4])
    other.restore(one.state())
    other.update([0.5])
    assert other.stop


class Worsening:
    """A validation set whose labels are right in the first pass only."""

    def __init__(self, batches: DataLoader[tuple[Tensor, ...]]) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for images, labels in self.batches:
            yield images, labels if self.passes == 1 else (labels + 1) % 3


def test_the_best_state_is_restored(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    once = copy.deepcopy(tiny_ee)
    trainer(once, epochs=1, milestones=[]).fit(loader())
    history = trainer(tiny_ee, epochs=9, milestones=[], patience=2).fit(loader(), Worsening(loader(seed=1)))
    assert len(history) == 3
    assert identical(state_of(tiny_ee.classifiers), state_of(once.classifiers))


def test_a_stopped_run_does_not_train_on(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    other = copy.deepcopy(tiny_ee)
    options = {"epochs": 9, "patience": 2, "output_dir": tmp_path}
    trainer(tiny_ee, **options).fit(loader(), Worsening(loader(seed=1)))
    assert len(trainer(other, **options).fit(loader(), loader(seed=1))) == 3
    assert identical(state_of(other.classifiers), state_of(tiny_ee.classifiers))


# checkpoints ---------------------------------------------------------------------------------------------------------


class Stuck:
    """Hangs in the middle of the third pass, to be killed there."""

    def __init__(self, batches: DataLoader[tuple[Tensor, ...]]) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        self.passes += 1
        for index, batch in enumerate(self.batches):
            if self.passes == 3 and index == 2:
                time.sleep(600)
            yield batch


def killable(directory: str, stuck: bool) -> MultiExitModel:
    """One training run, the same in every process."""
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet(), EXAMPLE, every=1, method="ztw")
    batches = DataLoader(noisy(120).dataset, batch_size=20, shuffle=True)
    trainer(ee, epochs=5, output_dir=directory).fit(Stuck(batches) if stuck else batches, noisy(30, seed=1))
    return ee


def epochs_done(directory: Path) -> int:
    path = directory / CHECKPOINT
    return len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0


def test_a_killed_run_continues_to_bit_identical_weights(tmp_path: Path) -> None:
    """SIGKILL in the middle of epoch 3. Whenever it is looked at meanwhile, the checkpoint is a whole one."""
    code = f"from tests.test_training import killable; killable({str(tmp_path / 'killed')!r}, stuck=True)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 120
        while epochs_done(tmp_path / "killed") < 2:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.5)  # so that some steps of epoch 3 are lost
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    assert epochs_done(tmp_path / "killed") == 2
    continued = killable(str(tmp_path / "killed"), stuck=False)
    assert epochs_done(tmp_path / "killed") == 5
    assert identical(state_of(continued), state_of(killable(str(tmp_path / "whole"), stuck=False)))


def test_everything_comes_from_the_checkpoint(tmp_path: Path, tiny_net: TinyNet, loader: Loaders) -> None:
    """A finished run, taken up by heads that start elsewhere, ends as it ended."""
    one, other = (exitkit.attach(tiny_net, EXAMPLE, every=1, method="ztw") for _ in range(2))
    histories = [trainer(ee, epochs=2, output_dir=tmp_path).fit(loader()) for ee in (one, other)]
    assert histories[0] == histories[1]
    assert identical(state_of(one), state_of(other))


class Interrupted:
    """Raises in the middle of the given pass."""

    def __init__(self, batches: DataLoader[tuple[Tensor, ...]], at: int) -> None:
        self.batches = batches
        self.left = at

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        self.left -= 1
        for index, batch in enumerate(self.batches):
            if self.left == 0 and index == 1:
                raise KeyboardInterrupt
            yield batch


def own_generator(kind: str) -> DataLoader[tuple[Tensor, ...]]:
    """A loader that shuffles by a generator of its own, as it is when a process starts."""
    data, generator = noisy(90).dataset, torch.Generator().manual_seed(5)
    if kind == "loader":
        return DataLoader(data, batch_size=30, shuffle=True, generator=generator)
    return DataLoader(data, batch_size=30, sampler=RandomSampler(data, generator=generator))


@pytest.mark.parametrize("kind", ["loader", "sampler"])
def test_a_loader_with_its_own_generator_continues_to_bit_identical_weights(
    tmp_path: Path, tiny_ee: MultiExitModel, kind: str
) -> None:
    whole = copy.deepcopy(tiny_ee)
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(own_generator(kind), Interrupted(noisy(), at=2))
    trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(own_generator(kind), noisy())
    trainer(whole, epochs=3).fit(own_generator(kind), noisy())
    assert identical(state_of(tiny_ee.classifiers), state_of(whole.classifiers))


def test_an_interrupted_run_may_continue_without_validation(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(Interrupted(loader(), at=2), loader())
    history = trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(loader())
    assert [record.accuracy is None for record in history] == [False, True, True]


def test_resume_never_starts_again(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    fresh = copy.deepcopy(tiny_ee)
    trainer(tiny_ee, output_dir=tmp_path).fit(loader())
    trainer(fresh, output_dir=tmp_path, resume="never").fit(loader(seed=1))
    assert not identical(state_of(fresh.classifiers), state_of(tiny_ee.classifiers))


def test_resume_never_ignores_a_damaged_checkpoint(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    trainer(tiny_ee, output_dir=tmp_path, resume="never").fit(loader())
    assert epochs_done(tmp_path) == 1


@pytest.mark.parametrize("kept", [0, 10, 2000, -1])
def test_a_truncated_checkpoint_is_refused(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, kept: int
) -> None:
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ExitkitError, match=r"checkpoint\.pt' is damaged or no checkpoint.*delete it"):
        trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(3), [1, 2]])
def test_a_foreign_checkpoint_is_refused(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, content: object
) -> None:
    torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(ExitkitError, match=r"was not written by exitkit\.Trainer"):
        trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / CHECKPOINT)
    with pytest.raises(ExitkitError, match="damaged or no checkpoint"):
        trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, r"lr=0\.01, this run has 0\.5"),
        ({"epochs": 2}, "epochs=1, this run has 2"),
        ({"seed": 7}, "seed=0, this run has 7"),
        ({"weight_decay": 0.1}, r"weight_decay=0\.0, this run has 0\.1"),
        ({"milestones": [1]}, r"milestones=None, this run has \[1\]"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, options: dict[str, Any], message: str
) -> None:
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    with pytest.raises(ExitkitError, match=message):
        trainer(tiny_ee, output_dir=tmp_path, **options).fit(loader(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 2, "method": "ztw"}, "exits="),
        ({"every": 1, "method": "sdn"}, "method='ztw', this run has 'sdn'"),
        ({"every": 1, "method": "ztw", "head": "1L"}, "belongs to other heads"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, options: dict[str, Any], message: str
) -> None:
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    other = exitkit.attach(tiny_ee.backbone, EXAMPLE, **options)
    with pytest.raises(ExitkitError, match=message):
        trainer(other, output_dir=tmp_path).fit(loader(16))


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    with torch.no_grad():
        next(tiny_ee.backbone.parameters()).add_(1)
    with pytest.raises(ExitkitError, match="backbone="):
        trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))


def alike(one: Any, other: Any) -> bool:
    """Whether two checkpoints' contents are the same, to the bit and to the type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    return repr(one) == repr(other)


def test_a_checkpoint_with_a_changed_bit_is_refused_or_the_same(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders
) -> None:
    """200 bits all over the file, one at a time. One in seven or so used to load with other numbers."""
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    whole, written = load_checkpoint(tmp_path, {}), (tmp_path / CHECKPOINT).read_bytes()
    drawn, refused = random.Random(0), 0
    for _ in range(200):
        changed = bytearray(written)
        changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
        (tmp_path / CHECKPOINT).write_bytes(changed)
        try:
            assert alike(load_checkpoint(tmp_path, {}), whole)
        except FileError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "change",
    [
        {"phase": 99},
        {"phase": "0"},
        {"temperature": "warm"},
        {"history": [{"epoch": 0}]},
        {"optimizer": None},
        {"settings": []},
        {"tally": {}},
    ],
    ids=repr,
)
def test_a_checkpoint_of_wrong_content_is_refused(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, change: dict[str, Any]
) -> None:
    """A phase of 99 used to skip the training without a word; the others ended in errors of Python's own."""
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    for content in (state | change, {name: value for name, value in state.items() if name not in change}):
        torch.save(content, tmp_path / CHECKPOINT)
        with pytest.raises(FileError, match=r"checkpoint\.pt' is damaged: .*delete it to start again"):
            trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))


def test_a_checkpoint_of_an_older_format_is_refused_by_its_number(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders
) -> None:
    trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["sha256"]
    torch.save(state | {"format": "exitkit-checkpoint-3"}, tmp_path / CHECKPOINT)
    with pytest.raises(
        FileError, match=r"format 'exitkit-checkpoint-3'.*reads 'exitkit-checkpoint-5'.*resume='never'"
    ):
        trainer(tiny_ee, output_dir=tmp_path).fit(loader(16))


def test_two_seeds_share_no_order(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    """Seed 1 must not repeat seed 0's orders one epoch later."""
    orders = []
    for seed in (0, 1):
        batches = Recording(loader(16, shuffle=True))
        trainer(exitkit.attach(tiny_ee.backbone, EXAMPLE), epochs=2, seed=seed).fit(batches)
        orders.append(batches.seen[:2])
    assert not any(torch.equal(first, second) for first in orders[0] for second in orders[1])


def refitted(ee: MultiExitModel, folder: Path, first: Sequence[Any], then: Sequence[Any], **options: Any) -> Any:
    """A run on ``first`` (training and validation batches), then another in the same folder on ``then``."""
    trainer(ee, output_dir=folder).fit(*first)
    return trainer(ee, output_dir=folder, **options).fit(*then)


def other_labels(batches: DataLoader[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
    images, labels = batches.dataset.tensors  # type: ignore[attr-defined]
    return DataLoader(TensorDataset(images, (labels + 1) % 3), batch_size=batches.batch_size)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda make: [make(48, seed=1), make(32)], "train_loader inputs='sha256 .*', this run has 'sha256"),
        (lambda make: [other_labels(make(48)), make(32)], "train_loader labels="),
        (lambda make: [make(48, 8), make(32)], "train_loader batch_size=16, this run has 8"),
        (lambda make: [make(96), make(32)], "train_loader samples=48, this run has 96"),
        (
            lambda make: [DataLoader(make(48).dataset, 16, sampler=range(32)), make(32)],
            "train_loader batches=3, this run has 2",
        ),
        (lambda make: [[*make(48)][:2], make(32)], "train_loader batches=3, this run has 2"),
        (lambda make: [make(48), make(32, seed=1)], "val_loader inputs="),
        (lambda make: [make(48), make(32, 8)], "val_loader batch_size=16, this run has 8"),
    ],
    ids=["inputs", "labels", "batch size", "samples", "batches", "list", "validation", "validation's batch size"],
)
def test_a_run_is_not_continued_on_other_data(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, then: Any, message: str
) -> None:
    """It was, silently: the first run's weights and history came back. ``resume="never"`` starts again."""
    first = (loader(48), loader(32))
    with pytest.raises(ArgumentError, match=f"{message}.*resume='never'"):
        refitted(tiny_ee, tmp_path, first, then(loader))
    weights = state_of(tiny_ee.classifiers)
    trainer(tiny_ee, output_dir=tmp_path, resume="never").fit(*then(loader))
    assert not identical(state_of(tiny_ee.classifiers), weights)


def test_another_list_of_batches_is_noticed(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    with pytest.raises(ArgumentError, match="train_loader inputs="):
        refitted(tiny_ee, tmp_path, [list(loader(48))], [list(loader(48, seed=1))])


class Drawn(Dataset[Any]):
    """Images with noise: by torch's generator, which the trainer seeds, or by a generator of the data set's own."""

    def __init__(self, own: bool) -> None:
        self.generator = torch.Generator() if own else None

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: int) -> Any:
        return number % 3 + torch.randn(1, 8, 8, generator=self.generator), number % 3


@pytest.mark.parametrize("own", [False, True])
def test_augmented_data_are_the_same_data(tmp_path: Path, tiny_ee: MultiExitModel, own: bool) -> None:
    data = Drawn(own)  # further along its own generator at the second fit
    histories = [
        trainer(tiny_ee, output_dir=tmp_path).fit(DataLoader(data, 16, shuffle=True), DataLoader(data, 16))
        for _ in range(2)
    ]
    assert histories[0] == histories[1]


def test_looking_at_the_data_leaves_every_generator_where_it_stands(loader: Loaders) -> None:
    batches = DataLoader(Drawn(own=False), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = torch.rand(3), np.random.rand(3), [random.random() for _ in range(3)]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    seen = data_of(batches, "train_loader")
    assert seen["train_loader samples"] == 48
    assert seen["train_loader inputs"] is not None
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert [random.random() for _ in range(3)] == expected[2]
    assert batches.generator is not None
    assert torch.equal(batches.generator.get_state(), torch.Generator().manual_seed(3).get_state())


class Recording:
    """A loader that keeps the labels of each pass, in the order they came."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.seen: list[torch.Tensor] = []

    def __iter__(self) -> Any:
        self.seen.append(torch.empty(0))
        for inputs, labels in self.loader:
            self.seen[-1] = torch.cat([self.seen[-1], labels])
            yield inputs, labels


def test_a_bfloat16_backbone_trains(tiny_net: TinyNet, loader: Loaders) -> None:
    ee = exitkit.attach(tiny_net.bfloat16(), EXAMPLE.bfloat16())
    batches = [(inputs.bfloat16(), labels) for inputs, labels in loader(48)]
    history = trainer(ee, epochs=1).fit(batches)
    assert all(loss < float("inf") for loss in history[-1].loss)


def test_a_checkpoint_is_never_half_written(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the second epoch's checkpoint is written: the first one's is still there, and works."""
    whole = copy.deepcopy(tiny_ee)
    second_write_fails(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(loader(shuffle=True))
    assert epochs_done(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "metrics.csv"]
    trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(loader(shuffle=True))
    trainer(whole, epochs=3).fit(loader(shuffle=True))
    assert identical(state_of(tiny_ee), state_of(whole))


def test_what_a_killed_run_left_half_written_is_removed(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders
) -> None:
    for name in (".checkpoint-0123456789abcdef.pt", ".metrics-0123456789abcdef.csv"):
        (tmp_path / name).write_bytes(b"half")
    trainer(tiny_ee, epochs=1, output_dir=tmp_path).fit(loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "metrics.csv"]


def second_write_fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    save, calls = torch.save, []

    def failing(content: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise error
        save(content, path)

    monkeypatch.setattr(torch, "save", failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    second_write_fails(monkeypatch, error)
    with pytest.warns(UserWarning, match="nothing was written to .*the run goes on"):
        history = trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(loader())
    assert len(history) == epochs_done(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "metrics.csv"]


def test_nothing_is_written_by_default(
    tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(tiny_ee).fit(loader(16))
    assert list(tmp_path.iterdir()) == []


# logs ----------------------------------------------------------------------------------------------------------------


def test_the_csv_log_is_the_history(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    history = trainer(tiny_ee, epochs=2, output_dir=tmp_path).fit(loader(), loader(seed=1))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    for row, record in zip(rows, history, strict=True):
        assert tuple(float(row[f"loss/exit{m}"]) for m in range(3)) == record.loss
        assert tuple(float(row[f"accuracy/exit{m}"]) for m in range(4)) == record.accuracy


def test_a_continued_run_continues_the_csv_log(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(Interrupted(loader(), at=3))
    trainer(tiny_ee, epochs=3, output_dir=tmp_path).fit(loader())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_the_tensorboard_log_holds_every_epoch(tmp_path: Path, tiny_ee: MultiExitModel, loader: Loaders) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trainer(tiny_ee, epochs=3, output_dir=tmp_path, log="tensorboard").fit(loader(), loader(seed=1))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for m in range(3):
        scalars = [(event.step, event.value) for event in events.Scalars(f"loss/exit{m}")]
        assert scalars == [(record.epoch, pytest.approx(record.loss[m])) for record in history]
    assert [event.step for event in events.Scalars("accuracy/exit3")] == [0, 1, 2]
    assert not (tmp_path / "metrics.csv").exists()


# mixed precision -----------------------------------------------------------------------------------------------------


def head_dtypes(ee: MultiExitModel, batches: DataLoader[tuple[Tensor, ...]], **options: Any) -> set[torch.dtype]:
    seen: set[torch.dtype] = set()
    handle = ee.classifiers[0].linear.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer(ee, **options).fit(batches)
    handle.remove()
    return seen


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_trains_on_cpu(tiny_net: TinyNet, loader: Loaders) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")
    assert head_dtypes(ee, loader(), epochs=3, mixed_precision="bf16") == {torch.bfloat16}
    assert {parameter.dtype for parameter in ee.parameters()} == {torch.float32}
    assert (exitkit.collect(ee, loader(seed=1)).accuracy()[:-1] > 0.6).all()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("order", [("no", "bf16"), ("bf16", "no")])
def test_each_trainer_has_its_own_precision(tiny_net: TinyNet, loader: Loaders, order: tuple[str, str]) -> None:
    """In one process, one after the other."""
    expected = {"no": torch.float32, "bf16": torch.bfloat16}
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")
    assert [head_dtypes(ee, loader(16), mixed_precision=precision) for precision in order] == [
        {expected[precision]} for precision in order
    ]


def test_importing_exitkit_does_not_import_accelerate() -> None:
    code = "import sys, exitkit, exitkit.training; print('accelerate' in sys.modules)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regime": "disjont"}, "Did you mean 'disjoint'"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' is unknown.*'bf16'"),
        ({"resume": "always"}, "resume='always' is unknown.*'never'"),
        ({"log": "wandb"}, "log='wandb' is unknown.*'csv'"),
        ({"epochs": 0}, "epochs=0 must be a whole number at least 1"),
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 1.5}, r"epochs=1\.5"),
        ({"lr": 0.0}, r"lr=0\.0 must be a number greater than 0"),
        ({"lr": -1e-3}, r"lr=-0\.001"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"patience": 0}, "patience=0 must be a whole number at least 1"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"cache": "yes"}, "cache='yes' must be True or False"),
        ({"output_dir": 5}, "output_dir=5 must be a text or a Path or None"),
        ({"optimizer": functools.partial(torch.optim.SGD, speed=2)}, "optimizer= cannot be called .*'speed'.*partial"),
    ],
)
def test_bad_arguments_are_refused(tiny_ee: MultiExitModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        Trainer(tiny_ee, **options)


def test_a_model_without_exits_is_refused(tiny_net: TinyNet) -> None:
    with pytest.raises(ExitkitError, match=r"model is TinyNet; train what exitkit\.attach"):
        Trainer(tiny_net)  # type: ignore[arg-type]


def test_patience_needs_validation(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    with pytest.raises(ExitkitError, match="patience is set, but there is no val_loader"):
        trainer(tiny_ee, patience=2).fit(loader())


def test_an_empty_training_loader_is_refused(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    with pytest.raises(ExitkitError, match="train_loader is empty"):
        trainer(tiny_ee).fit(DataLoader(loader(4).dataset, batch_size=8, drop_last=True))


def test_an_empty_validation_loader_is_refused(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    with pytest.raises(ExitkitError, match="val_loader is empty"):
        trainer(tiny_ee).fit(loader(16), [])


def test_labels_out_of_range_are_refused(tiny_ee: MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="labels run from 1 to 3, but the model has 3 classes"):
        trainer(tiny_ee).fit([(torch.zeros(2, 1, 8, 8), torch.tensor([1, 3]))])


def test_missing_labels_are_refused(tiny_ee: MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="yields no labels"):
        trainer(tiny_ee).fit([torch.zeros(2, 1, 8, 8)])


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path, tiny_ee: MultiExitModel) -> None:
    batch = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    tiny_ee.classifiers[0].linear.weight.data.fill_(float("nan"))
    with pytest.raises(ExitkitError, match=r"the loss of exit 0 is nan in epoch 1, step 1, at lr=0\.01; lower lr"):
        trainer(tiny_ee, output_dir=tmp_path).fit([batch])
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_loss_that_is_not_finite_leaves_the_heads_finite(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    broken = torch.full((2, 1, 8, 8), float("nan")), torch.tensor([0, 1])
    with pytest.raises(ExitkitError):
        trainer(tiny_ee).fit([*loader(16), broken])
    assert all(parameter.isfinite().all() for parameter in tiny_ee.added_parameters())


def test_tokenised_texts_and_their_collator_work_unchanged() -> None:
    """Rows as ``datasets.Dataset.map(tokenizer)`` gives them, and a collator that yields ``BatchEncoding``, not dicts."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"[PAD]": 0, "good": 1, "bad": 2, "film": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), pad_token="[PAD]"
    )
    lengths = (3, 5, 4, 6)
    rows: Any = [
        {"input_ids": [1 + n % 2] + [3] * lengths[n % 4], "attention_mask": [1] * (1 + lengths[n % 4]), "label": n % 2}
        for n in range(32)
    ]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    loader: DataLoader[Any] = DataLoader(rows, batch_size=8, collate_fn=collate)
    assert not isinstance(next(iter(loader)), dict)
    config = transformers.BertConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    torch.manual_seed(0)
    ee = exitkit.attach(transformers.BertForSequenceClassification(config), every=1, method="ztw")
    Trainer(ee, epochs=8, lr=0.05, show_progress=False).fit(loader, loader)
    assert exitkit.collect(ee, loader).accuracy()[0] == 1
