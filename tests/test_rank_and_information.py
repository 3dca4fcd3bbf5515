"""Numerical rank and mutual information: closed forms, invariances, limits, and models end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit.analysis import Information, Rank, information, mutual_information, numerical_rank
from exitkit.analysis.rank import Moments, rank_of
from tests.toy import TinyNet


class Chain(nn.Module):
    """Linear layers alone: the output of each is a known matrix times the input."""

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def eigenvalues(rows: Tensor, most: int = 10**9, batch: int = 50, standardise: bool = False) -> Any:
    """By the streamed sums, rows coming in batches."""
    moments = Moments.begun(rows[:batch], most, standardise)
    for part in rows.split(batch):
        moments.add(part)
    return torch.linalg.eigvalsh(moments.covariance()).flip(0).clamp(min=0).numpy()


def of_rank(rank: int, rows: int = 200, width: int = 40) -> Tensor:
    return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, width, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("most", [10, 10**9])
def test_known_ranks_with_an_offset(rank: int, most: int) -> None:
    """``most`` decides whether rows are kept (n × n) or summed up (m × m)."""
    rows = of_rank(rank) + 100.0
    assert rank_of(eigenvalues(rows, most), "covariance", 1e-9) == rank


def test_both_matrices_have_the_same_eigenvalues_as_numpys() -> None:
    rows = torch.randn(60, 40, dtype=torch.float64) + 5
    expected = np.sort(np.linalg.eigvalsh(np.cov(rows.numpy().T)))[::-1]
    for most in (10, 10**9):
        assert eigenvalues(rows, most, batch=7)[:40] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_rotation_scaling_and_repeated_samples_change_nothing() -> None:
    rows = of_rank(12) * torch.linspace(1, 0.01, 40, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    ranks = [rank_of(eigenvalues(one)) for one in (rows, rows @ rotation, 1000 * rows, rows.repeat(3, 1))]
    assert len(set(ranks)) == 1
    assert 1 < ranks[0] <= 12


def test_the_definitions_by_hand() -> None:
    """Covariance eigenvalues 4, 1 and 0.001: singular values in the ratio 2 : 1 : 0.0316."""
    spectrum = np.array([4.0, 1.0, 0.001])
    assert rank_of(spectrum, "covariance", 1e-3) == 2
    assert rank_of(spectrum, "singular", 1e-3) == 3
    assert rank_of(spectrum, "participation") == pytest.approx(5.001**2 / (16 + 1 + 1e-6))
    shares = np.sqrt(spectrum) / np.sqrt(spectrum).sum()
    assert rank_of(spectrum, "entropy") == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert rank_of(spectrum, "srank") == 3  # the first two make up 3 / 3.0316 = 98.96%
    assert rank_of(np.zeros(3)) == 0


def test_the_table_of_the_conventions() -> None:
    """Ten directions and noise of 1e-3 of them (2,000 × 256): 10 by the default, 256 by a low one on singular values."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(2000, 256, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64))
    values = torch.full((256,), 1e-3, dtype=torch.float64)
    values[:10] = 1.0
    spectrum = eigenvalues((u * values) @ v.T)
    assert rank_of(spectrum) == 10
    assert rank_of(spectrum, "singular", 1e-4) == 256
    assert rank_of(spectrum, "entropy") == pytest.approx(12.1, abs=0.3)
    assert rank_of(spectrum, "participation") == pytest.approx(10.0, abs=0.1)


def test_standardising_brings_out_what_a_loud_feature_hides() -> None:
    rows = torch.randn(300, 8, dtype=torch.float64)
    rows[:, 0] *= 1000
    for most in (5, 10**9):
        assert rank_of(eigenvalues(rows, most)) == 1
        assert rank_of(eigenvalues(rows, most, standardise=True)) == 8


def test_ranks_along_linear_layers_never_rise() -> None:
    narrow = torch.randn(30, 4) @ torch.randn(4, 30)
    model = Chain(torch.randn(30, 30), narrow, torch.randn(30, 30), torch.randn(5, 30))
    found = numerical_rank(model, [(torch.randn(64, 30), None)] * 3, tol=1e-9)
    assert found.rank.tolist() == [30, 4, 4]
    assert found.samples.tolist() == [192] * 3
    assert found.features.tolist() == [30] * 3
    assert found.relative.tolist() == pytest.approx([1, 4 / 30, 4 / 30])


def test_readings_and_subsets_of_maps() -> None:
    model, data = TinyNet(), [torch.randn(20, 1, 8, 8)] * 2
    flat = numerical_rank(model, data, features=100)
    assert flat.features.tolist() == [100] * 4
    assert flat.samples.tolist() == [40] * 4
    assert numerical_rank(model, data, reading="pooled").features.tolist() == [8] * 4
    positions = numerical_rank(model, data, reading="positions")
    assert positions.samples.tolist() == [40 * 64] * 4
    assert positions.features.tolist() == [8] * 4
    assert "8 × 8" not in flat.note
    assert "random subset" in flat.note


def test_positions_are_summed_up_where_they_are_more_than_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples of 64 pixels are 320 rows of 8 features: an 8 × 8 matrix, however many samples come, and no row is kept."""
    seen: list[tuple[int, int, int]] = []
    covariance = Moments.covariance

    def counted(moments: Moments) -> Tensor:
        matrix = covariance(moments)
        seen.append((sum(len(rows) for rows in moments.kept), *matrix.shape))
        return matrix

    monkeypatch.setattr(Moments, "covariance", counted)
    found = numerical_rank(TinyNet(), [torch.randn(5, 1, 8, 8)], samples=5, reading="positions")
    assert found.samples.tolist() == [320] * 4
    assert seen == [(0, 8, 8)] * 4
    seen.clear()
    numerical_rank(TinyNet(), [torch.randn(3, 1, 8, 8), torch.randn(2, 1, 8, 8)], samples=5)
    assert seen == [(5, 5, 5)] * 4  # flattened: 5 rows of 512 features


def test_exits_are_marked_and_the_model_is_left_alone(tiny_ee: exitkit.MultiExitModel) -> None:
    tiny_ee.train()
    before = {name: value.clone() for name, value in tiny_ee.state_dict().items()}
    data = [torch.randn(16, 1, 8, 8)]
    random = torch.get_rng_state()
    with_exits = numerical_rank(tiny_ee, data)
    mutual_information(tiny_ee, data)
    assert with_exits.exits.tolist() == [True, True, True, False]
    assert with_exits.rank.tolist() == numerical_rank(tiny_ee.backbone, data).rank.tolist()
    assert all(torch.equal(value, before[name]) for name, value in tiny_ee.state_dict().items())
    assert all(module.training for module in tiny_ee.modules())
    assert torch.equal(torch.get_rng_state(), random)


def gaussian(width: int, samples: int = 2000) -> Tensor:
    return torch.randn(samples, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize(("width", "sigma"), [(1, 0.5), (2, 1.0), (4, 1.0), (2, 0.5), (8, 2.0)])
def test_the_gaussian_closed_form(width: int, sigma: float) -> None:
    """I = d/2 · log(1 + 1/σ²), within 5% while it is under half of log N."""
    truth = width / 2 * math.log(1 + 1 / sigma**2)
    assert truth < math.log(2000) / 2
    _, estimate, _, lower, upper = information._noisy(gaussian(width), [sigma], "fixed", 0)
    assert estimate[0] == pytest.approx(truth, rel=0.05)
    assert lower[0] <= estimate[0] <= upper[0]


def test_the_limits() -> None:
    rows = gaussian(16, 500)
    _, estimate, _, lower, upper = information._noisy(rows, [1e-6, 1e6], "fixed", 0)
    assert estimate[0] == pytest.approx(math.log(500))
    assert estimate[1] == pytest.approx(0, abs=1e-4)
    assert lower[0] == pytest.approx(math.log(500))
    assert upper[1] == pytest.approx(0, abs=1e-4)
    constant = torch.ones(50, 6, dtype=torch.float64)
    for noise in ("relative", "rms", "fixed"):
        assert information._noisy(constant, [0.5], noise, 0)[1][0] == pytest.approx(0, abs=1e-12)


def test_rotation_and_scale_change_nothing_where_noise_is_relative() -> None:
    rows = gaussian(12, 400)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    for noise in ("relative", "rms"):
        estimates = [
            information._noisy(one, [0.3], noise, 0)[1][0] for one in (rows, 50 * rows, 50 * rows @ rotation + 3)
        ]
        assert estimates[1] == pytest.approx(estimates[0])
        assert estimates[2] == pytest.approx(estimates[0], rel=0.05)  # other noise, rotated


def test_the_published_estimator_has_its_two_faults() -> None:
    """An extra (d − 1)/2 · log 2πσ², and a marginal without the own term: far from the truth where the other is near it."""
    rows = gaussian(16, 1000)
    truth = 8 * math.log(2)
    published, proper = (
        getattr(information, name)(rows, [1.0], "fixed", 0)[1][0] for name in ("_published", "_noisy")
    )
    assert published == pytest.approx(23.1, abs=1.5)
    assert published - 15 / 2 * math.log(2 * math.pi) == pytest.approx(9.3, abs=1.5)
    assert proper == pytest.approx(4.99, abs=0.2)
    assert abs(proper - truth) < 0.7


def test_a_sweep_over_a_model_flags_saturation(tmp_path: Path) -> None:
    found = mutual_information(TinyNet(), [torch.randn(40, 1, 8, 8)], scale=[0.01, 0.3, 3])
    assert found.estimate.shape == (3, 4)
    assert found.samples == 40
    assert found.most == pytest.approx(math.log(40))
    assert found.saturated[0].all()
    assert not found.saturated[2].any()
    assert (np.diff(found.estimate, axis=0) < 0).all()
    assert (found.lower <= found.estimate + 0.2).all()
    assert (found.estimate <= found.upper + 0.2).all()
    assert "saturated" in str(found.table())
    found.save(tmp_path / "i.safetensors")
    assert np.array_equal(Information.load(tmp_path / "i.safetensors").estimate, found.estimate)
    found.plot(tmp_path / "i.png")
    rank = numerical_rank(TinyNet(), [torch.randn(20, 1, 8, 8)])
    rank.save(tmp_path / "r.safetensors")
    assert str(Rank.load(tmp_path / "r.safetensors").table()) == str(rank.table())
    rank.plot(tmp_path / "r.svg")
    with pytest.raises(exitkit.FileError, match="Information"):
        Rank.load(tmp_path / "i.safetensors")


def test_texts(bert: nn.Module) -> None:
    inputs = {"input_ids": torch.randint(1, 50, (12, 9)), "attention_mask": torch.ones(12, 9, dtype=torch.int64)}
    assert numerical_rank(bert, [inputs]).features.tolist() == [9 * 16, 9 * 16]
    shorter = {name: value[:, :5] for name, value in inputs.items()}
    with pytest.raises(exitkit.ArgumentError, match="pooled"):
        numerical_rank(bert, [inputs, shorter])
    assert mutual_information(bert, [inputs, shorter], reading="pooled").features.tolist() == [16, 16]


@pytest.fixture
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=50, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m, d: numerical_rank(m, [d[:2]]), "at least 3"),
        (lambda m, d: mutual_information(m, [d[:5]]), "at least 10"),
        (lambda m, d: numerical_rank(m, []), "empty"),
        (lambda m, d: numerical_rank(m, [d], kind="nuclear"), "kind"),
        (lambda m, d: numerical_rank(m, [d], tol=0), "tol"),
        (lambda m, d: mutual_information(m, [d], scale=-1.0), "scale"),
        (lambda m, d: mutual_information(m, [d], scale=[]), "scale"),
        (lambda m, d: mutual_information(m, [d], reading="positions"), "reading"),
        (lambda m, d: numerical_rank(m, [d * math.nan]), "nothing but NaN"),
        (lambda m, d: mutual_information(m, [d * math.nan]), "nothing but NaN"),
        (lambda m, d: numerical_rank("resnet", [d]), "module"),
    ],
)
def test_bad_input_is_one_clear_error(call: Any, named: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=named):
        call(TinyNet(), torch.randn(12, 1, 8, 8))
