"""Criteria: every one of them, and a user's own, everywhere a sample may leave; and confidences next to 1."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import exitkit
from exitkit import ExitkitError, ExitOutputs, choose_threshold
from exitkit.cli.recipes.recipe import Recipe
from exitkit.common.errors import ArgumentError
from exitkit.evaluation import RegressionOutputs, ShiftMonitor, per_exit_thresholds, threshold_path
from exitkit.methods.criteria import Confidence, Criterion, Margin, Memory, Tolerance, as_criterion
from exitkit.methods.policy import ExitPolicy
from tests.toy import TinyNet, images, noisy

# a user's own criterion ----------------------------------------------------------------------------------------------


class Product(Criterion):
    """How unlikely it is that all exits so far are wrong: 1 − ∏ (1 − confidence), and how many there were."""

    kind = "product"
    memory = ("doubt", "count")

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        doubt = 1 - answer.double().softmax(-1).amax(-1)
        count = torch.ones_like(doubt)
        if memory:
            doubt, count = doubt * memory[0], memory[1] + 1
        return 1 - doubt, (doubt, count)


def product_by_hand(log_probs: Tensor) -> list[list[float]]:
    """(N, M+1) scores, sample by sample."""
    rows = []
    for sample in log_probs.double().exp().tolist():
        doubt, scores = 1.0, []
        for answer in sample:
            doubt *= 1 - max(answer) / sum(answer)
            scores.append(1 - doubt)
        rows.append(scores)
    return rows


def exits_by_hand(scores: list[list[float]], tau: float) -> list[int]:
    return [next((m for m, score in enumerate(row[:-1]) if score > tau), len(row) - 1) for row in scores]


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), method=exitkit.SDN(criterion=Product()), head="1L"))


@pytest.fixture(scope="module")
def outputs(ee: exitkit.MultiExitModel) -> ExitOutputs:
    return exitkit.collect(ee, [images(300)]).against_backbone()


@pytest.fixture(scope="module")
def tau(outputs: ExitOutputs) -> float:
    return clear_threshold(product_by_hand(outputs.log_probs))


def clear_threshold(scores: list[list[float]]) -> float:
    """Between two scores that are not close, with samples that leave everywhere."""
    flat = sorted({score for row in scores for score in row[:-1]})
    middles = [(low + high) / 2 for low, high in pairwise(flat) if high - low > 1e-5]

    def fewest(tau: float) -> int:
        exits = exits_by_hand(scores, tau)
        return min(exits.count(m) for m in range(len(scores[0])))

    found = max(middles, key=fewest)
    assert fewest(found) > len(scores) / 50
    return found


def test_a_criterion_of_ones_own_scores_as_it_says(outputs: ExitOutputs) -> None:
    assert outputs.criterion == "product"
    assert outputs.scores() == pytest.approx(np.array(product_by_hand(outputs.log_probs)), abs=1e-12)
    assert outputs.scores("product").tolist() == outputs.scores(Product()).tolist()


def test_a_criterion_of_ones_own_has_a_curve(outputs: ExitOutputs, tau: float) -> None:
    scores = product_by_hand(outputs.log_probs)
    exits = exits_by_hand(scores, tau)
    assert len(set(exits)) == 4
    assert outputs.exits_at(tau).tolist() == exits
    point = outputs.curve().at_threshold(tau)
    right = outputs.correct.numpy()[np.arange(300), exits]
    assert (point.accuracy, point.cost) == pytest.approx((right.mean(), outputs.costs[exits].mean()))
    assert per_exit_thresholds(outputs, 0.7).policy.criterion == "product"
    assert threshold_path(outputs).criterion == "product"


def test_a_threshold_is_chosen_for_a_criterion_of_ones_own(outputs: ExitOutputs) -> None:
    chosen = choose_threshold(outputs, 0.3)
    assert (chosen.criterion, chosen.found) == ("product", True)
    exits = exits_by_hand(product_by_hand(outputs.log_probs), float(chosen.threshold))  # type: ignore[arg-type]
    assert chosen.cost == pytest.approx(outputs.costs[exits].mean())
    assert chosen.cost < outputs.costs[-1]


def test_the_engine_takes_a_criterion_of_ones_own(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, tau: float
) -> None:
    exits = exits_by_hand(product_by_hand(outputs.log_probs), tau)
    engine = exitkit.compile(ee, 5.0).at(tau)
    monitor = ShiftMonitor(outputs, tau)
    for one in (engine, exitkit.compile(ee, tau, samples=images(16)), engine.watched(monitor)):
        assert one.criterion == "product"
        assert one(images(300)).exit.tolist() == exits
        assert [int(one(row).exit) for row in images(300)[:20].split(1)] == exits[:20]
        assert next(iter(one.map([images(300)], 7))).exit.tolist() == exits
    assert monitor.report().samples == 300 + 20 + 300


@pytest.mark.parametrize("ending", ["pt2", "onnx.zip", "onnx"])
def test_packages_take_a_criterion_of_ones_own(ending: str, tmp_path: Path) -> None:
    if ending.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), every=1, method="sdn", head="1L"))
    outputs = exitkit.collect(ee, [images(60)])
    scores = product_by_hand(outputs.log_probs)
    tau = clear_threshold(scores)
    exits = exits_by_hand(scores, tau)
    exitkit.export(ee, tmp_path / f"model.{ending}", tau, criterion="product")
    loaded = exitkit.load(tmp_path / f"model.{ending}")
    assert loaded.policy.criterion == "product"
    prediction = loaded(images(60))
    assert prediction.exit.tolist() == exits
    left = [row[exit_] for row, exit_ in zip(scores, exits, strict=True)]
    assert prediction.score.tolist() == pytest.approx(left, abs=1e-5)


def test_saved_exits_and_recipes_take_a_criterion_of_ones_own(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, tau: float, tmp_path: Path
) -> None:
    assert exitkit.Method("mine", criterion="product") == exitkit.Method("mine", criterion=Product())
    recipe = Recipe("tests.toy:net", "data.npz", exits={"method": {"name": "sdn", "criterion": "product"}})
    assert recipe.make_method() == ee.method
    ee.save_pretrained(tmp_path, threshold=tau, outputs=outputs)
    again = exitkit.MultiExitModel.from_pretrained(ee.backbone, tmp_path, images())
    assert (again.method, again.method.score.kind) == (ee.method, "product")
    exits = exits_by_hand(product_by_hand(outputs.log_probs), tau)
    assert exitkit.compile(again)(images(300)).exit.tolist() == exits
    assert f"| {outputs.at(tau).accuracy:.2%} |" in (tmp_path / "README.md").read_text()


class Spread(Criterion):
    """Minus the distance from the lowest to the highest prediction so far, for regression."""

    kind = "spread"
    regression = True
    memory = ("low", "high")

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        low = high = answer[:, 0].double()
        if not memory:
            return torch.full_like(low, torch.finfo(torch.float32).min), (low, high)
        low, high = torch.minimum(memory[0], low), torch.maximum(memory[1], high)
        return low - high, (low, high)

    def highest(self, exits: int) -> float:
        return 0.0


def test_a_criterion_of_ones_own_for_a_regression() -> None:
    torch.manual_seed(0)
    method = exitkit.Method("mine", criterion="spread")
    ee = noisy(exitkit.attach(TinyNet(1).eval(), images(), method=method))
    outputs = exitkit.collect(ee, [(images(64), torch.randn(64))])
    rows = outputs.predictions.double().tolist()  # type: ignore[attr-defined]
    scores = [[-math.inf if m == 0 else min(row[: m + 1]) - max(row[: m + 1]) for m in range(4)] for row in rows]
    tau = sorted(row[2] for row in scores)[32] - 1e-6
    exits = exits_by_hand(scores, tau)
    assert len(set(exits)) > 1
    assert outputs.exits_at(tau).tolist() == exits
    assert exitkit.compile(ee, tau)(images(64)).exit.tolist() == exits
    assert outputs.curve().at_threshold(tau).cost == pytest.approx(outputs.costs[exits].mean())
    with pytest.raises(ExitkitError, match="criterion='product' is for classes"):
        exitkit.compile(ee, 0.5, criterion="product")


def test_a_name_that_nobody_gave_is_unknown() -> None:
    with pytest.raises(ExitkitError, match=r"criterion='produkt' is unknown.*Did you mean 'product'"):
        exitkit.SDN(criterion="produkt")


# thresholds are searched where the scores are ------------------------------------------------------------------------


def skilled(samples: int = 3_000, criterion: str = "confidence") -> ExitOutputs:
    """Four classes; exits of rising skill, whose surest answers are right as the backbone's."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 4
    hard = torch.rand(samples, generator=generator) < 0.3
    logits = torch.randn(samples, 4, 4, generator=generator)
    skill = torch.where(hard[:, None], torch.tensor([0.0, 0.5, 1.0, 9.0]), torch.tensor([12.0, 12.0, 12.0, 12.0]))
    logits[torch.arange(samples), :, labels] += skill
    return ExitOutputs(logits, labels, [1, 2, 3, 4], 4.0, criterion)


@pytest.mark.parametrize("criterion", ["entropy", "nats", "margin", "product"])
def test_a_threshold_is_found_for_every_criterion(criterion: str) -> None:
    """Scores that order the samples alike save alike: nats are ln C times entropy less 1, and all save most of the cost."""
    sure, other = choose_threshold(skilled(), 0.02), choose_threshold(skilled(criterion=criterion), 0.02)
    assert sure.cost is not None
    assert sure.cost < 0.6
    assert other.found
    assert other.cost == pytest.approx(sure.cost, abs=0.05)
    assert skilled().at(other).cost == pytest.approx(other.cost)
    assert skilled().accuracy()[-1] - skilled().at(other).accuracy < 0.02


def test_nats_and_entropy_are_one_order_of_samples() -> None:
    nats, entropy = (choose_threshold(skilled(criterion=name), 0.02) for name in ("nats", "entropy"))
    assert nats.cost == pytest.approx(entropy.cost, abs=1e-3)
    assert nats.thresholds[0] / math.log(4) + 1 == pytest.approx(entropy.thresholds[0], abs=0.01)


def test_a_branchynet_with_nats_gets_a_threshold() -> None:
    """Its default criterion: one that finds nothing is of no use."""
    torch.manual_seed(0)
    net = TinyNet().eval()
    found = {}
    for nats in (True, False):
        ee = exitkit.attach(net, images(), method=exitkit.BranchyNet(nats=nats), head="conv")
        torch.manual_seed(0)
        ee = noisy(ee)
        found[nats] = choose_threshold(exitkit.collect(ee, [images(600)]), 0.4, risk="disagreement")
    assert [one.criterion for one in found.values()] == ["nats", "entropy"]
    assert found[True].cost is not None
    assert found[True].cost < 0.95
    assert found[True].cost == pytest.approx(found[False].cost, abs=0.02)


@pytest.mark.parametrize("max_drop", [0.02, 0.3])
def test_patience_is_found_among_its_counts(max_drop: float) -> None:
    outputs = skilled(criterion="patience")
    chosen = choose_threshold(outputs, max_drop)
    costs = {tau: outputs.at(tau).cost for tau in (0.0, 1.0, 2.0, 3.0)}
    drops = {tau: outputs.accuracy()[-1] - outputs.at(tau).accuracy for tau in costs}
    assert chosen.threshold in costs
    assert chosen.cost == costs[chosen.threshold]  # type: ignore[index]
    assert all(drops[tau] > max_drop * 0.5 for tau in costs if costs[tau] < chosen.cost)
    assert (chosen.cost < 1) == (max_drop == 0.3 or drops[2.0] < 0.01)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_a_threshold_is_found_for_a_regression_in_any_unit(scale: float) -> None:
    """Half of the predictions stand still after exit 1 but for a thousandth; the others go on by tenths."""
    generator = torch.Generator().manual_seed(0)
    start, moves = torch.rand(2, 2_000, generator=generator)
    still = torch.arange(2_000) % 2 == 0
    steps = torch.where(still, 0.001 * moves, 0.2 + moves)
    predictions = scale * (start[:, None] + steps[:, None] * torch.arange(4.0))
    outputs = RegressionOutputs(predictions, predictions[:, -1] + 0, [1, 2, 3, 4], 4.0)

    def far(outputs: ExitOutputs) -> Tensor:
        """Whether an exit's prediction is more than 5% of the scale from the full model's."""
        values = outputs.log_probs[:, :, 0]
        return (values - values[:, -1:]).abs() > 0.05 * scale

    chosen = choose_threshold(outputs, 0.05, risk=far)
    assert (chosen.criterion, chosen.found) == ("tolerance", True)
    assert outputs.exits_at(chosen)[still.numpy()].tolist() == [1] * 1_000
    assert chosen.cost == pytest.approx((2 + 4) / 2 / 4, abs=0.05)


# confidences next to 1 -----------------------------------------------------------------------------------------------


def test_confidences_that_float32_cannot_tell_apart_are_told_apart() -> None:
    """Log-odds of 20 and 25 are 1 − 2e-9 and 1 − 1.4e-11: both 1 in float32."""
    logits = torch.tensor([[[20.0, 0.0], [9.0, 0.0]], [[25.0, 0.0], [9.0, 0.0]]])
    assert logits.softmax(-1)[:, 0].amax(-1).tolist() == [1.0, 1.0]
    outputs = ExitOutputs(logits, torch.zeros(2).long(), [1, 2], 2.0)
    scores = outputs.scores()
    assert scores.dtype == torch.float64
    assert (1 - scores[:, 0]).tolist() == pytest.approx([math.exp(-20), math.exp(-25)], rel=1e-4)
    assert outputs.curve().cost.tolist() == [0.5, 0.75, 1.0]
    point = outputs.curve().at_budget(0.8)
    assert outputs.exits_at(point).tolist() == [1, 0]
    assert outputs.exits_at(float(scores[0, 0])).tolist() == [1, 0]


class Sure(torch.nn.Module):
    """A linear model whose first exit's logits are (mean · 10, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        self.classify = torch.nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(torch.relu(self.second(torch.relu(self.first(x)))))
        return logits


@pytest.fixture(scope="module")
def sure() -> exitkit.MultiExitModel:
    """Its exit's log-odds are ten times the input, exactly."""
    torch.manual_seed(0)
    ee = exitkit.attach(Sure().eval(), torch.randn(2, 1), every=1, method="sdn", head="1L").eval()
    with torch.no_grad():
        for parameter in [*ee.backbone.parameters(), *ee.classifiers.parameters()]:
            parameter.zero_()
        ee.backbone.first.weight.fill_(1.0)  # type: ignore[union-attr]
        (weight,) = (one for name, one in ee.classifiers.named_parameters() if one.shape == (2, 1))
        weight[0] = 10.0
    return ee


@pytest.mark.parametrize("ending", ["eager", "timed", "compiled", "pt2", "onnx.zip", "onnx"])
def test_the_engine_tells_confidences_next_to_one_apart_as_the_curve_does(
    sure: exitkit.MultiExitModel, ending: str, tmp_path: Path
) -> None:
    if ending.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    odds = torch.tensor([[2.0], [2.5], [2.2], [0.3], [2.4], [1.8]])
    outputs = exitkit.collect(sure, [odds]).against_backbone()
    assert (1 - outputs.scores()[:, 0]).tolist() == pytest.approx([1 / (1 + math.exp(10 * x)) for x in odds], rel=1e-4)
    tau = 1 - 1 / (1 + math.exp(23))
    assert np.float32(tau) == 1.0
    policy = outputs.curve().at_threshold(tau).policy
    if ending in ("eager", "timed", "compiled"):
        options: dict[str, Any] = {"timed": {"samples": odds}, "compiled": {"optimize": True}}.get(ending, {})
        engine: Any = exitkit.compile(sure, policy, **options)
    else:
        exitkit.export(sure, tmp_path / f"model.{ending}", policy)
        engine = exitkit.load(tmp_path / f"model.{ending}")
    expected = [1, 0, 1, 1, 0, 1]
    assert outputs.exits_at(policy).tolist() == expected
    together = engine(odds)
    assert together.exit.tolist() == expected
    assert together.score.dtype == torch.float64
    assert [int(engine(row).exit) for row in odds.split(1)] == expected
    assert [float(engine(row).score) for row in odds.split(1)] == together.score.tolist()
    if isinstance(engine, exitkit.Engine):
        assert next(iter(engine.map([odds], 4))).exit.tolist() == expected


# what a criterion's name holds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power(Criterion):
    """The sum of the probabilities' p-th powers."""

    p: float = 2.0
    scale: float = 1.0

    kind = "power"

    def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return self.scale * answer.double().softmax(-1).pow(self.p).sum(-1), ()


FOUR = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
"""One sample, one exit: 0.6² + 0.4² is 0.52, 0.6⁵ + 0.4⁵ is 0.088."""


def test_a_criterion_keeps_its_parameters() -> None:
    outputs = ExitOutputs(FOUR, torch.tensor([0]), [1, 2], 2.0)
    assert outputs.scores(Power())[0, 0] == pytest.approx(0.52)
    assert outputs.scores(Power(5))[0, 0] == pytest.approx(0.6**5 + 0.4**5)
    assert outputs.exits_at(0.3, Power()).tolist() == outputs.exits_at(0.3, "power").tolist() == [0]
    assert outputs.exits_at(0.3, Power(5)).tolist() == outputs.exits_at(0.3, "power-5").tolist() == [1]
    assert outputs.exits_at(0.3, Power(5, 4)).tolist() == [0]
    assert exitkit.Method("mine", criterion=Power(5)).score == Power(5)
    assert outputs.at(0.3, Power(5)).policy.score == Power(5)


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (Power(), "power"),
        (Power(5), "power-5"),
        (Power(5.0, 1.0), "power-5"),
        (Power(2, 0.1), "power-2,0.1"),
        (Power(-1e-9), "power--1e-09"),
        (Tolerance(), "tolerance"),
        (Tolerance(3), "tolerance-3"),
    ],
)
def test_a_name_holds_what_differs_from_the_defaults(criterion: Criterion, name: str) -> None:
    assert criterion.name == name
    assert as_criterion(name) == criterion
    assert as_criterion(criterion) is criterion


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("power-1,2,3", "takes 2 parameters, not 3"),
        ('power-"x"', "p='x' must be a number"),
        ("power-0x1", "cannot be made"),
        ("power-1e999", "not a finite number"),
        ("tolerance-0", "times=0 must be a whole number"),
        ("tolerance-1.5", "times=1.5 must be a whole number"),
        ("confidence-2", "takes 0 parameters, not 1"),
        ("tolerance-" + "9" * 5000, "too large a whole number"),
        ("power-" + "[" * 100_000, "too deep"),
    ],
)
def test_parameters_that_a_criterion_does_not_take(name: str, fault: str) -> None:
    with pytest.raises(ArgumentError, match=fault) as caught:
        as_criterion(name)
    assert len(str(caught.value)) < 500


class Biased(Criterion):
    """Its parameter is not in its name."""

    kind = "biased"

    def __init__(self, bias: Any = 0.0) -> None:
        self.bias = bias


@pytest.mark.parametrize("criterion", [Biased(0.5), Biased(torch.ones(2)), Power(torch.ones(2)), Power(float("nan"))])  # type: ignore[arg-type]
def test_a_criterion_that_its_name_does_not_make_again_is_refused(criterion: Criterion) -> None:
    for use in (as_criterion, lambda one: exitkit.Method("mine", criterion=one), lambda one: ExitPolicy((0.5,), one)):
        with pytest.raises(ArgumentError, match=r"cannot be made again from its name.*frozen dataclass"):
            use(criterion)
    assert as_criterion(Biased()).name == "biased"


def test_every_criterion_has_a_kind_of_its_own() -> None:
    with pytest.raises(ArgumentError, match=r"Sub\.kind=None must be a name of its own"):
        type("Sub", (Margin,), {})
    with pytest.raises(
        ArgumentError, match=r"Mine\.kind='confidence' is the kind of exitkit.*Confidence; choose another"
    ):
        type("Mine", (Criterion,), {"kind": "confidence"})
    for kind in ("", "power-2", "a b", 5):
        with pytest.raises(ArgumentError, match=r"Mine\.kind=.* must be a name of its own"):
            type("Mine", (Criterion,), {"kind": kind})
    assert as_criterion("margin").name == "margin"
    assert type(as_criterion("confidence")) is Confidence


def test_a_criterion_derived_from_another_is_found_by_its_kind() -> None:
    class Halved(Margin):
        kind = "halved"

        def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
            return super().step(answer, memory)[0] / 2, ()

    assert ExitPolicy((0.5,), Halved()).score.score(FOUR)[0].tolist() == pytest.approx([0.1, 0.4])  # type: ignore[arg-type]


def test_a_class_that_is_run_again_replaces_itself() -> None:
    def cell(value: float) -> Criterion:
        class Again(Criterion):
            kind = "again"

            def step(self, answer: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
                return torch.full_like(answer[:, 0].double(), value), ()

        return Again()

    older = cell(1.0)
    assert as_criterion("again").score(FOUR).tolist() == [[1.0, 1.0]]
    newer = cell(2.0)
    assert as_criterion("again").score(FOUR).tolist() == as_criterion(newer).score(FOUR).tolist() == [[2.0, 2.0]]
    with pytest.raises(ArgumentError, match="in a notebook, make it anew"):
        as_criterion(older)


# a criterion that is not imported ------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
import torch
import exitkit
from exitkit.common.errors import FileError
from tests.toy import TinyNet, images
folder = sys.argv[1]
"""


def elsewhere(code: str, folder: Path) -> str:
    """What a process prints in which these tests' criteria are not defined."""
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ending", ["pt2", "onnx.zip", "onnx"])
def test_a_package_runs_where_its_criterion_is_not_imported(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, tau: float, ending: str, tmp_path: Path
) -> None:
    if ending.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"model.{ending}"
    exitkit.export(ee, path, tau)
    torch.save(images(300)[:60].clone(), tmp_path / "images.pt")
    code = f"""
engine = exitkit.load(folder + "/model.{ending}")
print(engine.policy.criterion, *engine(torch.load(folder + "/images.pt")).exit.tolist())
try:
    engine.policy.score
except exitkit.ExitkitError as error:
    print(error)
if hasattr(engine, "at"):
    print(engine.at(2.0).policy.criterion)
"""
    first, error, *rest = elsewhere(code, tmp_path).splitlines()
    exits = exits_by_hand(product_by_hand(outputs.log_probs), tau)[:60]
    assert first.split() == ["product", *map(str, exits)]
    assert error.endswith("If it is your own, import the module that defines it first.")
    assert rest == (["product"] if ending != "onnx" else [])


def test_saved_files_say_to_import_their_criterion(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, tau: float, tmp_path: Path
) -> None:
    ee.save_pretrained(tmp_path / "saved", threshold=tau)
    outputs.save(tmp_path / "outputs.safetensors")
    torch.save(ee.backbone.state_dict(), tmp_path / "backbone.pt")
    code = """
net = TinyNet().eval()
net.load_state_dict(torch.load(folder + "/backbone.pt"))
for read in (
    lambda: exitkit.MultiExitModel.from_pretrained(net, folder + "/saved", images()),
    lambda: exitkit.ExitOutputs.load(folder + "/outputs.safetensors"),
):
    try:
        read()
    except exitkit.ExitkitError as error:
        print("file" if isinstance(error, FileError) else "argument", error)
"""
    lines = elsewhere(code, tmp_path).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("argument ")
        assert "criterion='product' is unknown." in line
        assert line.endswith("If it is your own, import the module that defines it first.")
