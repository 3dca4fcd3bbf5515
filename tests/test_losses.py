"""Losses: closed forms from the papers, temperatures, targets of every kind, and what cannot be asked."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

import exitkit
from exitkit import ExitkitError, MultiExitModel, Trainer
from exitkit.common.batches import check_training_labels
from exitkit.evaluation import RegressionOutputs
from exitkit.training import Distillation, Loss, Phase
from exitkit.training.objective import Objective
from tests.toy import TinyNet

Loaders = Callable[..., DataLoader[tuple[Tensor, ...]]]
EXAMPLE = torch.zeros(2, 1, 8, 8)
LAST = 3
LABELS = torch.tensor([0, 1, 2, 1, 0])


def trainer(ee: MultiExitModel, regime: Any = "disjoint", **options: Any) -> Trainer:
    return Trainer(ee, regime, **({"epochs": 1, "lr": 1e-2, "show_progress": False} | options))


@pytest.fixture
def ee(tiny_net: TinyNet) -> MultiExitModel:
    return exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")


@pytest.fixture
def logits() -> list[Tensor]:
    return [torch.randn(5, 3, requires_grad=True) for _ in range(LAST + 1)]


def losses(loss: Loss, logits: Sequence[Tensor], targets: Tensor | None = LABELS, **options: Any) -> Tensor:
    return Objective(loss, LAST).losses(logits, targets, options.pop("exits", range(LAST + 1)), **options)


# weights -------------------------------------------------------------------------------------------------------------


SHARES = (0.2, 0.5, 0.8)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("constant", (1, 1, 1, 1)),
        ("increasing", (0.6, 0.6 + 0.8 / 3, 0.6 + 1.6 / 3, 1.4)),
        ("decreasing", (1.4, 0.6 + 1.6 / 3, 0.6 + 0.8 / 3, 0.6)),
        ("pabee", (0.4, 0.8, 1.2, 1.6)),
        ([1, 2, 3, 0], (1, 2, 3, 0)),
    ],
)
def test_weights(weights: Any, expected: tuple[float, ...]) -> None:
    assert Loss(weights=weights).weights_at(0.5, SHARES) == pytest.approx(expected)


def test_the_sdn_ramp() -> None:
    """From 0.01 to each exit's share of the MACs (Kaya et al. 2019); the backbone's weight stays 1."""
    loss = Loss(weights="sdn")
    assert loss.weights_at(0, SHARES) == (0.01, 0.01, 0.01, 1)
    assert loss.weights_at(0.5, SHARES) == pytest.approx((0.11, 0.26, 0.41, 1))
    assert loss.weights_at(0.99, SHARES) == pytest.approx((0.2, 0.5, 0.8, 1))


@pytest.mark.parametrize("weights", ["constant", "increasing", "decreasing", "pabee"])
@given(exits=st.integers(2, 30))
def test_named_weights_have_mean_1(weights: Any, exits: int) -> None:
    assert math.fsum(Loss(weights=weights).weights_at(0, [0.5] * (exits - 1))) == pytest.approx(exits)


def test_pabee_is_the_layer_weighted_mean(logits: list[Tensor]) -> None:
    """Zhou et al. 2020: Σ_j j · L_j / Σ_j j."""
    loss = Loss(weights="pabee", reduction="mean")
    each = losses(loss, logits)
    total = Objective(loss, LAST).total(each, loss.weights_at(0, SHARES), range(4))
    assert total.item() == pytest.approx(sum((j + 1) * each[j].item() for j in range(4)) / 10)


def test_weights_and_reduction_of_the_exits_that_count(logits: list[Tensor]) -> None:
    each = torch.tensor([2.0, 5.0])
    for reduction, expected in (("sum", 2 * 20 + 5 * 30), ("mean", (2 * 20 + 5 * 30) / 2)):
        total = Objective(Loss(reduction=reduction), LAST).total(each, (10, 20, 30, 40), (1, 2))
        assert total.item() == expected


def test_a_weight_of_0_takes_no_part(ee: MultiExitModel, loader: Loaders) -> None:
    before = copy.deepcopy(ee.classifiers)
    trainer(ee, loss=Loss(weights=[1, 0, 1, 1])).fit(loader())
    same = [
        all(torch.equal(a, b) for a, b in zip(now.parameters(), was.parameters(), strict=True))
        for now, was in zip(ee.classifiers, before, strict=True)
    ]
    assert same == [False, True, False]


# classification ------------------------------------------------------------------------------------------------------


def test_cross_entropy_per_exit(logits: list[Tensor]) -> None:
    expected = [-logit.log_softmax(-1)[torch.arange(5), LABELS].mean().item() for logit in logits]
    assert losses(Loss(), logits).tolist() == pytest.approx(expected)


def test_soft_labels(logits: list[Tensor]) -> None:
    soft = torch.rand(5, 3).softmax(-1)
    expected = [-(soft * logit.log_softmax(-1)).sum(-1).mean().item() for logit in logits]
    assert losses(Loss(), logits, soft).tolist() == pytest.approx(expected)


def test_label_smoothing(logits: list[Tensor]) -> None:
    """A tenth of every label is spread evenly over the classes."""
    soft = 0.9 * F.one_hot(LABELS, 3) + 0.1 / 3
    expected = losses(Loss(), logits, soft)
    torch.testing.assert_close(losses(Loss(label_smoothing=0.1), logits), expected)


def test_unlabelled_samples_are_left_out_of_the_cross_entropy(logits: list[Tensor]) -> None:
    """Equation 6 of Phuong and Lampert: 1 / N over the labelled, 1 / N' over all."""
    some = torch.tensor([0, -1, 2, -1, 0])
    loss = Loss(distillation=Distillation(confidence_limit=None))
    kept = some >= 0
    supervised = losses(Loss(), [logit[kept] for logit in logits], some[kept])
    torch.testing.assert_close(losses(loss, logits, some) - losses(loss, logits, -torch.ones(5).long()), supervised)


def test_squared_error_for_one_output() -> None:
    outputs = [torch.randn(5, 1) for _ in range(4)]
    values = torch.randn(5)
    expected = [((out[:, 0] - values) ** 2).mean().item() for out in outputs]
    assert losses(Loss(), outputs, values).tolist() == pytest.approx(expected)


# distillation --------------------------------------------------------------------------------------------------------


def soft(logit: Tensor, tau: float) -> Tensor:
    return (logit.exp() ** (1 / tau)) / (logit.exp() ** (1 / tau)).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ("last", {0: [3], 1: [3], 2: [3], 3: []}),
        ("later", {0: [1, 2, 3], 1: [2, 3], 2: [3], 3: []}),
        ("next", {0: [1], 1: [2], 2: [3], 3: []}),
        ({0: [2, 1], 3: [0]}, {0: [2, 1], 1: [], 2: [], 3: [0]}),
    ],
)
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_distillation_is_equations_2_to_4(logits: list[Tensor], teachers: Any, expected: Any, tau: float) -> None:
    """−τ² Σ_k t_k^(1/τ) log s_k^(1/τ), averaged over samples and teachers, beside the cross-entropy."""
    config = Distillation(teachers, weight=0.5, temperature=tau, confidence_limit=None)
    each = losses(Loss(distillation=config), logits) - losses(Loss(), logits)
    for m, those in expected.items():
        terms = [-(tau**2) * (soft(logits[t], tau) * soft(logits[m], tau).log()).sum(-1).mean() for t in those]
        assert each[m].item() == pytest.approx(0.5 * sum(terms).item() / len(terms) if terms else 0.0, abs=1e-5)


def test_teachers_learn_nothing(logits: list[Tensor]) -> None:
    """Partial detaching: from the students' terms alone, no gradient reaches the teacher."""
    losses(Loss(distillation=Distillation()), logits, None, exits=(0, 1)).sum().backward()
    assert [logit.grad is not None for logit in logits] == [True, True, False, False]


def test_kl_is_cross_entropy_less_the_teachers_entropy(logits: list[Tensor]) -> None:
    """Same gradients; 0 for a perfect copy, also of a teacher that rules a class out."""
    cross, kl = (Loss(distillation=Distillation(divergence=kind)) for kind in ("cross_entropy", "kl"))  # type: ignore[arg-type]
    gradients = [
        torch.autograd.grad(losses(loss, logits, None, exits=(0,)).sum(), logits[0])[0] for loss in (cross, kl)
    ]
    torch.testing.assert_close(*gradients)
    entropy = torch.distributions.Categorical(logits=logits[3].detach()).entropy().mean()
    difference = losses(cross, logits, None, exits=(0,)) - losses(kl, logits, None, exits=(0,))
    assert difference.item() == pytest.approx(entropy.item(), abs=1e-5)
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    assert losses(kl, [sure] * 4, None, exits=(0,)).item() == pytest.approx(0, abs=1e-6)


def test_the_temperature_grows_where_the_teacher_is_too_sure() -> None:
    """Algorithm 1: τ starts at 1 and is multiplied by τ* after a batch whose confidence at τ exceeds μ."""
    objective = Objective(Loss(distillation=Distillation(confidence_limit=0.7, multiplier=1.5)), LAST)
    logits = [torch.tensor([[2.0, 0.0, 0.0]])] * 4
    temperatures = []
    for _ in range(4):
        objective.losses(logits, torch.tensor([0]), range(4))
        assert objective.confidence is not None
        expected = soft(logits[0], objective.temperature).max().item()
        assert objective.confidence.item() == pytest.approx(expected)
        objective.anneal(objective.confidence.item())
        temperatures.append(objective.temperature)
    assert temperatures == [1.5, 1.5, 1.5, 1.5]


def test_teachers_confidence_is_that_of_algorithm_1() -> None:
    """Line 11: the largest probability of the teachers' mean; or, by name, the mean of each teacher's largest."""
    probabilities = torch.tensor([[[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]], [[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]]])
    logits = [torch.zeros(2, 3), *probabilities.log(), torch.zeros(2, 3)]
    by_hand = {"max_of_mean": ((0.8 + 0.2) / 2 + (0.6 + 0.5) / 2) / 2, "mean_of_max": (0.8 + 0.6 + 0.7 + 0.5) / 4}
    reached = {}
    for kind in by_hand:
        objective = Objective(Loss(distillation=Distillation({0: (1, 2)}, confidence=kind)), LAST)  # type: ignore[arg-type]
        objective.losses(logits, None, (0,))
        assert objective.confidence is not None
        reached[kind] = objective.confidence.item()
    assert reached == pytest.approx(by_hand)
    default = Objective(Loss(distillation=Distillation({0: (1, 2)})), LAST)
    default.losses(logits, None, (0,))
    assert default.confidence == pytest.approx(by_hand["max_of_mean"])


def test_the_default_distillation_is_for_any_number_of_classes(loader: Loaders) -> None:
    """τ grows where the teacher is surer than halfway between 1 / classes and 1."""
    binary = exitkit.attach(TinyNet(num_classes=2), EXAMPLE, every=1, method="sdn")
    batches = [(images, labels % 2) for images, labels in loader(32)]
    history = trainer(binary, loss=Loss(distillation=Distillation())).fit(batches, batches)
    assert all(loss is not None and math.isfinite(loss) for loss in history[0].loss)
    for classes, limit in ((2, 0.75), (10, 0.55), (100, 0.505)):
        objective = Objective(Loss(distillation=Distillation()), LAST)
        objective.losses([torch.zeros(2, classes)] * 4, None, (0,))
        objective.anneal(limit - 1e-6)
        assert objective.temperature == 1
        objective.anneal(limit + 1e-6)
        assert objective.temperature > 1
    with pytest.raises(ExitkitError, match=r"confidence_limit=0\.5 would let the temperature grow .*of 2 classes"):
        trainer(binary, loss=Loss(distillation=Distillation(confidence_limit=0.5)))


def test_the_trainer_anneals_once_per_batch(ee: MultiExitModel, loader: Loaders, monkeypatch: Any) -> None:
    reached = []
    anneal = Objective.anneal
    monkeypatch.setattr(Objective, "anneal", lambda self, c: (anneal(self, c), reached.append(self.temperature)))
    config = Distillation(confidence_limit=0.334, multiplier=1.1)
    trainer(ee, epochs=2, loss=Loss(distillation=config)).fit(loader(48, 16), loader())
    assert reached == pytest.approx([1.1**k for k in range(1, 7)])


def test_what_is_shown_of_a_distillation_does_not_grow_with_the_temperature(logits: list[Tensor]) -> None:
    """The cross-entropy and the KL divergence at τ: 0 for a perfect copy, where τ² times a cross-entropy grows."""
    tau, targets = 5.0, torch.arange(len(logits[0])) % 3
    objective = Objective(Loss(distillation=Distillation(weight=2.0, temperature=tau)), LAST)
    minimised = objective.losses(logits, targets, range(4))
    teacher = (logits[3] / tau).softmax(-1)
    for m in range(3):
        kl = F.kl_div((logits[m] / tau).log_softmax(-1), teacher, reduction="batchmean")
        assert objective.shown[m].item() == pytest.approx(
            (F.cross_entropy(logits[m], targets) + 2 * kl).item(), rel=1e-4
        )
    assert not objective.shown.requires_grad
    assert minimised[0] > 10 * objective.shown[0]
    objective.losses([logits[3]] * 4, None, (0,))
    assert objective.shown.item() == pytest.approx(0, abs=1e-6)


def test_the_record_tells_the_temperature(ee: MultiExitModel, loader: Loaders) -> None:
    config = Distillation(confidence_limit=0.334, multiplier=1.1)
    records = trainer(ee, epochs=2, loss=Loss(distillation=config)).fit(loader(48, 16))
    assert [record.temperature for record in records] == pytest.approx([1.1**3, 1.1**6])
    assert records[0].scalars()["temperature"] == records[0].temperature
    assert "τ 1.33" in records[0].line()
    assert trainer(ee).fit(loader(16))[0].temperature is None


def test_label_free_training_copies_the_backbone(ee: MultiExitModel, loader: Loaders) -> None:
    """Behavioural cloning (Zero Time Waste, appendix A.2): the exits come to agree with an untrained backbone."""
    config = Loss(distillation=Distillation(confidence_limit=None, divergence="kl"))
    batches = [images for images, _ in loader(192)]
    history = trainer(ee, epochs=6, loss=config).fit(batches)
    assert history[-1].loss[2] < history[0].loss[2] / 2
    with torch.no_grad():
        logits = ee.eval()(torch.cat(batches)).logits
    kl = F.kl_div(logits[2].log_softmax(-1), logits[3].softmax(-1), reduction="batchmean")
    assert kl.item() < 2 * history[-1].loss[2]


def test_the_teachers_confidence_of_every_epoch_is_recorded(
    tiny_ee: MultiExitModel, loader: Loaders, tmp_path: Path
) -> None:
    """Of a frozen teacher at a fixed temperature: the mean of its largest probability there, and at τ = 1 (Phuong and
    Lampert, figure 6)."""
    batches = list(loader())
    loss = Loss(distillation=Distillation(temperature=3.0, confidence_limit=None))
    history = trainer(tiny_ee, loss=loss, epochs=2, output_dir=tmp_path).fit(batches)
    with torch.no_grad():
        sure, plain = (
            float(
                torch.stack(
                    [(tiny_ee.backbone.eval()(x) / tau).softmax(-1).amax(-1).mean() for x, _ in batches]
                ).mean()
            )
            for tau in (3, 1)
        )
    assert plain > sure
    assert [record.confidence for record in history] == pytest.approx([sure] * 2)
    assert [record.unadjusted_confidence for record in history] == pytest.approx([plain] * 2)
    names = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"teachers_confidence", "teachers_unadjusted_confidence"} <= set(names)
    assert trainer(tiny_ee).fit(batches)[0].unadjusted_confidence is None


def test_the_ensemble_needs_no_labels_either(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    before = tiny_ee.combiners[2].log_weights.clone()
    batches = [images for images, _ in loader()]
    trainer(tiny_ee, loss=Loss(distillation=Distillation())).fit(batches)
    assert not torch.equal(tiny_ee.combiners[2].log_weights, before)


def test_the_ensemble_ignores_samples_without_a_label(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    images, labels = (torch.cat(column) for column in zip(*loader(), strict=True))
    hidden = labels.clone()
    hidden[::2] = -1
    other = copy.deepcopy(tiny_ee)
    exitkit.training.fit_ensemble(tiny_ee, [(images, hidden)])
    exitkit.training.fit_ensemble(other, [(images[1::2], labels[1::2])])
    torch.testing.assert_close(tiny_ee.combiners.state_dict(), other.combiners.state_dict(), atol=1e-3, rtol=1e-3)


class Sure(nn.Module):
    """A teacher that answers 1 whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 9.0, 0.0]))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.logits).expand(len(x), 3)
        return out


def test_another_model_teaches_every_exit(ee: MultiExitModel, loader: Loaders) -> None:
    teacher = Sure().train()
    batches = [images for images, _ in loader(192)]
    trainer(ee, "mixed", epochs=4, loss=Loss(distillation=Distillation(teacher))).fit(batches)
    assert (exitkit.collect(ee, [(images, torch.ones(16).long()) for images in batches]).accuracy() == 1).all()
    assert teacher.training
    assert teacher.logits.tolist() == [0, 9, 0]
    assert teacher.logits.grad is None


def test_a_teacher_of_other_classes_is_refused(ee: MultiExitModel, loader: Loaders) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ExitkitError, match=r"the teacher's logits have shape \(16, 5\), the exits' \(16, 3\)"):
        trainer(ee, loss=Loss(distillation=Distillation(teacher))).fit(loader())


# gradient equilibrium ------------------------------------------------------------------------------------------------


class Rescale(torch.autograd.Function):
    """Identity forward, the gradient times a factor: what the published code does at each exit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def test_gradient_equilibrium_is_that_of_li_et_al(tiny_net: TinyNet, loader: Loaders, monkeypatch: Any) -> None:
    """Against rescaling by 1 / (n − i) before exit i and by n − i − 1 behind it, written into the network."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn", head="conv")  # standardises nothing
    ee.backbone.dropout.p = 0.0
    images, labels = next(iter(loader(16, 16)))
    other = copy.deepcopy(ee)
    seen: dict[str, Tensor] = {}
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *_: (seen.update({n: p.grad.clone() for n, p in ee.named_parameters()}), step(self))[1],
    )
    loss = Loss(gradient_equilibrium=True, weights="increasing")
    trainer(ee, "mixed", optimizer=torch.optim.SGD, loss=loss).fit([(images, labels)])
    net, n = other.backbone.train(), LAST + 1
    x, total = net.stem(images), torch.zeros(())
    for i in range(LAST):
        x = Rescale.apply(net.blocks[i](x), 1 / (n - i))
        total = total + loss.weights_at(0, SHARES)[i] * F.cross_entropy(other.classifiers[i](x), labels)
        x = Rescale.apply(x, n - i - 1)
    total = total + 1.4 * F.cross_entropy(net.linear(net.blocks[LAST](x).mean((2, 3))), labels)
    total.backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-6)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        logits: Tensor = self.out(x)
        return logits


def test_gradient_equilibrium_refuses_shared_layers() -> None:
    ee = exitkit.attach(Looped(), torch.zeros(2, 4), at=["block", "block@1"], method="sdn")
    with pytest.raises(ExitkitError, match=r"'block\.0\.weight' is read in several stages"):
        trainer(ee, "mixed", loss=Loss(gradient_equilibrium=True)).fit([(torch.randn(4, 4), torch.zeros(4).long())])


# what a loader may bring ---------------------------------------------------------------------------------------------


def test_mixup_and_cutmix_batches_train(ee: MultiExitModel) -> None:
    """torchvision's transforms in the collate function, as its documentation has them."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    mix = v2.RandomChoice([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)])
    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 3)
    batches = DataLoader(data, batch_size=8, collate_fn=lambda batch: mix(default_collate(batch)))
    assert next(iter(batches))[1].shape == (8, 3)
    history = trainer(ee, "mixed", loss=Loss(label_smoothing=0.1)).fit(batches, DataLoader(data, batch_size=8))
    assert len(history[0].loss) == 4


def test_the_ensemble_takes_soft_labels(tiny_ee: MultiExitModel, loader: Loaders) -> None:
    other = copy.deepcopy(tiny_ee)
    exitkit.training.fit_ensemble(tiny_ee, loader())
    exitkit.training.fit_ensemble(other, [(x, F.one_hot(y, 3).float()) for x, y in loader()])
    torch.testing.assert_close(tiny_ee.combiners.state_dict(), other.combiners.state_dict())


@pytest.fixture
def regressor() -> MultiExitModel:
    """A model of one output."""
    return exitkit.attach(TinyNet(num_classes=1), EXAMPLE, every=1, method="pbee")


@pytest.mark.parametrize("shape", [(16,), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_regression(regressor: MultiExitModel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.randn(64, 1, 8, 8) + 3
    batches = [(x, x.mean((1, 2, 3)).mul(2).round().to(dtype).view(shape)) for x in images.split(16)]
    untrained = exitkit.collect(regressor, batches)
    assert isinstance(untrained, RegressionOutputs)
    history = trainer(regressor, "mixed", epochs=8, patience=8).fit(batches, batches)
    assert history[0].accuracy is None
    last = history[-1].val_loss
    assert last is not None
    assert all(after < before / 2 for before, after in zip(untrained.mse(), last, strict=True))


def test_validation_loss_is_the_mean_cross_entropy(ee: MultiExitModel, loader: Loaders) -> None:
    history = trainer(ee).fit(loader(), loader(40, 16, seed=1))
    outputs = exitkit.collect(ee, loader(40, 16, seed=1))
    expected = [F.nll_loss(outputs.log_probs[:, m], outputs.labels).item() for m in range(4)]
    assert history[0].val_loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0, 1, -2, -1]), 3, "labels run from -2 to 1"),
        (torch.tensor([0, 3, 1, -1]), 3, "labels run from 0 to 3"),
        (torch.full((4, 3), 0.5), 3, "each row of sum 1"),
        (torch.tensor([[2.0, -1.0, 0.0]] * 4), 3, "are soft ones: probabilities"),
        (torch.rand(4), 3, "expected class indices"),
        (torch.rand(4, 2), 3, "expected class indices"),
        (torch.rand(4, 2), 1, r"one output needs one finite number per sample, shape \(4,\)"),
        (torch.tensor([1.0, float("nan"), 0.0, 0.0]), 1, "one finite number"),
        ("abcd", 3, "labels are no class indices"),
    ],
)
def test_targets_that_are_none_are_refused(labels: Any, classes: int, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        check_training_labels(labels, classes, 4)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_labels_may_be_arrays_and_lists(make: Callable[[Any], Any]) -> None:
    indices = check_training_labels(make([0, 2, -1]), 3, 3)
    assert indices.tolist() == [0, 2, -1]
    assert indices.dtype == torch.int64
    soft = check_training_labels(make([[0.25, 0.75], [1.0, 0.0]]), 2, 2)
    assert soft.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert soft.dtype == torch.float32


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loss(weights="rising"), "weights='rising' is unknown.*'increasing'"),  # type: ignore[arg-type]
        (lambda: Loss(weights=[1, -1]), "weights=-1 must be a number at least 0; give one number per exit"),
        (lambda: Loss(weights=None), "weights=None must be 'constant' or .*; or give one number per exit"),  # type: ignore[arg-type]
        (lambda: Loss(label_smoothing="a"), "label_smoothing='a' must be a number at least 0"),  # type: ignore[arg-type]
        (lambda: Distillation(temperature="hot"), "temperature='hot' must be a number greater than 0"),  # type: ignore[arg-type]
        (lambda: Loss(reduction="max"), "reduction='max' is unknown"),  # type: ignore[arg-type]
        (lambda: Loss(label_smoothing=1), "label_smoothing=1 must be a number at least 0 and below 1"),
        (lambda: Loss(distillation="last"), "distillation='last' must be a Distillation or None"),  # type: ignore[arg-type]
        (lambda: Distillation("final"), "teachers='final' is unknown"),  # type: ignore[arg-type]
        (lambda: Distillation(3), "teachers=3 must be 'last' or .* a Module; or give a mapping"),  # type: ignore[arg-type]
        (lambda: Distillation(temperature=0), "temperature=0 must be a number greater than 0"),
        (lambda: Distillation(weight=float("nan")), "weight=nan"),
        (lambda: Distillation(confidence_limit=1.0), r"confidence_limit=1\.0 must be a number between 0 and 1"),
        (lambda: Distillation(multiplier=1.0), r"multiplier=1\.0 must be a number greater than 1"),
        (lambda: Distillation(confidence="median"), "confidence='median' is unknown.*'max_of_mean'"),  # type: ignore[arg-type]
        (lambda: Distillation(confidence_limit="low"), "confidence_limit='low' is unknown.*'auto'"),  # type: ignore[arg-type]
        (lambda: Distillation(weight=0), "weight=0 must be a number greater than 0"),
        (lambda: Loss(weights=np.ones(4)), "weights=.*give one number per exit"),  # type: ignore[arg-type]
        (lambda: Distillation(divergence="js"), "divergence='js' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_losses_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        make()


@pytest.mark.parametrize(
    ("regime", "loss", "message"),
    [
        ("disjoint", Loss(weights=[1, 1, 1]), r"has 3 numbers for 4 exits; give one for each of blocks\.0"),
        ("disjoint", Loss(gradient_equilibrium=True), "gradient_equilibrium=True .* the regime freezes the backbone"),
        (
            "disjoint",
            Loss(distillation=Distillation({})),
            r"gives none of the exits that count \(\[0, 1, 2\]\) a teacher",
        ),
        (
            (Phase((3,), (3,)),),
            Loss(distillation=Distillation()),
            r"gives none of the exits that count \(\[3\]\) a teacher",
        ),
        (
            "disjoint",
            Loss(distillation=Distillation({0: [0]})),
            r"maps exit 0 to \[0\]; give a tuple of other exits from 0 to 3",
        ),
        ("disjoint", Loss(distillation=Distillation({0: 3})), "maps exit 0 to 3; give a tuple of other exits"),  # type: ignore[dict-item]
        ("disjoint", Loss(distillation=Distillation({0: "last"})), "maps exit 0 to 'last'"),
        ("disjoint", Loss(distillation=Distillation({0: [4]})), "exits from 0 to 3"),
        ("disjoint", Loss(distillation=Distillation({0: [[3]]})), r"maps exit 0 to \[\[3\]\]"),  # type: ignore[list-item]
        (
            "disjoint",
            Loss(weights=[0, 0, 0, 1]),
            r"weights=\[0, 0, 0, 1\] are 0 for every exit that counts in phase 1",
        ),
        (
            "disjoint",
            Loss(distillation=Distillation(confidence_limit=0.3)),
            r"confidence_limit=0\.3 would let the temperature grow in every step: of 3 classes .* at least 0\.333",
        ),
        ("disjoint", "sum", r"loss='sum' must be a Loss; give Loss\("),
    ],
)
def test_losses_that_do_not_fit_the_run_are_refused(ee: MultiExitModel, regime: Any, loss: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        Trainer(ee, regime, loss=loss)


def test_a_model_does_not_teach_itself(ee: MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="teachers= is the trained model or a part of it; give a copy"):
        Trainer(ee, "mixed", loss=Loss(distillation=Distillation(ee.backbone)))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Loss(label_smoothing=0.1), "label_smoothing=0.1 needs classes, but the model has one output"),
        (Loss(distillation=Distillation()), "distillation compares class probabilities, but"),
    ],
)
def test_a_regression_refuses_what_needs_classes(regressor: MultiExitModel, loss: Loss, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        Trainer(regressor, loss=loss)


def test_a_loss_that_needs_labels_says_so(ee: MultiExitModel, loader: Loaders) -> None:
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ExitkitError, match=r"yields no labels.*learn without labels by loss="):
        trainer(ee).fit([images])
    with pytest.raises(ExitkitError, match=r"some labels are -1.*the loss needs labels"):
        trainer(ee).fit([(images, torch.tensor([0, -1]))])


def test_without_labels_an_exit_without_a_teacher_is_refused(ee: MultiExitModel) -> None:
    """Else the backbone would drift: its own exit has nothing to hold it."""
    with pytest.raises(ExitkitError, match=r"exits \[3\] have no teacher; freeze the backbone"):
        trainer(ee, "mixed", loss=Loss(distillation=Distillation())).fit([torch.zeros(2, 1, 8, 8)])


class Normalised(TinyNet):
    """A batch of one has a single value per channel at its last BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(self.blocks(self.stem(x)).mean((2, 3))))
        return out


def test_weights_that_the_last_step_ruined_are_not_kept(ee: MultiExitModel, loader: Loaders, tmp_path: Path) -> None:
    """The loss was finite, its gradient is not: there is no next step to notice."""
    weight = next(ee.classifiers[1].parameters())
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ExitkitError, match=r"classifiers\.1\..* is not finite after epoch 1, at lr=0\.01; lower lr"):
        trainer(ee, output_dir=tmp_path).fit(loader(16, 16))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_batch_of_one_and_batch_norm() -> None:
    ee = exitkit.attach(Normalised(), EXAMPLE, every=1, method="sdn")
    batch = [(torch.zeros(1, 1, 8, 8), torch.tensor([0]))]
    with pytest.raises(ExitkitError, match=r"a batch of one sample has no statistics.*drop_last=True"):
        trainer(ee, "mixed").fit(batch)
    assert len(trainer(ee).fit(batch)) == 1
    with pytest.raises(ExitkitError, match="or one in the head of an exit"):
        trainer(exitkit.attach(Normalised(), EXAMPLE, every=1, head="tail", method="sdn")).fit(batch)


def test_a_methods_own_loss_is_added(ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model returns as ``auxiliary`` (gpf's imitation) counts with the exit's loss."""
    plain = trainer(copy.deepcopy(ee), "mixed", lr=1e-12).fit(loader())[0].loss
    run_until = MultiExitModel.run_until
    own = tuple(torch.tensor(float(m + 1), requires_grad=True) for m in range(LAST))
    monkeypatch.setattr(MultiExitModel, "run_until", lambda self, *x: (run_until(self, *x)[0], own))
    with_it = trainer(ee, "mixed", lr=1e-12).fit(loader())[0].loss
    assert [b - a for a, b in zip(plain, with_it, strict=True)] == pytest.approx([1, 2, 3, 0], abs=1e-3)
