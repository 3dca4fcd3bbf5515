"""Gradient dominance against gradients taken one by one, and a model that is left as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit.analysis import GradientDominance, gradient_dominance
from exitkit.training import Distillation, Loss, Phase, gradients
from tests.toy import TinyNet


class Smooth(nn.Module):
    """Blocks without dropout, so that two forwards in training mode are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(4))
        )
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.blocks(x))
        return out


def model(method: Any = "ztw") -> exitkit.MultiExitModel:
    return exitkit.attach(Smooth(), torch.randn(2, 6), every=1, method=method)


def batches(number: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(number)]


def shared(ee: exitkit.MultiExitModel) -> list[nn.Parameter]:
    """Exits read at blocks 0, 1 and 2; what lies behind is the last exit's own."""
    return [parameter for block in ee.backbone.blocks[:3] for parameter in block.parameters()]


def flat(ee: exitkit.MultiExitModel, loss: Tensor) -> Tensor:
    """The gradient on the blocks, which the exits share, as one float64 vector, by an ordinary backward pass."""
    ee.zero_grad()
    loss.backward(retain_graph=True)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).double() for p in shared(ee)])


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second / (first.norm() * second.norm()))


def test_it_is_the_cosine_of_ordinary_gradients() -> None:
    ee, data, weights = model(), batches(), [0.5, 1.0, 2.0, 1.5]
    found = gradient_dominance(ee, data, batches=3, loss=Loss(weights=weights))
    naive, shares = [], []
    for inputs, labels in data:
        twin = copy.deepcopy(ee).train()
        heads = twin(inputs).heads
        own = [flat(twin, F.cross_entropy(logits, labels)) for logits in heads]
        total = flat(twin, sum(w * F.cross_entropy(logits, labels) for w, logits in zip(weights, heads, strict=True)))
        naive.append([cosine(one, total) for one in own])
        shares.append([w * float(one @ total / (total @ total)) for w, one in zip(weights, own, strict=True)])
    assert found.dominance == pytest.approx(np.mean(naive, 0), abs=1e-5)
    assert found.dominance_spread == pytest.approx(np.std(naive, 0, ddof=1), abs=1e-5)
    assert found.share == pytest.approx(np.mean(shares, 0), abs=1e-5)
    assert found.share.sum() == pytest.approx(1, abs=1e-6)
    assert found.samples == 48


def test_memory_in_groups_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    ee, data = model(), batches()
    whole = gradient_dominance(ee, data)
    monkeypatch.setattr(gradients, "GROUP_BYTES", 500)
    monkeypatch.setattr(gradients, "_CHUNK", 7)
    assert gradient_dominance(ee, data).gram == pytest.approx(whole.gram, rel=1e-9, abs=1e-12)


def test_other_weights_need_no_other_pass() -> None:
    ee, data, weights = model(), batches(), [0.0, 3.0, 1.0, 0.5]
    measured = gradient_dominance(ee, data, loss=Loss(weights=weights))
    worked_out = gradient_dominance(ee, data).weighted(weights)
    assert worked_out.dominance == pytest.approx(measured.dominance)
    assert worked_out.ceiling == pytest.approx(measured.ceiling)
    with pytest.raises(exitkit.ArgumentError, match="weights"):
        measured.weighted([1.0, 2.0])


def test_depth_alone_makes_it_rise() -> None:
    """Five random gradients of unit length per block, each zero behind its exit."""
    gram = torch.stack(
        [torch.diag(torch.tensor([float(i >= block) for i in range(5)])) for block in range(5)]
    ).double()
    dominance, share, ceiling = gradients.dominance_of(gram, torch.ones(5, dtype=torch.float64), 5)
    assert dominance.tolist() == pytest.approx([((i + 1) / 15) ** 0.5 for i in range(5)])
    assert share.tolist() == pytest.approx([(i + 1) / 15 for i in range(5)])
    assert ceiling.tolist() == pytest.approx([(n / 15) ** 0.5 for n in (5, 9, 12, 14, 15)])


def test_no_dominance_is_above_its_ceiling_and_blocks_behind_an_exit_are_empty() -> None:
    found = gradient_dominance(model(), batches())
    assert (found.dominance <= found.ceiling + 1e-9).all()
    assert found.ceiling[-1] == pytest.approx(1)
    for block, row in enumerate(found.by_block):
        assert np.isnan(row[:block]).all()
        assert np.isfinite(row[block:]).all()
    assert np.diagonal(found.conflict) == pytest.approx(1)


def test_heads_pull_their_own_exit_up_and_stay_under_the_ceiling() -> None:
    ee, data = model(), batches()
    shared, whole = gradient_dominance(ee, data), gradient_dominance(ee, data, parameters="all")
    assert len(whole.by_block) == len(shared.by_block) + 1
    assert (whole.dominance <= whole.ceiling + 1e-9).all()
    assert whole.share.sum() == pytest.approx(1)


def test_what_only_the_backbones_exit_reaches_counts_with_the_heads() -> None:
    """Of four blocks the exits share three: the last one and the classifier are no block of the backbone's."""
    ee, data = model(), batches(1)
    found = gradient_dominance(ee, data)
    assert found.gram.shape == (1, 3, 5, 5)
    assert np.isfinite(found.by_block[2, 2:]).all()
    whole = gradient_dominance(ee, data, parameters="all")
    assert whole.gram[:, :3] == pytest.approx(found.gram, rel=1e-9)
    ((inputs, labels),) = data
    twin = copy.deepcopy(ee).train()
    F.cross_entropy(twin(inputs).heads[-1], labels).backward()
    own = [*twin.backbone.blocks[3].parameters(), *twin.backbone.linear.parameters()]
    expected = sum(float(parameter.grad.double().square().sum()) for parameter in own if parameter.grad is not None)
    assert whole.gram[0, 3, 3, 3] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "loss"),
    [("sdn", Loss()), ("sdn", Loss(distillation=Distillation(weight=5.0))), (exitkit.ZTW(detach=False), Loss())],
)
def test_the_ceiling_over_all_parameters_is_the_objectives_length_where_an_exit_reaches(
    method: Any, loss: Loss
) -> None:
    """With heads of their own exactly; with distillation and with links that gradients pass it is a bound."""
    ee, data = model(method), batches(1)
    found = gradient_dominance(ee, data, parameters="all", loss=loss)
    assert (abs(found.dominance) <= found.ceiling + 1e-9).all()
    if method != "sdn" or loss.distillation is not None:
        return
    ((inputs, labels),) = data
    twin = copy.deepcopy(ee).train()
    losses = [F.cross_entropy(logits, labels) for logits in twin(inputs).heads]
    parameters = list(twin.parameters())
    total = torch.autograd.grad(sum(losses), parameters, retain_graph=True)
    for exit_, own in enumerate(losses):
        reached = torch.autograd.grad(own, parameters, retain_graph=True, allow_unused=True)
        part = sum(float(t.square().sum()) for t, mine in zip(total, reached, strict=True) if mine is not None)
        length = sum(float(t.square().sum()) for t in total)
        assert found.ceiling[exit_] == pytest.approx((part / length) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("loss", [Loss(), Loss(distillation=Distillation(weight=2.0), reduction="mean")])
def test_what_the_objective_holds_besides_is_a_row_of_its_own(loss: Loss) -> None:
    ee = model("gpf" if loss.distillation is None else "sdn")
    ((inputs, labels),) = data = batches(1)
    found = gradient_dominance(ee, data, loss=loss)
    twin = copy.deepcopy(ee).train()
    output = twin(inputs)
    if loss.distillation is None:
        losses = [F.cross_entropy(logits, labels) for logits in output.heads]
        assert output.auxiliary is not None
        total = flat(twin, sum(losses) + sum(output.auxiliary))
    else:
        teacher = output.heads[-1].detach().softmax(-1)
        taught = [2 * -(teacher * logits.log_softmax(-1)).sum(-1).mean() for logits in output.heads[:-1]]
        losses = [F.cross_entropy(logits, labels) for logits in output.heads]
        total = flat(twin, (sum(losses) + sum(taught)) / 4)
    assert found.dominance == pytest.approx([cosine(flat(twin, one), total) for one in losses], abs=1e-5)
    assert found.rest_share != 0
    assert found.share.sum() + found.rest_share == pytest.approx(1)


def test_everything_is_as_it_was() -> None:
    ee = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8), every=1, method="ztw")
    ee.train()
    ee.backbone.blocks[1].eval()
    ee.backbone.stem.weight.grad = kept = torch.randn_like(ee.backbone.stem.weight)
    before = {name: value.clone() for name, value in ee.state_dict().items()}
    modes = [module.training for module in ee.modules()]
    random = torch.get_rng_state()
    data = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]
    first = gradient_dominance(ee, data)
    assert all(torch.equal(value, before[name]) for name, value in ee.state_dict().items())
    assert [module.training for module in ee.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert ee.backbone.stem.weight.grad is kept
    assert all(p.grad is None for p in ee.parameters() if p is not ee.backbone.stem.weight)
    torch.manual_seed(99)  # dropout is on, and seeded
    assert np.array_equal(gradient_dominance(ee, data).gram, first.gram)
    assert not np.array_equal(gradient_dominance(ee, data, seed=1).gram, first.gram)


class Twice(nn.Module):
    """Two blocks of which the second changes nothing, so that exits behind both read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.ReLU()
        self.third = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.third(self.second(self.first(x))))
        return out


def test_exits_that_are_the_same_follow_each_other_and_their_sum() -> None:
    ee = exitkit.attach(Twice(), torch.randn(2, 6), at=["first", "second"], method="sdn")
    ee.classifiers[1].load_state_dict(ee.classifiers[0].state_dict())
    found = gradient_dominance(ee, batches(), loss=Loss(weights=[1.0, 2.0, 0.0]))
    assert found.dominance[:2] == pytest.approx(1)
    assert found.conflict[0, 1] == pytest.approx(1)
    assert found.share[:2] == pytest.approx([1 / 3, 2 / 3])


def test_scaling_losses_leaves_directions_and_the_gram_matrix_has_no_negative_eigenvalue() -> None:
    ee, data = model(), batches()
    plain = gradient_dominance(ee, data)
    scaled = gradient_dominance(ee, data, loss=Loss(weights=[7.0] * 4))
    assert scaled.dominance == pytest.approx(plain.dominance)
    one = gradient_dominance(ee, data, loss=Loss(weights=[1.0, 9.0, 1.0, 1.0]))
    assert one.conflict == pytest.approx(plain.conflict)
    for gram in plain.gram.reshape(-1, 5, 5):
        assert np.array_equal(gram, gram.T)
        assert np.linalg.eigvalsh(gram).min() >= -1e-12 * np.trace(gram)


def test_a_shuffled_loader_stands_where_it_stood() -> None:
    generator = torch.Generator().manual_seed(5)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(3, (32,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    state = generator.get_state()
    gradient_dominance(model(), loader)
    assert torch.equal(generator.get_state(), state)


def test_a_frozen_backbone_shares_nothing() -> None:
    ee = model()
    ee.backbone.requires_grad_(False)
    with pytest.raises(exitkit.ArgumentError, match="as_if_unfrozen"):
        gradient_dominance(ee, batches())
    assert gradient_dominance(ee, batches(), as_if_unfrozen=True).ceiling[-1] == pytest.approx(1)
    assert not any(parameter.requires_grad for parameter in ee.backbone.parameters())


def test_where_the_backbones_own_classifier_alone_learns_nothing_is_shared() -> None:
    ee = model()
    ee.backbone.requires_grad_(False)
    ee.backbone.linear.requires_grad_(True)
    for parameters in ("backbone", "all"):
        with pytest.raises(exitkit.ArgumentError, match="share nothing"):
            gradient_dominance(ee, batches(), parameters=parameters)  # type: ignore[arg-type]
    ee.backbone.blocks[2].requires_grad_(True)
    assert np.isfinite(gradient_dominance(ee, batches()).dominance[2:]).all()


def test_half_precision_is_measured_in_float32() -> None:
    ee = model()
    data = batches()
    with pytest.warns(UserWarning, match="float32"):
        found = gradient_dominance(ee.to(torch.bfloat16), data)
    assert ee.dtype == torch.bfloat16
    assert np.isfinite(found.gram).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ee": Smooth()}, "attach"),
        ({"loader": []}, "empty"),
        ({"loader": [torch.randn(4, 6)]}, "labels"),
        ({"batches": 0}, "batches"),
        ({"parameters": "heads"}, "parameters"),
        ({"loader": [(torch.randn(1, 6), torch.tensor([0]))]}, "one sample"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: dict[str, Any], named: str) -> None:
    given = {"ee": model(), "loader": batches(1), **arguments}
    with pytest.raises(exitkit.ExitkitError, match=named):
        gradient_dominance(**given)


def test_results_are_files_tables_and_pictures(tmp_path: Path) -> None:
    found = gradient_dominance(model(), batches())
    found.save(tmp_path / "d.safetensors")
    again = GradientDominance.load(tmp_path / "d.safetensors")
    assert np.array_equal(again.gram, found.gram)
    assert (again.seed, again.parameters, str(again.table())) == (0, "backbone", str(found.table()))
    found.plot(tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 10_000
    found.table().to_csv(tmp_path / "d.csv")
    assert (tmp_path / "d.csv").read_text().splitlines()[0].startswith("exit,dominance")
    damaged = bytearray((tmp_path / "d.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "d.safetensors").write_bytes(damaged)
    with pytest.raises(exitkit.FileError, match="damaged"):
        GradientDominance.load(tmp_path / "d.safetensors")
    with pytest.raises(exitkit.FileError, match="cannot be read"):
        GradientDominance.load(tmp_path / "none.safetensors")


def separable(samples: int = 48) -> torch.utils.data.DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(samples) % 3
    images = torch.randn(samples, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) - 1
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8, shuffle=True)


def trained(folder: Path | None = None, **options: Any) -> tuple[exitkit.MultiExitModel, list[Any]]:
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8), every=1, method="sdn")
    trainer = exitkit.Trainer(
        ee, output_dir=folder, show_progress=False, **{"epochs": 3, "regime": "mixed", **options}
    )
    return ee, trainer.fit(separable())


def test_a_run_records_it_and_trains_the_same_weights(tmp_path: Path) -> None:
    plain, _ = trained()
    measured, history = trained(tmp_path, analyse="gradient_dominance", analyse_every=2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name]), name
    assert [record.dominance is None for record in history] == [True, False, True]
    record = history[1]
    assert len(record.dominance) == len(record.ceiling) == 4
    assert all(one <= most + 1e-9 for one, most in zip(record.dominance, record.ceiling, strict=True))
    assert record.ceiling[-1] == pytest.approx(1)
    log = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "dominance/exit0" in log[0]
    assert "dominance_ceiling/exit3" in log[0]


def test_the_first_exits_cosine_is_that_of_its_gradient_with_all_exits_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8), every=1, method=exitkit.ZTW(detach=False), head="1L")
    data = [next(iter(separable()))]
    options: dict[str, Any] = {"epochs": 1, "lr": 1e-12, "show_progress": False, "analyse": "first_exit"}
    (record,) = exitkit.Trainer(ee, output_dir=tmp_path, **options).fit(data)
    ee.train()
    ee.backbone.eval()
    own = list(ee.classifiers[0].parameters())
    losses = [nn.functional.cross_entropy(logits, data[0][1]) for logits in ee(data[0][0]).heads[:-1]]
    first, all_ = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, own, retain_graph=True)])
        for loss in (losses[0], torch.stack(losses).sum())
    )
    wanted = float(nn.functional.cosine_similarity(first, all_, dim=0))
    assert record.first_exit == pytest.approx(wanted, abs=0.02)  # running statistics went on a batch
    assert 0 < wanted < 0.999
    assert "first_exit_cosine" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def test_with_detach_the_first_exits_cosine_is_one() -> None:
    ee = exitkit.attach(TinyNet(), torch.randn(2, 1, 8, 8), every=2, head="1L")
    (record,) = exitkit.Trainer(ee, epochs=1, show_progress=False, analyse="first_exit").fit(separable(8))
    assert record.first_exit == pytest.approx(1)


def test_phases_count_their_own_exits() -> None:
    _, history = trained(regime="mixed-gradual", analyse="gradient_dominance")
    assert [len(record.dominance) for record in history] == [2, 3, 4]


def test_the_trainers_curve_is_of_what_the_exits_share() -> None:
    """The same as the call by itself on the model at the end, which leaves out the last block and the classifier."""
    ee, history = trained(epochs=1, analyse="gradient_dominance")
    found = gradient_dominance(ee, separable(), batches=gradients.ANALYSED)
    assert len(found.gram[0]) == 3
    assert history[0].ceiling == pytest.approx(found.ceiling, rel=1e-4)
    assert history[0].dominance == pytest.approx(found.dominance, abs=1e-4)


def test_a_phase_of_one_exit_shares_nothing() -> None:
    _, history = trained(epochs=1, regime=(Phase((3,), (0, 1, 2, 3)),), analyse="gradient_dominance")
    assert history[0].dominance is None


def test_a_frozen_backbone_is_refused_by_the_trainer(tiny_ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(exitkit.ArgumentError, match="freezes the backbone"):
        exitkit.Trainer(tiny_ee, analyse="gradient_dominance")
    with pytest.raises(exitkit.ArgumentError, match="analyse"):
        exitkit.Trainer(tiny_ee, "mixed", analyse="rank")  # type: ignore[arg-type]
