"""Promises from calibration data that are not what they should be: copies, and samples that were used before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import exitkit
from exitkit import ExitOutputs, choose_threshold
from exitkit.common.errors import ArgumentError
from exitkit.evaluation import fit_temperatures, threshold_path

DELTA, MAX_DROP = 0.05, 0.05


def drawn(count: int, seed: int) -> ExitOutputs:
    """Two exits of two classes: the first is surer the likelier it is right, the backbone is always right."""
    generator = np.random.default_rng(seed)
    right = generator.uniform(0.5, 1.0, count)  # probability that exit 0 is right; its confidence
    correct = generator.uniform(size=count) < right
    first = np.stack([np.where(correct, right, 1 - right), np.where(correct, 1 - right, right)], -1)
    log_probs = torch.tensor(np.stack([np.log(first), np.log([[0.999, 0.001]] * count)], 1)).float()
    hashes = torch.tensor(generator.integers(-(2**62), 2**62, count))
    return ExitOutputs(log_probs, torch.zeros(count, dtype=torch.int64), torch.tensor([0.3, 1.0]), 1.0, hashes=hashes)


def true_risk(threshold: float) -> float:
    """The share of all samples that leave at exit 0 above τ and are wrong: ∫ (1 − p) dp / 0.5 from τ to 1."""
    return (1 - min(max(threshold, 0.5), 1.0)) ** 2


def broken(trials: int, repeats: int, keep: bool) -> float:
    """How often the promise is broken on 300 samples, each ``repeats`` times."""
    failures = 0
    for seed in range(trials):
        outputs = drawn(300, seed)
        copied = outputs[torch.arange(300).repeat(repeats)]
        copied = copied if keep else replace(copied, hashes=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failures += true_risk(choose_threshold(copied, MAX_DROP, 1 - DELTA).thresholds[0]) > MAX_DROP
    return failures / trials


def test_copies_void_no_promise() -> None:
    """Without hashes nobody can know: the promise of 5% is broken far more often. With them, it is kept."""
    assert broken(150, repeats=10, keep=False) > 0.15
    assert broken(150, repeats=1, keep=True) <= 0.09  # 5%, three standard errors
    assert broken(150, repeats=10, keep=True) <= 0.09


def test_copies_are_counted_and_named() -> None:
    outputs = drawn(300, 0)
    with pytest.warns(UserWarning, match="2700 of the 3000 calibration samples repeat others.*300 distinct"):
        policy = choose_threshold(outputs[torch.arange(300).repeat(10)], MAX_DROP)
    assert policy.guarantee is not None
    assert policy.guarantee.samples == 300
    assert "300 calibration samples" in str(policy.guarantee)
    assert policy.thresholds == choose_threshold(outputs, MAX_DROP).thresholds


def test_repeats_that_are_real_are_not_forgotten() -> None:
    """An input that comes half of the time and is answered wrong costs half of the samples, not one."""
    outputs = drawn(400, 1)
    log_probs = outputs.log_probs.clone()
    log_probs[:200, 0] = torch.tensor([0.01, 0.99]).log()  # one text, 200 times: sure and wrong at exit 0
    hashes = outputs.hashes
    assert hashes is not None
    hashes = hashes.clone()
    hashes[:200] = hashes[0]
    with pytest.warns(UserWarning, match="repeat"):
        policy = choose_threshold(replace(outputs, log_probs=log_probs, hashes=hashes), MAX_DROP)
    leaves = outputs.exits_at(policy)[200:] == 0
    assert policy.thresholds[0] >= 0.99 or not leaves.any()


def test_dependent_samples_are_said_to_be_out_of_reach() -> None:
    assert choose_threshold.__doc__ is not None
    assert "depend on one another" in " ".join(choose_threshold.__doc__.split())


def _shared(outputs: ExitOutputs) -> Tensor:
    assert outputs.hashes is not None
    return outputs.hashes


def test_temperatures_fitted_on_the_calibration_samples_are_noticed() -> None:
    outputs, others = drawn(300, 0), drawn(300, 1)
    fitted = fit_temperatures(outputs)
    for given in (outputs, outputs.hashes):
        with pytest.raises(ArgumentError, match="share 300 of their 300 samples with temperatures"):
            choose_threshold(outputs.calibrated(tuple(fitted), fitted_on=given), MAX_DROP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_threshold(others.calibrated(fitted, fitted_on=outputs), MAX_DROP).temperatures == fitted
    with pytest.warns(UserWarning, match="it is unknown whether.*fitted_on=tuning") as caught:
        assert choose_threshold(outputs.calibrated(fitted), MAX_DROP).found
    assert caught[0].filename == __file__


def test_temperatures_fitted_on_the_calibration_samples_are_noticed_after_saving(tmp_path: Path) -> None:
    outputs, others = drawn(300, 0), drawn(300, 1)
    path = tmp_path / "outputs.safetensors"
    outputs[:200].calibrated(fit_temperatures(outputs), fitted_on=outputs).save(path)
    with pytest.raises(ArgumentError, match="share 200 of their 200 samples with temperatures"):
        choose_threshold(ExitOutputs.load(path), MAX_DROP)
    others.calibrated(fit_temperatures(outputs), fitted_on=outputs).save(path)
    policy = choose_threshold(ExitOutputs.load(path), MAX_DROP)
    assert "fitted_on" not in policy.to_dict()


def test_what_temperatures_were_fitted_on_needs_temperatures() -> None:
    outputs = drawn(30, 0)
    for wrong in ({"fitted_on": outputs.hashes}, {"temperatures": (1.0, 1.0), "fitted_on": torch.ones(3)}):
        with pytest.raises(ArgumentError, match="fitted_on must be the int64 content hashes"):
            replace(outputs, **wrong)


def test_a_path_made_from_the_calibration_samples_is_noticed() -> None:
    outputs = drawn(300, 0)
    with pytest.raises(ArgumentError, match="with path"):
        choose_threshold(outputs, MAX_DROP, path=threshold_path(outputs))


def test_too_few_distinct_samples() -> None:
    few = drawn(30, 0)
    with pytest.warns(UserWarning, match="repeat"), pytest.raises(ArgumentError, match="30 samples are too few"):
        choose_threshold(few[torch.arange(30).repeat(100)], MAX_DROP)


def test_found_where_nobody_leaves_says_so() -> None:
    """No confidence comes near the strictest thresholds of the grid, so that these pass and no sample leaves."""
    outputs = drawn(300, 0)
    log_probs = outputs.log_probs.clone()
    log_probs[:, 0] = torch.tensor([0.4, 0.6]).log()  # exit 0 is always wrong, at 0.6
    policy = choose_threshold(replace(outputs, log_probs=log_probs), 0.01)
    assert not policy.found
    assert policy.cost == 1.0
    assert "nothing is saved" in str(policy.guarantee)
    assert "nothing is saved" not in str(choose_threshold(outputs, MAX_DROP).guarantee)
    assert exitkit.choose_threshold is choose_threshold
