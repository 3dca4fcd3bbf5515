"""One value says when a sample leaves: written down and read again, and what it gives on outputs, by hand."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ExitkitError, ExitOutputs, choose_threshold
from exitkit.common.errors import ArgumentError, FileError
from exitkit.evaluation import BudgetPoint, RegressionOutputs, per_exit_thresholds
from exitkit.methods.policy import ExitPolicy, Guarantee
from tests.toy import TinyNet, images


def confident(levels: list[list[float]], **options: Any) -> ExitOutputs:
    """Two classes, label 0: probabilities of class 0 as given, (N, M+1)."""
    p = torch.tensor(levels, dtype=torch.float64)
    usual = {"labels": torch.zeros(len(levels)).long(), "macs": range(1, 1 + p.shape[1]), "backbone_macs": 4.0}
    return ExitOutputs(torch.stack([p, 1 - p], -1).log(), **(usual | options))


LEVELS = [[0.9, 0.9, 0.9], [0.2, 0.8, 0.9], [0.6, 0.3, 0.9], [0.6, 0.7, 0.4]]
"""Right about 1011 / 1101 / 1110 of the four, with confidences .9 .8 .6 .6 / .9 .8 .7 .7 / .9 .9 .9 .6."""


# outputs.at ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "exits", "accuracy", "cost"),
    [
        (0.85, [0, 2, 2, 2], 3 / 4, (1 + 3 + 3 + 3) / 16),
        (0.75, [0, 0, 2, 2], 2 / 4, (1 + 1 + 3 + 3) / 16),
        (0.65, [0, 0, 1, 1], 2 / 4, (1 + 1 + 2 + 2) / 16),
        ((0.85, 0.75), [0, 1, 2, 2], 3 / 4, (1 + 2 + 3 + 3) / 16),
        ((2.0, 0.65), [1, 1, 1, 1], 3 / 4, 8 / 16),
        ((0.5, 2.0), [0, 0, 0, 0], 3 / 4, 4 / 16),
        (2.0, [2, 2, 2, 2], 3 / 4, 12 / 16),
    ],
)
def test_the_operating_point_is_what_samples_get_one_by_one(
    threshold: Any, exits: list[int], accuracy: float, cost: float
) -> None:
    outputs = confident(LEVELS)
    for given in (threshold, outputs.policy(threshold), outputs.at(threshold), np.asarray(threshold).tolist()):
        point = outputs.at(given)
        assert isinstance(point, BudgetPoint)
        assert outputs.exits_at(given).tolist() == exits
        assert (point.accuracy, point.cost) == pytest.approx((accuracy, cost))
        assert point.policy == outputs.policy(threshold)
        assert outputs.exit_rates(given) == pytest.approx([exits.count(m) / 4 for m in range(3)])


def test_the_operating_point_of_a_policy_with_temperatures() -> None:
    """Confidence .9 is log-odds ln 9; divided by 2 it is 3 / (3 + 1)."""
    outputs = confident(LEVELS)
    halved = [[math.sqrt(p) / (math.sqrt(p) + math.sqrt(1 - p)) for p in row] for row in LEVELS]
    scores = [[max(p, 1 - p) for p in row] for row in halved]
    assert scores[0] == pytest.approx([0.75] * 3)
    policy = ExitPolicy((0.7, 0.65), "confidence", (2.0, 2.0, 1.0))
    exits = [next((m for m, tau in enumerate((0.7, 0.65)) if row[m] > tau), 2) for row in scores]
    assert exits == [0, 1, 2, 2]
    point = outputs.at(policy)
    assert outputs.exits_at(policy).tolist() == exits
    assert (point.accuracy, point.cost) == pytest.approx((3 / 4, (1 + 2 + 3 + 3) / 16))
    assert point.policy == policy
    divided = outputs.calibrated((2.0, 2.0, 1.0))
    assert divided.at(policy) == divided.at((0.7, 0.65)) == point


def test_the_operating_point_with_another_criterion() -> None:
    outputs = confident(LEVELS)
    for given, criterion in ((0.5, "margin"), (ExitPolicy((0.5, 0.5), "margin"), None)):
        point = outputs.at(given, criterion)  # 2p − 1 above ½ is p above ¾
        assert (point.accuracy, point.cost) == pytest.approx((2 / 4, (1 + 1 + 3 + 3) / 16))
        assert point.policy.criterion == "margin"
    with pytest.raises(ExitkitError, match="criterion='confidence', but the threshold is for 'margin'"):
        outputs.at(ExitPolicy((0.5, 0.5), "margin"), "confidence")


def test_the_operating_point_of_a_regression() -> None:
    """Leave at exit 1 once the prediction moved by less than ½."""
    predictions = torch.tensor([[0.0, 0.25, 3.0], [1.0, 2.0, 1.5], [4.0, 4.25, 0.0], [0.0, 9.0, 3.0]])
    labels = torch.tensor([0.0, 1.0, 4.0, 2.0])
    outputs = RegressionOutputs(predictions, labels, [1, 2, 4], 4.0)
    assert outputs.exits_at(-0.5).tolist() == [1, 2, 1, 2]
    point = outputs.at(-0.5)
    answers = [0.25, 1.5, 4.25, 3.0]
    assert point.accuracy == pytest.approx(np.corrcoef(answers, labels)[0, 1])
    assert point.cost == pytest.approx((2 + 4 + 2 + 4) / 16)
    assert point.policy == ExitPolicy((-0.5, -0.5), "tolerance")
    assert outputs.at((-0.5, float("inf"))).cost == 1.0


def test_accuracy_needs_labels() -> None:
    with pytest.raises(ExitkitError, match="labels=None: accuracy needs labels"):
        confident(LEVELS, labels=None).at(0.5)


# a policy is one value -----------------------------------------------------------------------------------------------

GUARANTEE = Guarantee("words", True, "accuracy_drop", "ltt", 0.01, 0.95, 0.001, 500, 0.5, (0.4, 0.6))
POLICIES = [
    ExitPolicy((0.5,), "confidence"),
    ExitPolicy((0.5, 0.25), "margin", (1.0, 2.0, 3.0), "bfloat16"),
    ExitPolicy((-0.5,), "tolerance-3"),
    ExitPolicy((1 - 2**-52,), "confidence", guarantee=GUARANTEE),
    ExitPolicy((0.1, 0.2), "nats", (0.5, 1 / 3, 7.0), guarantee=replace(GUARANTEE, method="crc", confidence=None)),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_of_a_policy_is_lost_on_the_way(policy: ExitPolicy) -> None:
    for again in (
        ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))),
        pickle.loads(pickle.dumps(policy)),
        copy.copy(policy),
        copy.deepcopy(policy),
        replace(policy),
        eval(repr(policy), {"ExitPolicy": ExitPolicy, "Guarantee": Guarantee}),
    ):
        assert again == policy
        assert hash(again) == hash(policy)
        assert isinstance(again.thresholds, tuple)
        assert isinstance(again.temperatures, tuple | None)


def test_numbers_of_any_kind_make_one_policy() -> None:
    expected = ExitPolicy((0.5, 0.25), "confidence", (1.0, 2.0, 3.0))
    for thresholds, temperatures in (
        ([0.5, 0.25], [1, 2, 3]),
        (np.array([0.5, 0.25], np.float32), np.array([1, 2, 3])),
        (torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0, 3.0])),
    ):
        made: Any = ExitPolicy(thresholds, "confidence", temperatures)  # type: ignore[arg-type]
        assert made == expected


def test_thresholds_that_need_a_gradient_are_refused() -> None:
    with pytest.raises(ExitkitError, match=r"threshold=.*requires_grad=True\) must be a number, one for each exit"):
        exitkit.attach(TinyNet(), images(), every=2).policy_for(torch.tensor([0.5], requires_grad=True))  # type: ignore[arg-type]


def test_other_thresholds_keep_the_scores_and_promise_nothing() -> None:
    changed = POLICIES[4].at(0.7)
    assert changed == ExitPolicy((0.7, 0.7), "nats", (0.5, 1 / 3, 7.0))
    assert POLICIES[4].at(0.7, 0.8).thresholds == (0.7, 0.8)
    assert not changed.found
    assert changed.cost is None
    assert (POLICIES[4].found, POLICIES[4].cost) == (True, 0.5)


def test_a_single_threshold_is_a_number_and_several_are_several() -> None:
    assert ExitPolicy((0.5, 0.5), "confidence").threshold == 0.5
    assert ExitPolicy((0.5, 0.6), "confidence").threshold == (0.5, 0.6)
    with pytest.raises(ExitkitError, match="which a plain number would lose"):
        POLICIES[1].threshold  # noqa: B018


def test_what_brings_a_policy_is_taken_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 3, 4, generator=generator)
    outputs = ExitOutputs(logits, torch.arange(200) % 4, [1, 2, 4], 4.0).calibrated((2.0, 3.0, 1.0))
    for brings in (outputs.curve().at_budget(0.6), per_exit_thresholds(outputs, 0.6), outputs.at(0.4)):
        assert brings.policy.temperatures == (2.0, 3.0, 1.0)
        assert outputs.exits_at(brings).tolist() == outputs.exits_at(brings.policy.thresholds).tolist()
    chosen = choose_threshold(outputs, 0.9)
    assert outputs.at(chosen).cost == pytest.approx(chosen.cost)
    assert outputs.at(chosen).policy.guarantee is chosen.guarantee


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"thresholds": []}, "threshold=() must be a number, one for each exit, or a policy"),
        ({"thresholds": ["a"]}, "thresholds[0]='a' must be a number"),
        ({"thresholds": [float("nan")]}, "thresholds[0]=nan must be a number"),
        ({"thresholds": None}, "thresholds=None must be a list or a tuple"),
        ({"thresholds": [True]}, "thresholds[0]=True must be a number"),
        ({"criterion": ""}, "criterion=''"),
        ({"criterion": 5}, "criterion=5 must be a text"),
        ({"criterion": "tolerance-0"}, "criterion='tolerance-0' cannot be made: times=0 must be"),
        ({"criterion": "two words"}, "criterion='two words'"),
        ({"temperatures": [1.0]}, "temperatures=(1.0,) must be 2 positive numbers"),
        ({"temperatures": [1.0, 0.0]}, "temperatures=(1.0, 0.0) must be 2 positive numbers"),
        ({"temperatures": "12"}, "temperatures='12' must be a list or a tuple"),
        ({"temperatures": 3}, "temperatures=3 must be a list or a tuple"),
        ({"guarantee": {"words": "all is well"}}, "'guarantee.found' is missing"),
        ({"guarantee": 5}, "guarantee=5 must be a dict"),
        ({"code": "import os"}, "'code' is unknown"),
    ],
)
def test_what_is_no_policy_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(FileError, match=re.escape(f"this exit policy is damaged: {fault}")):
        ExitPolicy.from_dict(ExitPolicy((0.5,), "confidence").to_dict() | change)


@pytest.mark.parametrize("given", [None, [], "policy", 3, {}])
def test_other_values_are_no_policy(given: Any) -> None:
    fault = "'thresholds' is missing" if given == {} else f"the document={given!r} must be a dict"
    with pytest.raises(FileError, match=re.escape(f"this exit policy is damaged: {fault}")):
        ExitPolicy.from_dict(given)


def test_a_policy_is_read_where_its_criterion_is_not_imported_and_scores_where_it_is() -> None:
    policy = ExitPolicy.from_dict(ExitPolicy((0.5,), "confidence").to_dict() | {"criterion": "far-away-3"})
    assert policy.at(0.7).to_dict()["criterion"] == "far-away-3"
    for use in (lambda: policy.score, lambda: confident([[0.9, 0.9]]).at(policy)):
        with pytest.raises(
            ArgumentError, match=r"criterion='far-away-3' is unknown.*import the module that defines it"
        ):
            use()


def test_thresholds_that_json_does_not_have_are_not_written() -> None:
    with pytest.raises(ExitkitError, match="threshold=inf must be finite to be written"):
        ExitPolicy((float("inf"),), "confidence").to_dict()
