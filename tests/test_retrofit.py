"""``exitkit.retrofit``: each stage against brute force, the whole on small models, killed runs, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate

import exitkit
from exitkit import ExitOutputs
from exitkit.calibration.risks import as_risk
from exitkit.common.errors import ArgumentError
from exitkit.retrofitting.alternatives import Alternative, weighed
from exitkit.retrofitting.candidates import GRIDS, propose
from exitkit.retrofitting.choice import Answers, cheapest, cost_at_price
from exitkit.retrofitting.finishing import linked_from
from exitkit.retrofitting.prices import in_time
from exitkit.retrofitting.rounds import BUDGETS
from exitkit.retrofitting.samples import Data, held_out, part_of
from exitkit.retrofitting.verdict import decide
from exitkit.surgery.capturing import capture

CLASSES = 4


class Block(nn.Module):
    """A residual block of two weighted layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Vectors (B, 16) → logits (B, 4) through residual blocks."""

    def __init__(self, blocks: int = 6, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


def easy(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes that one linear layer tells apart, but for a few samples between them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = 3 * F.one_hot(labels, 16).float()
    return centres + 0.8 * torch.randn(count, 16, generator=generator), labels


def learned(model: nn.Module, samples: tuple[Tensor, Tensor], steps: int = 300) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(samples[1]), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(samples[0][rows]), samples[1][rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return learned(Net(), easy(2_000, 1))


def loaders(count: int = 600, calibration: int = 800) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(TensorDataset(*easy(count, 2)), 32, shuffle=True)
    return train, DataLoader(TensorDataset(*easy(calibration, 3)), 200)


def quick(model: nn.Module, train: Any, calibration: Any, **options: Any) -> exitkit.Retrofit:
    given: dict[str, Any] = {"max_drop": 0.03, "effort": "quick", "optimize": False, "show_progress": False}
    return exitkit.retrofit(model, train, calibration, **given | options)


# --- the choice ------------------------------------------------------------------------------------------------------------


def random_answers(seed: int, candidates: int = 4, samples: int = 60) -> Answers:
    generator = np.random.default_rng(seed)
    scores = generator.integers(1, 8, (samples, candidates)) / 8  # ties too
    losses = (generator.random((samples, candidates + 1)) < 0.2).astype(float)
    losses[:, -1] = 0
    places = [*range(candidates - 1), candidates - 2]  # two heads at the last boundary
    until = np.linspace(0.1, 0.7, candidates)
    until[-1] = until[-2]
    return Answers(scores, losses, places, until, generator.uniform(0, 0.1, candidates))


def by_hand(answers: Answers, exits: tuple[int, ...], tau: float) -> tuple[float, float]:
    """Average cost and loss of a set at a τ, sample by sample."""
    cost = loss = 0.0
    for scores, losses in zip(answers.scores, answers.losses, strict=True):
        passed = 0.0
        for k in exits:
            passed += answers.heads[k]
            if scores[k] > tau:
                cost, loss = cost + answers.until[k] + passed, loss + losses[k]
                break
        else:
            cost, loss = cost + 1 + passed, loss + losses[-1]
    return cost / len(answers.scores), loss / len(answers.scores)


def brute_force(answers: Answers, limit: float, most: int) -> float:
    """The least cost over all subsets, walking every τ from the strictest on until the first above the limit."""
    best = 1.0
    taus = [2.0, *sorted(set(answers.scores.ravel()), reverse=True), -1.0]
    for count in range(1, most + 1):
        for exits in itertools.combinations(range(len(answers.places)), count):
            if len({answers.places[k] for k in exits}) < count:
                continue
            found = 1 + sum(answers.heads[k] for k in exits)
            for tau in taus:
                cost, loss = by_hand(answers, exits, tau)
                if loss > limit + 1e-12:
                    break
                found = cost
            best = min(best, found)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0.0, 0.05, 0.12, 0.5])
def test_the_choice_is_the_best_of_all_subsets_and_thresholds(seed: int, limit: float) -> None:
    answers = random_answers(seed)
    choice = cheapest(answers, limit, most=3)
    assert choice.cost == pytest.approx(brute_force(answers, limit, 3))
    assert by_hand(answers, choice.exits, choice.threshold) == pytest.approx((choice.cost, choice.risk))
    assert choice.risk <= limit + 1e-12
    assert len({answers.places[k] for k in choice.exits}) == len(choice.exits)


@pytest.mark.parametrize("price", [1.0, 10.0])
def test_the_cost_at_a_price_is_the_least_over_all_thresholds(price: float) -> None:
    answers = random_answers(7)
    for candidate in range(len(answers.places)):
        taus = [2.0, *answers.scores[:, candidate], -1.0]
        spent = [by_hand(answers, (candidate,), tau) for tau in taus]
        least = min(cost + price * loss for cost, loss in spent)
        assert cost_at_price(answers, candidate, price) == pytest.approx(least)


# --- samples ---------------------------------------------------------------------------------------------------------------


def rows_of(loader: Any) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for batch in loader for row in batch[0].tolist())


def test_held_out_samples_and_those_learned_from_are_all_and_apart() -> None:
    train, _ = loaders()
    split = held_out(train, None, seed=0)
    learned_from, chosen_on = rows_of(split.train), rows_of(split.search)
    assert sorted(learned_from + chosen_on) == rows_of(train)
    assert not set(learned_from) & set(chosen_on)
    assert split.samples == len(learned_from) == 480
    assert rows_of(held_out(train, None, seed=0).search) == chosen_on
    assert rows_of(held_out(train, None, seed=1).search) != chosen_on


def test_a_list_of_batches_is_divided_by_batches() -> None:
    batches = list(loaders()[0])
    split = held_out(batches, None, seed=0)
    assert sorted(rows_of(split.train) + rows_of(split.search)) == rows_of(batches)
    assert len(list(split.search)) == 4


def test_a_part_is_the_same_samples_in_every_pass() -> None:
    train, _ = loaders()
    part = part_of(train, 0.25)
    assert rows_of(part) == rows_of(part)
    assert len(rows_of(part)) == 128
    assert set(rows_of(part)) < set(rows_of(train))


def test_the_limit_is_what_the_test_of_the_promise_passes_half_of_the_time() -> None:
    train, calibration = loaders()
    data = Data.read(train, calibration, None, max_drop=0.03, confidence=0.95, seed=0)
    limit = data.limit(0.03)
    allowed = max(k for k in range(100) if binom.cdf(k, 800, 0.03) <= 0.05)
    assert binom.cdf(allowed, 800, limit) == pytest.approx(0.5, abs=0.05)


# --- candidates ------------------------------------------------------------------------------------------------------------


def test_candidates_cost_what_their_layers_cost_and_leave_something_to_save(net: nn.Module) -> None:
    captured = capture(net, torch.zeros(2, 16))
    pool, places = propose(captured, ["1L", "2L-8"], None, GRIDS["standard"], seed=0)
    whole = 16 * 32 + 6 * 2 * 32 * 32 + 32 * CLASSES
    assert pool.anatomy.macs == whole
    for place in places:
        number = int(place.boundary.name.rpartition(".")[2])
        until = 16 * 32 + (number + 1) * 2 * 32 * 32
        head = 32 * CLASSES if place.head == "1L" else 32 * 8 + 8 * CLASSES
        assert (place.boundary.macs, place.macs) == (until, head)
        assert (until + head) / whole <= 0.75
    assert {place.head for place in places} == {"1L", "2L-8"}


def test_several_candidates_at_one_boundary_answer_as_each_alone(net: nn.Module) -> None:
    pool, places = propose(
        capture(net, torch.zeros(2, 16)), ["1L", "2L-8"], ["blocks.0", "blocks.2"], GRIDS["standard"], seed=0
    )
    inputs = easy(5, 4)[0]
    together = pool.eval()(inputs)
    for k, place in enumerate(places):
        alone = pool.prune_exits(set(range(len(places))) - {k})
        assert alone.boundaries[0].name == place.boundary.name
        assert torch.equal(alone(inputs).logits[0], together.logits[k])
    assert torch.equal(together.logits[-1], net(inputs))


# --- the whole -------------------------------------------------------------------------------------------------------------


def test_exits_are_found_promised_and_exported_where_they_pay(net: nn.Module, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train, calibration = loaders()
    result = quick(net, train, calibration)
    assert result.model is not None
    assert result.policy is not None
    guarantee = result.policy.guarantee
    assert guarantee is not None
    assert guarantee.found
    assert (guarantee.max_drop, guarantee.samples) == (0.03, 800)
    assert 1 - guarantee.cost > 0.4, "classes that one layer tells apart"
    assert result.epochs <= BUDGETS["quick"] + 1e-9
    assert [one.dropped for one in result.chosen] == [None] * len(result.chosen)
    assert 1 <= len(result.chosen) <= 3

    inputs, labels = easy(4_000, 5)
    answered = exitkit.compile(result.model, result.policy)(inputs).logits.argmax(1)
    right = net(inputs).argmax(1) == labels
    assert float((right & (answered != labels)).double().mean()) <= 0.03
    result.export(tmp_path / "model.pt2")
    assert torch.equal(exitkit.load(tmp_path / "model.pt2", trust=True)(inputs).logits.argmax(1), answered)
    result.save(tmp_path / "found")
    kept = json.loads((tmp_path / "found" / "retrofit.json").read_text())
    assert (kept["verdict"], kept["instead"], kept["reason"]) == (result.verdict, None, result.reason)
    again = exitkit.MultiExitModel.from_pretrained(net, tmp_path / "found" / "exits", torch.zeros(2, 16))
    assert again.policy == result.policy
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


def test_the_same_call_gives_the_same(net: nn.Module) -> None:
    train, calibration = loaders(400, 400)
    options: dict[str, Any] = {"heads": ["1L", "2L-8"], "boundaries": ["blocks.0", "blocks.2"], "seed": 3}
    first, second = (quick(net, train, calibration, **options) for _ in range(2))
    assert first.policy == second.policy
    assert first.candidates == second.candidates
    other = quick(net, train, calibration, **options | {"seed": 4})
    assert other.candidates != first.candidates


def test_without_labels_exits_imitate_and_the_promise_is_about_disagreement(net: nn.Module) -> None:
    train, calibration = loaders()
    inputs = [[batch[0]] for batch in train]
    result = quick(net, inputs, [[batch[0]] for batch in calibration])
    assert result.policy is not None
    assert result.policy.guarantee is not None
    assert result.policy.guarantee.risk == "disagreement"
    assert result.accuracy is None
    assert result.model is not None
    fresh = easy(4_000, 5)[0]
    answered = exitkit.compile(result.model, result.policy)(fresh).logits.argmax(1)
    assert float((answered != net(fresh).argmax(1)).double().mean()) <= 0.03


class KnowsAtTheEnd(nn.Module):
    """Four blocks that say nothing of the class; the last layer is told by a part of the input that they hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))
        self.head = nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(16))
            self.stem.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        # the class is the parity of two signs, which no linear head reads off, and the last layer is told it
        state = self.blocks(self.stem(x))
        bits = (state[:, :4].sign() * state[:, 4:8].sign() > 0).float()
        return self.head(state * 0) + 8 * bits.cumsum(1)


def test_a_backbone_that_knows_at_its_end_alone_is_shipped_itself() -> None:
    torch.manual_seed(0)
    model = KnowsAtTheEnd().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.second.weight.zero_()  # type: ignore[union-attr]
            block.second.bias.zero_()  # type: ignore[union-attr]
        inputs = torch.randn(1_200, 16)
        labels = model(inputs).argmax(1)
    train = DataLoader(TensorDataset(inputs[:400], labels[:400]), 32, shuffle=True)
    calibration = DataLoader(TensorDataset(inputs[400:], labels[400:]), 200)
    result = quick(model, train, calibration, max_drop=0.01, heads=["1L"])
    assert result.verdict == "backbone"
    assert "ship the backbone" in result.reason
    assert result.cost == 1
    if result.policy is None:
        assert result.engine is None
        with pytest.raises(ArgumentError, match=r"verdict is 'backbone'.*ship the model itself"):
            result.export("model.pt2")


def losing(lost: int, samples: int, copies: int = 1) -> ExitOutputs:
    """A small network before a backbone that is always right; it is as sure of all, and wrong about ``lost`` samples."""
    first = torch.where(torch.arange(samples) < lost, -2.0, 2.0)
    logits = torch.stack([torch.stack([first, -first], 1), torch.tensor([[9.0, 0.0]]).repeat(samples, 1)], 1)
    hashes = torch.arange(samples).repeat(copies)
    labels = torch.zeros(samples * copies).long()
    return ExitOutputs(logits.repeat(copies, 1, 1), labels, [1.0, 11.0], 10.0, hashes=hashes)


@pytest.mark.parametrize(("number", "lost"), [(1, 6), (10, 3)])
def test_the_promise_holds_for_the_luckiest_of_several_alternatives(number: int, lost: int) -> None:
    """Ten networks that each break it pass at 0.5% each, and so one of them or more at 5%."""
    assert binom.cdf(lost, 400, 0.03) <= 0.05 / number < binom.cdf(lost + 1, 400, 0.03)
    data = Data.read(*loaders(), None, max_drop=0.03, confidence=0.95, seed=0, alternatives=number)
    for more in (0, 1):
        alone, both = weighed("small", losing(lost + more, 400), data.risk, 0.03, data.confidence, (1.0, 10.0))
        assert (alone.promised, both.promised) == (not more, not more)
        assert alone.risk == pytest.approx((lost + more) / 400)
        assert both.cost == pytest.approx(1.1 if more else 0.1)


def test_more_alternatives_take_more_samples() -> None:
    """None lost of n: 0.97ⁿ must be at most 5%, of ten networks 0.5% each."""
    train, calibration = loaders(calibration=120)
    assert 0.97**120 <= 0.05 < 0.97**98
    Data.read(train, calibration, None, max_drop=0.03, confidence=0.95, seed=0)
    needed = math.ceil(math.log(0.005) / math.log(0.97))
    with pytest.raises(ArgumentError, match=f"120 samples are too few.*at least {needed} samples"):
        Data.read(train, calibration, None, max_drop=0.03, confidence=0.95, seed=0, alternatives=10)


def test_copies_give_no_alternative_a_promise() -> None:
    with pytest.warns(UserWarning, match="repeat others"):
        alone, both = weighed("small", losing(7, 400, copies=10), as_risk("accuracy_drop"), 0.03, 0.95, (1.0, 10.0))
    assert binom.cdf(70, 4000, 0.03) < 0.05 < binom.cdf(7, 400, 0.03)
    assert not alone.promised
    assert not both.promised


def test_an_alternative_that_keeps_the_promise_for_less_is_named(net: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    small = learned(Net(blocks=1, width=16), easy(2_000, 1))
    train, calibration = loaders()
    shuffled = DataLoader(calibration.dataset, 200, shuffle=True)  # another order in every pass
    result = quick(net, train, shuffled, alternatives={"small": small}, heads=["1L"])
    alone, both = result.alternatives
    assert (alone.name, both.name) == ("small", "small, then the model")
    macs = 16 * 16 + 2 * 16 * 16 + 16 * CLASSES
    whole = 16 * 32 + 6 * 2 * 32 * 32 + 32 * CLASSES
    assert alone.cost == pytest.approx(macs / whole)
    inputs, labels = easy(800, 3)
    right = net(inputs).argmax(1) == labels
    assert alone.risk == pytest.approx(float((right & (small(inputs).argmax(1) != labels)).double().mean()))
    assert alone.promised
    assert both.promised
    assert both.cost >= alone.cost
    told = replace(result, verdict="exits", instead="small")  # which it is depends on the times measured here
    assert told.to_dict()["instead"] == "small"
    told.report(tmp_path / "report.html")
    assert "<title>Retrofit: ship small</title>" in (tmp_path / "report.html").read_text()


def made_up(cost: float, found: bool = True) -> exitkit.ExitPolicy:
    guarantee = exitkit.Guarantee("…", found, "accuracy_drop", "ltt", 0.01, 0.95, 0.004, 1_000, cost, (cost, cost))
    return exitkit.ExitPolicy((0.9,), "confidence", guarantee=guarantee)


@pytest.mark.parametrize(
    ("cost", "found", "milliseconds", "other", "verdict", "instead", "said"),
    [
        (0.4, True, 0.5, None, "exits", None, "saves 60.0% of the MACs and 50.0% of the time"),
        (0.97, True, 1.02, None, "backbone", None, "saves 3.0% of the MACs and costs 2.0% more time"),
        (1.05, False, 0.9, None, "backbone", None, "costs 105.0% of the MACs"),
        (0.4, True, 0.5, (0.3, 0.3, True), "exits", "small", "but small keeps the same promise for 30.0% of the MACs"),
        (0.4, True, 0.5, (0.3, 0.3, False), "exits", None, "ship the exits"),
        (0.4, True, 0.5, (0.3, 0.6, True), "exits", None, "ship the exits"),
        (
            0.97,
            True,
            1.02,
            (0.6, 0.7, True),
            "backbone",
            "small",
            "but small keeps the same promise for 60.0% of the MACs",
        ),
    ],
)
def test_the_verdict_is_exits_only_where_compute_and_time_are_saved(
    cost: float, found: bool, milliseconds: float, other: Any, verdict: str, instead: str | None, said: str
) -> None:
    times = exitkit.retrofitting.Times("cpu", 1, True, 1.0, milliseconds, {})
    others = [] if other is None else [Alternative("small", other[0], 0.0, 0.9, other[2], other[1])]
    decision = decide(made_up(cost, found), times, others)
    assert (decision.verdict, decision.instead) == (verdict, instead)
    assert said in decision.reason


@pytest.mark.parametrize("answers", [[9.0, 0.0], [0.0, 9.0]], ids=["never wrong and dear", "always wrong"])
def test_the_reason_is_what_the_cheapest_guaranteed_policy_costs(answers: list[float]) -> None:
    """With the policies of ``choose_threshold``, for which a threshold that saves nothing is not found."""
    log_probs = torch.tensor([answers, [9.0, 0.0]]).expand(1_000, 2, 2)
    outputs = exitkit.ExitOutputs(log_probs, torch.zeros(1_000, dtype=torch.long), [1.02, 1.1], 1.0)
    policy = exitkit.choose_threshold(outputs, 0.05)
    decision = decide(policy, exitkit.retrofitting.Times("cpu", 1, True, 1.0, 1.0, {}), [])
    costs = "102.0%" if answers[0] else "110.0%"
    assert decision.reason == f"the cheapest policy with a guarantee costs {costs} of the MACs: ship the backbone"


# --- killed and continued --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_retrofit import Net, easy, learned, loaders, quick
torch.manual_seed(0)
net = learned(Net(), easy(2_000, 1))
result = quick(net, *loaders(400, 400), output_dir=sys.argv[1], heads=["1L", "2L-8", "branch-2"])
result.save(sys.argv[2])
"""


def call(directory: Path, out: Path) -> subprocess.Popen[bytes]:
    code = SCRIPT.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(directory), str(out)], env=dict(os.environ)
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    assert call(folder / "search", folder / "found").wait() == 0
    return saved(folder / "found")


def saved(folder: Path) -> bytes:
    """The weights of the exits that were found."""
    (file,) = (folder / "exits").glob("*.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("product", ["search.json", "round-1.safetensors", "finish.safetensors"])
def test_killed_at_any_moment_the_same_call_goes_on_to_the_same(
    product: str, undisturbed: bytes, tmp_path: Path
) -> None:
    run = call(tmp_path / "killed", tmp_path / "never")
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / product).exists():
        assert run.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "never").exists()
    assert call(tmp_path / "killed", tmp_path / "continued").wait() == 0
    assert saved(tmp_path / "continued") == undisturbed


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_calibration_samples_that_were_trained_on_are_refused(net: nn.Module) -> None:
    train, _ = loaders()
    with pytest.raises(
        ArgumentError, match=r"calibration_loader shares 600 of its 600 samples with the training data"
    ):
        quick(net, train, DataLoader(TensorDataset(*easy(600, 2)), 64))


def test_a_few_calibration_samples_that_were_trained_on_are_left_out(net: nn.Module) -> None:
    """Data sets have copies: of SST-2's 67,349 sentences 742 stand there more than once."""
    train, calibration = loaders()
    copied = ConcatDataset([Subset(train.dataset, range(30)), calibration.dataset])
    options: dict[str, Any] = {"heads": ["1L"], "boundaries": ["blocks.1"], "alternatives": {"same": net}}
    with pytest.warns(UserWarning, match=r"calibration_loader shares 30 of its 830 samples .* they are left out"):
        result = quick(net, train, DataLoader(copied, 200, shuffle=True), **options)
    plain = quick(net, train, calibration, **options)
    assert result.policy is not None
    assert result.policy.guarantee is not None
    assert "the 800 calibration samples" in result.policy.guarantee.words
    assert plain.policy is not None
    assert result.policy.thresholds == pytest.approx(plain.policy.thresholds)
    assert (result.policy.cost, result.drop) == (pytest.approx(plain.policy.cost), plain.drop)
    assert [one.accuracy for one in result.alternatives] == [one.accuracy for one in plain.alternatives]


def test_alternatives_are_refused_with_calibration_samples_that_change(net: nn.Module) -> None:
    train, calibration = loaders()

    def augmented(rows: list[Any]) -> Any:
        inputs, labels = default_collate(rows)
        return inputs + 0.01 * torch.randn_like(inputs), labels

    changing = DataLoader(calibration.dataset, 200, collate_fn=augmented)
    with pytest.raises(ArgumentError, match="calibration_loader yields other samples in every pass"):
        quick(net, train, changing, alternatives={"same": net})


def test_too_few_calibration_samples_say_how_many_would_do(net: nn.Module) -> None:
    train, calibration = loaders(calibration=50)
    with pytest.raises(ArgumentError, match=r"too few for max_drop=0.01.*It takes at least 299 samples"):
        quick(net, train, calibration, max_drop=0.01)


def test_a_backbone_no_better_than_chance_is_said_before_anything_is_trained() -> None:
    torch.manual_seed(0)
    train, calibration = loaders()
    with pytest.raises(ArgumentError, match=r"no better than chance on these data"):
        quick(Net().eval(), train, calibration)


def test_calibration_samples_that_the_model_does_not_take_are_named(net: nn.Module) -> None:
    train, _ = loaders()
    x, y = easy(400, 3)
    with pytest.raises(ArgumentError, match=r"^samples of calibration_loader of shapes \{0: \(2, 15\)\} do not run"):
        quick(net, train, [(x[:, :15], y)])


def test_one_class_in_the_labels_is_refused(net: nn.Module) -> None:
    inputs, labels = easy(600, 2)
    train, _ = loaders()
    one = DataLoader(TensorDataset(easy(400, 3)[0], torch.zeros(400, dtype=torch.long)), 64)
    with pytest.raises(ArgumentError, match=r"calibration_loader has one class"):
        quick(net, train, one)
    with pytest.raises(ArgumentError, match=r"train_loader has one class"):
        quick(net, DataLoader(TensorDataset(inputs, labels * 0), 64), loaders()[1])


def test_other_classes_in_an_alternative_and_regression_are_refused(net: nn.Module) -> None:
    train, calibration = loaders()
    with pytest.raises(ArgumentError, match=r"'other' has 7 classes and the model 4"):
        quick(net, train, calibration, alternatives={"other": nn.Linear(16, 7)})
    with pytest.raises(ArgumentError, match=r"1 output, which is regression.*method='pbee'"):
        quick(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 1)), train, calibration)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": 0}, "max_drop=0 must be"),
        ({"confidence": 95}, "confidence=95 must be"),
        ({"effort": "hard"}, "effort='hard' is unknown"),
        ({"cost": "watts"}, "cost='watts' is unknown"),
        ({"heads": ["3L"]}, "head='3L' is unknown"),
        ({"heads": ["1L", "conv"]}, "head='conv'"),  # for maps, and these are vectors
        ({"heads": ["1L", "tests.toy:nothing"]}, "tests.toy:nothing"),
        ({"boundaries": ["nowhere"]}, "nowhere"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"alternatives": ["resnet"]}, "alternatives holds"),
    ],
)
def test_wrong_arguments_are_named(net: nn.Module, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        quick(net, *loaders(), **options)


class Endless:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield easy(32, 2)


def test_an_output_dir_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(exitkit.FileError, match=r"^output_dir='.*below' cannot be written: Not a directory; give one"):
        quick(Net(), [], [], output_dir=tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root every folder is open
    with pytest.raises(exitkit.FileError, match=r"^output_dir='.*' cannot be written: Permission denied; give one"):
        quick(Net(), [], [], output_dir=tmp_path)


def test_loaders_whose_samples_cannot_be_divided_need_a_search_loader(net: nn.Module) -> None:
    _, calibration = loaders()
    with pytest.raises(ArgumentError, match=r"made of a Endless.*search_loader="):
        quick(net, Endless(), calibration)


def test_another_call_in_the_same_folder_is_refused(net: nn.Module, tmp_path: Path) -> None:
    train, calibration = loaders(400, 400)
    options: dict[str, Any] = {"heads": ["1L"], "boundaries": ["blocks.0"], "output_dir": tmp_path}
    quick(net, train, calibration, **options)
    with pytest.raises(ArgumentError, match=r"holds a search with max_drop=0.03, this call has 0.05"):
        quick(net, train, calibration, max_drop=0.05, **options)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(exitkit.FileError, match="damaged"):
        quick(net, train, calibration, **options)


def test_stopped_by_hand_it_says_how_to_go_on(
    net: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> NDArray[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("exitkit.retrofitting.rounds.Trainer.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(net, *loaders(), output_dir=tmp_path / "kept", show_progress=True)
    assert "kept" in (said := " ".join(capsys.readouterr().err.split()))
    assert "the same call goes on from there" in said


# --- texts -----------------------------------------------------------------------------------------------------------------


def texts(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of token ids whose class is which of three tokens stands among the others, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 40, (count, 12), generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    places = torch.randint(1, 8, (count,), generator=generator)
    ids[torch.arange(count), places] = labels + 1
    mask = torch.ones_like(ids)
    mask[:, 9:] = torch.randint(2, (count, 1), generator=generator)
    rows = torch.arange(count).split(40)
    return [{"input_ids": ids[r] * mask[r], "attention_mask": mask[r], "labels": labels[r]} for r in rows]


def test_texts_pass_as_dicts_with_heads_that_read_the_mask() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch in texts(6_000, 1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    result = quick(model, texts(600, 2), texts(800, 3), max_drop=0.05)
    assert {one.head for one in result.candidates} >= {"1L", "2L-256", "tail"}
    assert result.policy is not None
    assert result.model is not None
    fresh = texts(2_000, 4)
    lost = []
    engine = exitkit.compile(result.model, result.policy)
    for batch in fresh:
        labels = batch.pop("labels")
        right = model(**batch).logits.argmax(1) == labels
        lost += (right & (engine(**batch).logits.argmax(1) != labels)).tolist()
    assert np.mean(lost) <= 0.05


# --- candidates that do not learn ------------------------------------------------------------------------------------------


def test_texts_that_were_trained_on_are_noticed_however_they_are_padded() -> None:
    def padded(rows: list[Any]) -> dict[str, Tensor]:
        mask = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
        ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}

    rows = [(torch.arange(1, 2 + number % 40) + number // 40, number % 2) for number in range(400)]
    train = DataLoader(rows, 8, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]
    calibration = DataLoader(rows, 100, collate_fn=padded)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="shares 400 of its 400 samples"):
        Data.read(train, calibration, None, 0.03, 0.95, 0)


def test_a_candidate_whose_loss_is_not_finite_is_dropped_and_the_others_learn_on(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = exitkit.Trainer.fit

    def diverging(self: exitkit.Trainer, *loaders: Any) -> Any:
        heads = [self.model.head] if isinstance(self.model.head, str) else list(self.model.head)
        if "2L-8" in heads and len(heads) > 1:
            raise exitkit.DivergedError("the loss is nan", exit=heads.index("2L-8"))
        return fit(self, *loaders)

    monkeypatch.setattr("exitkit.retrofitting.rounds.Trainer.fit", diverging)
    options: dict[str, Any] = {"heads": ["1L", "2L-8"], "boundaries": ["blocks.0"], "output_dir": tmp_path}
    result = quick(net, *loaders(), **options)
    dropped = {one.head: one.dropped for one in result.candidates}
    assert "not finite" in str(dropped["2L-8"])
    assert dropped["1L"] is None


def test_a_sample_that_is_not_finite_is_an_error_and_no_verdict(net: nn.Module) -> None:
    """It made every candidate's loss NaN, and the verdict was that no exit pays."""
    (inputs, labels), (_, calibration) = easy(600, 2), loaders()
    inputs[3, 4] = torch.nan
    message = "input 0 holds NaN or infinite numbers in 1 of the"
    with pytest.raises(exitkit.ExitkitError, match=message):
        quick(net, DataLoader(TensorDataset(inputs, labels), 32), calibration)
    with pytest.raises(ArgumentError, match=f"calibration_loader: {message}"):
        quick(net, loaders()[0], DataLoader(TensorDataset(inputs, labels), 200))


def test_an_empty_batch_is_named_as_it_is_counted(net: nn.Module) -> None:
    train, calibration = loaders()
    batches = list(train)
    batches[5] = [part[:0] for part in batches[5]]
    with pytest.raises(ArgumentError, match="train_loader: batch 5, counted from 0, holds no samples"):
        quick(net, batches, calibration)


def test_a_cascade_begins_as_the_exits_that_it_links(net: nn.Module) -> None:
    train, calibration = loaders()
    apart = exitkit.attach(net, torch.zeros(2, 16), at=["blocks.0", "blocks.2"], head=["1L", "2L-8"], method="sdn")
    exitkit.Trainer(apart, epochs=2, show_progress=False).fit(train)
    linked = linked_from(apart, ["1L", "2L-8"], seed=0)
    for batch in calibration:
        with torch.no_grad():
            first, second = apart.eval()(batch[0]).heads, linked.eval()(batch[0]).heads
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(first, second, strict=True))
    assert linked.method.cascade


def test_a_model_that_ends_in_a_softmax_is_warned_of_once(net: nn.Module) -> None:
    class Probable(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    model = Probable().eval()
    model.load_state_dict(net.state_dict())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quick(model, *loaders(), heads=["1L"], boundaries=["blocks.0", "blocks.2"])
        inputs = torch.zeros(2, 16)
        with pytest.warns(UserWarning, match="Probable returns probabilities"):
            apart = exitkit.attach(model, inputs, at=["blocks.0", "blocks.2"], head="1L", method="sdn")
        linked_from(apart, ["1L"], seed=0)
    told = [one for one in heard if "returns probabilities" in str(one.message)]
    assert [one.filename for one in told] == [__file__]
    assert "Probable returns probabilities: its forward ends in a softmax" in str(told[0].message)


def test_heads_may_be_functions(net: nn.Module, tmp_path: Path) -> None:
    """Of this test, so that nothing can find them by their names; what is linked in the end is made by them again."""

    def narrow(feature: exitkit.exits.Feature, width: int = 6) -> nn.Module:
        return nn.Sequential(nn.Linear(feature.shape[0], width), nn.Tanh())

    heads = [narrow, partial(narrow, width=12)]
    train, calibration = loaders()
    options: dict[str, Any] = {"boundaries": ["blocks.0", "blocks.2"], "output_dir": tmp_path / "search"}
    result = quick(net, train, calibration, heads=heads, **options)
    captured = capture(net, torch.zeros(2, 16))
    places = propose(captured, heads, ["blocks.0"], GRIDS["quick"], seed=0)[1]
    assert [place.macs for place in places] == [width * 32 + width * CLASSES for width in (6, 12)]
    assert len(result.candidates) == 4
    assert result.verdict == "exits"
    apart = exitkit.attach(net, torch.zeros(2, 16), at=["blocks.0", "blocks.2"], head=heads, method="sdn")
    linked = linked_from(apart, heads, seed=0)
    inputs = next(iter(calibration))[0]
    with torch.no_grad():
        first, second = apart.eval()(inputs).heads, linked.eval()(inputs).heads
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(first, second, strict=True))


def test_costs_in_time_rise_along_the_backbone_and_count_heads(net: nn.Module) -> None:
    class Slow(nn.Module):
        """Waits, so that time is what the test says it is."""

        def __init__(self, block: nn.Module, seconds: float) -> None:
            super().__init__()
            self.block, self.seconds = block, seconds

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                time.sleep(self.seconds)
            return self.block(x)  # type: ignore[no-any-return]

    slow = Net()
    slow.blocks = nn.Sequential(
        *(Slow(block, 0.06 if number == 2 else 0.004) for number, block in enumerate(slow.blocks))
    )
    slow.eval()
    pool, places = propose(
        capture(slow, torch.zeros(2, 16)), ["1L"], ["blocks.1", "blocks.2"], GRIDS["standard"], seed=0
    )
    prices = in_time(pool, places, torch.zeros(1, 16))
    assert prices.until[0] < 0.4  # 8 of some 72 milliseconds, and what a busy machine adds
    assert prices.until[1] > 0.6  # 68 of them
    assert all(0 < head < 0.4 for head in prices.heads)
    train, calibration = loaders()
    options: dict[str, Any] = {"cost": "time", "batch_size": 8, "heads": ["1L"], "boundaries": ["blocks.0"]}
    assert quick(net, train, calibration, **options).times.batch_size == 8
