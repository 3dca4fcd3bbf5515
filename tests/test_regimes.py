"""Regimes: which parts move in which phase, and that what is frozen does not."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import exitkit
from exitkit import ExitkitError, MultiExitModel, Trainer
from exitkit.training import Phase
from exitkit.training.freezing import stages_of
from exitkit.training.regimes import REGIMES, epochs_of, phases_of
from tests.toy import TinyNet

Loaders = Callable[..., DataLoader[tuple[Tensor, ...]]]
EXAMPLE = torch.zeros(2, 1, 8, 8)
LAST = 3
"""The backbone's exit in a tiny net with an exit after each block but the last."""


def trainer(ee: MultiExitModel, regime: Any, **options: Any) -> Trainer:
    return Trainer(ee, regime, **({"epochs": 1, "lr": 1e-2, "show_progress": False} | options))


@pytest.fixture
def ee(tiny_net: TinyNet) -> MultiExitModel:
    return exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn")


def part(name: str) -> str:
    """Which stage or head a parameter or buffer of the tiny net with exits belongs to."""
    if name.startswith("classifiers."):
        return f"head {name.split('.')[1]}"
    path = name.removeprefix("backbone.")
    return (
        f"stage {path.split('.')[1] if path.startswith('blocks.') else {'stem': 0, 'linear': 3}[path.split('.')[0]]}"
    )


def moved(ee: MultiExitModel, train: Callable[[], Any]) -> set[str]:
    """The parts of which anything (weights or BatchNorm statistics) is another after ``train``."""
    before = {name: value.clone() for name, value in ee.state_dict().items()}
    train()
    return {part(name) for name, value in ee.state_dict().items() if not torch.equal(value, before[name])}


def named(exits: set[int], stages: set[int]) -> set[str]:
    return {f"head {m}" for m in exits if m != LAST} | {f"stage {m}" for m in stages}


ALL = {0, 1, 2, 3}
EXPECTED: dict[str, list[tuple[set[int], set[int]]]] = {
    "disjoint": [({0, 1, 2}, set())],
    "joint": [(ALL, ALL)],
    "mixed": [(ALL, ALL)],
    "mixed-gradual": [({2, 3}, ALL), ({1, 2, 3}, ALL), (ALL, ALL)],
    "branch-wise": [({m}, {m}) for m in range(4)],
    "separate": [({0}, {0}), ({0, 1}, {0, 1}), ({0, 1, 2}, {0, 1, 2}), (ALL, ALL)],
    "alternating": [(ALL, ALL)],
}
"""Of each phase: the exits that count, and the stages that learn (Kubaty et al., section 2 and appendix A)."""


@pytest.mark.parametrize("regime", REGIMES)
def test_each_phase_moves_what_the_paper_says_and_nothing_else(
    ee: MultiExitModel, loader: Loaders, regime: str
) -> None:
    """Phase by phase, by training with that phase alone."""
    phases = phases_of(regime, LAST)
    assert len(phases) == len(EXPECTED[regime])
    for phase, (exits, stages) in zip(phases, EXPECTED[regime], strict=True):
        assert moved(ee, lambda phase=phase: trainer(ee, (phase,)).fit(loader())) == named(exits, stages)


def test_phases_follow_one_another(ee: MultiExitModel, loader: Loaders) -> None:
    history = trainer(ee, "mixed-gradual", epochs=6).fit(loader(), loader())
    assert [record.phase for record in history] == [0, 0, 1, 1, 2, 2]
    assert [record.exits for record in history[::2]] == [(2, 3), (1, 2, 3), (0, 1, 2, 3)]
    assert all(len(record.loss) == len(record.exits) and len(record.accuracy or ()) == 4 for record in history)


@pytest.mark.parametrize("regime", REGIMES)
def test_frozen_parts_rest_while_a_regime_runs(ee: MultiExitModel, loader: Loaders, regime: str) -> None:
    """At every forward of a step: what has no gradient is in eval mode, what learns is in training mode."""
    seen: list[tuple[str, bool, bool]] = []

    def look(module: nn.Module, args: Any, name: str) -> None:
        if torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in ee.backbone.parameters()):
            seen.append((name, module.training, any(p.requires_grad for p in module.parameters(recurse=False))))

    for name, module in ee.named_modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_pre_hook(lambda module, args, name=name: look(module, args, name))
    trainer(ee, regime, epochs=4).fit(loader(32))
    behind = (
        3 + 1 if regime == "disjoint" else 0
    )  # the last block and the classifier do not run, as nothing reads them
    assert len({name for name, _, _ in seen}) == 4 * 3 + 2 + 3 * 3 - behind
    assert all(training == learns for _, training, learns in seen)


def test_dropout_is_at_rest_until_its_stage_learns(ee: MultiExitModel, loader: Loaders) -> None:
    active: list[bool] = []
    ee.backbone.dropout.register_forward_pre_hook(lambda module, _: active.append(module.training))
    trainer(ee, "branch-wise", epochs=4).fit(loader(32))
    assert active[-2:] == [True, True]
    assert not any(active[:-2])


def test_flags_are_as_they_were_after_any_regime(ee: MultiExitModel, loader: Loaders) -> None:
    ee.train()
    ee.backbone.blocks[1].eval()
    flags = [module.training for module in ee.modules()]
    gradients = [parameter.requires_grad for parameter in ee.parameters()]
    for regime in REGIMES:
        trainer(ee, regime, epochs=4).fit(loader(16))
        assert [module.training for module in ee.modules()] == flags
        assert [parameter.requires_grad for parameter in ee.parameters()] == gradients


def test_what_the_user_froze_stays_frozen(ee: MultiExitModel, loader: Loaders) -> None:
    """As a LoRA adapter's base does."""
    ee.backbone.stem.requires_grad_(False)
    ee.backbone.blocks[0].requires_grad_(False)
    before = [parameter.clone() for parameter in ee.backbone.parameters()]
    trainer(ee, "mixed").fit(loader())
    same = {name for (name, now), was in zip(ee.backbone.named_parameters(), before, strict=True) if now.equal(was)}
    assert same == {name for name, _ in ee.backbone.named_parameters() if name.startswith(("stem.", "blocks.0."))}


def test_joint_starts_from_the_weights_there_are(ee: MultiExitModel, loader: Loaders) -> None:
    """With a rate near nothing, the pretrained weights are still there afterwards."""
    before = [parameter.clone() for parameter in ee.parameters()]
    trainer(ee, "joint", lr=1e-12).fit(loader())
    for now, was in zip(ee.parameters(), before, strict=True):
        torch.testing.assert_close(now, was, atol=1e-9, rtol=0)


def test_alternating_takes_turns(tiny_net: TinyNet, loader: Loaders) -> None:
    """Step 0 is on the backbone's loss: heads are left alone, without momentum or decay moving them."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="sdn", head="conv")  # standardises nothing
    batches = list(loader(32, 16))
    assert moved(ee, lambda: trainer(ee, "alternating", weight_decay=0.1).fit(batches[:1])) == named(set(), ALL)
    assert moved(ee, lambda: trainer(ee, "alternating").fit(batches)) == named(ALL, ALL)
    assert moved(ee, lambda: trainer(ee, "alternating", epochs=2).fit(batches[:1])) == named(ALL, ALL)


def test_an_exit_without_a_step_in_an_epoch_has_no_loss(
    ee: MultiExitModel, loader: Loaders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One step an epoch: the first is on the backbone's own loss, the second on all."""
    options = {"epochs": 2, "output_dir": tmp_path, "show_progress": True}
    history = trainer(ee, "alternating", **options).fit(loader(16, 16))
    assert [loss is None for loss in history[0].loss] == [True, True, True, False]
    assert None not in history[1].loss
    assert "nan" not in (tmp_path / "metrics.csv").read_text()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss/exit0"] == "" for row in rows] == [True, False]
    shown = capfd.readouterr().err
    assert "loss 0: - 1: - 2: - 3: " in shown
    assert "nan" not in shown
    assert trainer(ee, "alternating", **options).fit(loader(16, 16)) == history


def test_what_past_future_exits_share_learns_with_any_of_them(tiny_net: TinyNet, loader: Loaders) -> None:
    """It is registered in the first exit's classifier, which this phase leaves alone."""
    ee = exitkit.attach(tiny_net, EXAMPLE, every=1, method="gpf")
    before = {name: value.clone() for name, value in ee.named_parameters()}
    trainer(ee, [Phase((1, 2))]).fit(loader(16))
    changed = {name for name, value in ee.named_parameters() if not torch.equal(value, before[name])}
    assert {"classifiers.0.shared.imitate", "classifiers.0.shared.project", "classifiers.1.state.weight"} <= changed
    assert not any(name.startswith(("backbone.", "classifiers.0.state", "classifiers.0.body")) for name in changed)


def test_the_backbone_has_a_rate_of_its_own(ee: MultiExitModel, loader: Loaders) -> None:
    """By Adam, the first step of every weight is as long as its rate."""
    before = {name: value.clone() for name, value in ee.named_parameters()}
    trainer(ee, "mixed", lr=1e-2, backbone_lr=1e-4).fit(loader(16, 16))
    for name, value in ((name, value) for name, value in ee.named_parameters() if name.endswith("weight")):
        step = (value - before[name]).abs().max().item()
        assert step == pytest.approx(1e-2 if name.startswith("classifiers.") else 1e-4, rel=1e-2)


@pytest.mark.parametrize("regime", ["mixed", "alternating", "mixed-gradual", "separate", "branch-wise"])
def test_regimes_learn(loader: Loaders, regime: str) -> None:
    torch.manual_seed(1)
    ee = exitkit.attach(TinyNet(), EXAMPLE, every=1, method="sdn", head="conv")
    trainer(ee, regime, epochs=8).fit(loader(shuffle=True))
    assert (exitkit.collect(ee, loader(seed=1)).accuracy() > 0.6).all()


def test_stages_divide_the_backbone(ee: MultiExitModel) -> None:
    stages = stages_of(ee)
    names = {parameter: name for name, parameter in ee.backbone.named_parameters()}
    assert [{part(names[p]) for p in parameters} for parameters in stages.parameters] == [
        {f"stage {m}"} for m in range(4)
    ]
    assert sum(map(len, stages.parameters)) == len(names)
    assert stages.shared == ()


class Looped(nn.Module):
    """One block called three times, and a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.unused = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        logits: Tensor = self.out(x)
        return logits


@pytest.fixture
def looped() -> MultiExitModel:
    return exitkit.attach(Looped(), torch.zeros(2, 4), at=["block", "block@1"], method="sdn")


def test_a_shared_layer_belongs_to_its_first_stage_and_an_unused_one_to_none(looped: MultiExitModel) -> None:
    stages = stages_of(looped)
    assert [len(parameters) for parameters in stages.parameters] == [2, 0, 2]
    assert sorted(stages.shared) == ["block.0.bias", "block.0.weight"]


# phases as data ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 60))
def test_epochs_are_divided_by_share(shares: list[int], extra: int) -> None:
    phases = [Phase((0,), share=share) for share in shares]
    epochs = len(shares) * max(shares) + extra
    lengths = epochs_of(phases, epochs)
    assert sum(lengths) == epochs
    assert all(
        abs(length - epochs * share / sum(shares)) < 1 + 1e-9 for length, share in zip(lengths, shares, strict=True)
    )


def test_a_users_own_phases(ee: MultiExitModel, loader: Loaders) -> None:
    """The paper's phases 1 and 3: first the backbone by its own loss, then the exits on it, frozen."""
    own = (Phase((3,), (0, 1, 2, 3)), Phase((0, 1, 2), share=2))
    history = trainer(ee, own, epochs=3).fit(loader())
    assert [record.exits for record in history] == [(3,), (0, 1, 2), (0, 1, 2)]


def test_each_phase_learns_at_its_own_rate(ee: MultiExitModel, loader: Loaders) -> None:
    """By plain SGD one step moves a bias by its rate times its gradient, which the first step has the same."""
    batch = [next(iter(loader()))]

    def step(**rates: float) -> Tensor:
        model = copy.deepcopy(ee)
        own = (Phase((3,), (0, 1, 2, 3), **rates), Phase((0, 1, 2), lr=1e-9))
        trainer(model, own, epochs=2, optimizer=torch.optim.SGD).fit(batch)
        return model.backbone.linear.bias.detach() - ee.backbone.linear.bias.detach()  # type: ignore[union-attr,operator]

    usual = step()
    assert usual.abs().max() > 1e-5
    assert torch.allclose(step(lr=0.05), 5 * usual, rtol=1e-2, atol=1e-7)
    assert torch.allclose(step(backbone_lr=0.03), 3 * usual, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"lr": 0.2}, r"made with lr of phases=\[0\.1, None\], this run has \[0\.2, None\]"),
        ({}, "lr of phases=.* has None"),
    ],
)
def test_a_run_goes_on_at_the_rates_of_its_phases_alone(
    ee: MultiExitModel, loader: Loaders, tmp_path: Path, own: dict[str, float], message: str
) -> None:
    def phases(**rates: float) -> tuple[Phase, ...]:
        return (Phase((0,), **rates), Phase((0, 1, 2)))

    trainer(ee, phases(lr=0.1), epochs=2, output_dir=tmp_path).fit(loader())
    assert len(trainer(ee, phases(lr=0.1), epochs=2, output_dir=tmp_path).fit(loader())) == 2
    with pytest.raises(ExitkitError, match=message):
        trainer(ee, phases(**own), epochs=2, output_dir=tmp_path).fit(loader())


@pytest.mark.parametrize(
    ("regime", "message"),
    [
        ("jont", "regime='jont' is unknown. Did you mean 'joint'"),
        ((), "is neither a name"),
        ((1,), "nor a tuple of exitkit"),
        (None, "is neither a name"),
        ((Phase(()),), "phase 1 has no exits"),
        ((Phase(1),), "phase 1 has exits=1; give numbers"),  # type: ignore[arg-type]
        ((Phase((1,), None),), "phase 1 has stages=None; give numbers"),  # type: ignore[arg-type]
        ((Phase((1,), share="x"),), "phase 1: share='x' must be a number greater than 0"),  # type: ignore[arg-type]
        ((Phase((0,), share=0),), "phase 1: share=0 must be a number greater than 0"),
        ((Phase((0,), lr=0),), "phase 1: lr=0 must be a number greater than 0"),
        ((Phase((0,), backbone_lr=0.1),), r"phase 1 sets backbone_lr=0\.1, but freezes the backbone; name the stages"),
        ((Phase((0,)), Phase((4,))), r"phase 2 has exits=\(4,\); give numbers from 0 to 3"),
        ((Phase((1, 0)),), "rising, each once"),
        ((Phase((0,), (1,)),), "trains stage 1 of the backbone, which has no gradient: no exit behind it counts"),
        ((Phase((0, 3)),), "counts exit 3, the backbone's own, but freezes the whole backbone"),
        ((Phase((0,), alternate=(1,)),), r"alternates with exits \(1,\); give some of \(0,\), or None"),
        ((Phase((0,), alternate=()),), r"alternates with exits \(\); give some of \(0,\), or None"),
        ((Phase((0,), alternate=0),), "phase 1 has alternate=0; give numbers"),  # type: ignore[arg-type]
    ],
)
def test_phases_that_cannot_work_are_refused(ee: MultiExitModel, regime: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        Trainer(ee, regime)


def test_more_phases_than_epochs_are_refused(ee: MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="epochs=3 are too few for 4 phases"):
        Trainer(ee, "branch-wise", epochs=3)


def test_a_rate_for_a_frozen_backbone_is_refused(ee: MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"backbone_lr=0\.1 is set, but the regime freezes the backbone"):
        Trainer(ee, backbone_lr=0.1)


def test_a_backbone_that_the_user_froze_is_not_thawed(ee: MultiExitModel, loader: Loaders) -> None:
    ee.backbone.requires_grad_(False)
    with pytest.raises(ExitkitError, match="none of its parameters has requires_grad=True"):
        trainer(ee, "mixed").fit(loader())


# early stopping ------------------------------------------------------------------------------------------------------


class Worsening:
    """Validation labels that are right in the first pass of each phase only."""

    def __init__(self, batches: Any, right: set[int]) -> None:
        self.batches, self.right, self.passes = batches, right, -1

    def __iter__(self) -> Any:
        self.passes += 1
        for images, labels in self.batches:
            yield images, labels if self.passes in self.right else (labels + 1) % 3


def test_the_best_backbone_comes_back_too(ee: MultiExitModel, loader: Loaders) -> None:
    """BatchNorm statistics included."""
    once = copy.deepcopy(ee)
    trainer(once, "mixed", milestones=[]).fit(loader(), loader())
    options = {"epochs": 9, "milestones": [], "patience": 2}
    history = trainer(ee, "mixed", **options).fit(loader(), Worsening(loader(), {0}))
    assert len(history) == 3
    for name, value in ee.state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name


def test_each_phase_stops_early_by_itself(ee: MultiExitModel, loader: Loaders) -> None:
    options = {"epochs": 40, "milestones": [], "patience": 1}
    history = trainer(ee, "branch-wise", **options).fit(loader(32), Worsening(loader(32), {0, 2, 4, 6}))
    assert [record.phase for record in history] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_patience_in_steps_ends_within_an_epoch(ee: MultiExitModel, loader: Loaders) -> None:
    """Looks after steps 2 and 4 of 6; only the first is an improvement, so that two steps' weights come back."""
    once = copy.deepcopy(ee)
    trainer(once, "mixed", milestones=[]).fit(list(loader())[:2])
    options = {"epochs": 9, "milestones": [], "patience": 1, "validate_steps": 2}
    history = trainer(ee, "mixed", **options).fit(list(loader()), Worsening(loader(), {0}))
    assert len(history) == 1
    for name, value in ee.state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name


def test_patience_in_steps_is_in_epochs_where_these_are_shorter(ee: MultiExitModel, loader: Loaders) -> None:
    options = {"epochs": 9, "milestones": [], "patience": 2, "validate_steps": 300}
    assert len(trainer(ee, "mixed", **options).fit(list(loader()), Worsening(loader(), {0}))) == 3


def test_each_phase_counts_its_own_steps(ee: MultiExitModel, loader: Loaders) -> None:
    """Looks after steps 4 and 8, of 6 an epoch, in the first phase and again in the second."""
    options = {"epochs": 8, "milestones": [], "patience": 1, "validate_steps": 4}
    phases = (Phase((LAST,), tuple(range(LAST + 1))), Phase(tuple(range(LAST))))
    history = trainer(ee, phases, **options).fit(list(loader()), Worsening(loader(), {0, 4}))
    assert [record.phase for record in history] == [0, 0, 1, 1]


def test_how_often_patience_looks_needs_patience(ee: MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match="validate_steps=300 says how often patience looks, but patience=None"):
        Trainer(ee, validate_steps=300)


def test_a_phase_in_which_the_user_froze_everything_is_refused(ee: MultiExitModel, loader: Loaders) -> None:
    """Before the first phase, and not after hours of the others."""
    for part in (ee.backbone.blocks[3], ee.backbone.linear):
        part.requires_grad_(False)
    steps: list[Any] = []
    ee.classifiers[0].register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(
        ExitkitError, match=r"phase 4 trains stages \[3\] of the backbone alone, but none of their param"
    ):
        trainer(ee, "branch-wise", epochs=4).fit(loader(16))
    assert not steps
