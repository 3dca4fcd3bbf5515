"""Global past-future exits against the formulas of their authors' code, written out state by state."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import exitkit
from exitkit.exits import PastFuture, PastFutureClassifier
from tests.test_exits import FLAT
from tests.test_exits import WIDTH as HIDDEN
from tests.toy import BLOCK, LINEAR, STEM, TOTAL, TinyNet, images

EXAMPLE = torch.zeros(2, 1, 8, 8)
WIDTH, CLASSES, EXITS = 6, 3, 3


@pytest.fixture
def gpf(tiny_net: TinyNet) -> exitkit.MultiExitModel:
    """Exits after blocks.0, blocks.1 and blocks.2, with states of width 6; in eval mode."""
    return exitkit.attach(tiny_net, EXAMPLE, every=1, method=exitkit.GPF(width=WIDTH)).eval()


def shared(ee: exitkit.MultiExitModel) -> PastFuture:
    first = ee.classifiers[0]
    assert isinstance(first, PastFutureClassifier)
    return first.shared


def states(ee: exitkit.MultiExitModel, features: tuple[Tensor, ...], act: nn.Module) -> list[Tensor]:
    return [act(head.state(head.body(feature))) for head, feature in zip(ee.classifiers, features, strict=True)]


@pytest.mark.parametrize(("variant", "act", "scale"), [("paper", nn.Tanh(), 2), ("ztw", nn.ReLU(), 1)])
def test_an_answer_mixes_the_past_and_the_imitated_future(
    tiny_net: TinyNet, variant: str, act: nn.Module, scale: int
) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, method=exitkit.GPF(variant=variant, width=WIDTH)).eval()
    bank = shared(ee)
    nn.init.normal_(bank.imitate_bias)
    nn.init.normal_(bank.project_bias)
    output = ee(images(5))
    known = states(ee, output.features, act)

    def projected(j: int, state: Tensor) -> tuple[Tensor, Tensor]:
        values = state @ bank.project[j] + bank.project_bias[j]
        return values[:, :CLASSES], values[:, CLASSES:]

    for m in range(EXITS):
        past = [projected(j, known[j]) for j in range(m + 1)]
        imagined = [act(known[m] @ bank.imitate[j - 1] + bank.imitate_bias[j - 1]) for j in range(m + 1, EXITS)]
        future = sum(projected(j, state)[0] for j, state in enumerate(imagined, m + 1))
        gate = torch.sigmoid(bank.gate(act(sum(h for _, h in past) / (m + 1))))
        expected = scale * gate * sum(z for z, _ in past) + scale * (1 - gate) * future
        assert torch.allclose(output.heads[m], expected, atol=1e-5)


def test_the_loss_is_the_distance_from_imitations_to_the_states(gpf: exitkit.MultiExitModel) -> None:
    output, bank = gpf(images(5)), shared(gpf)
    known = states(gpf, output.features, nn.Tanh())
    for m in range(EXITS - 1):
        cosines = [
            F.cosine_similarity(torch.tanh(known[m] @ bank.imitate[j - 1]), known[j]) for j in range(m + 1, EXITS)
        ]
        assert output.auxiliary[m].item() == pytest.approx(1 - torch.stack(cosines).mean().item(), abs=1e-5)
    assert output.auxiliary[-1].item() == 0


def gradients(loss: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def test_states_of_other_exits_are_targets_and_inputs_without_gradient(gpf: exitkit.MultiExitModel) -> None:
    output = gpf(images(5))
    loss = output.heads[1].sum() + output.auxiliary[1]
    assert [gradients(loss, head.state) for head in gpf.classifiers] == [False, True, False]


def test_later_exits_train_the_projections_of_earlier_states(gpf: exitkit.MultiExitModel) -> None:
    """V_0 is part of every exit's answer; only the state before it is held fixed."""
    (gradient,) = torch.autograd.grad(gpf(images(5)).heads[2].sum(), [shared(gpf).project])
    assert all(bool(row.any()) for row in gradient)


def test_without_gradients_the_answers_are_the_same(gpf: exitkit.MultiExitModel) -> None:
    with torch.no_grad():
        quiet = gpf(images(5))
    assert all(torch.equal(a, b) for a, b in zip(quiet.logits, gpf(images(5)).logits, strict=True))
    assert quiet.auxiliary is None


@pytest.mark.parametrize("method", ["sdn", "ztw"])
def test_other_methods_imitate_nothing(tiny_net: TinyNet, method: str) -> None:
    assert exitkit.attach(tiny_net, EXAMPLE, method=method)(images(2)).auxiliary is None


def test_a_batch_is_answered_as_its_samples(gpf: exitkit.MultiExitModel) -> None:
    batch = images(5)
    alone = [gpf(sample[None]).logits for sample in batch]
    for m, logits in enumerate(gpf(batch).logits):
        assert torch.allclose(logits, torch.cat([answers[m] for answers in alone]), atol=1e-5)


def test_what_is_carried_on_suffices_for_the_next_exit(gpf: exitkit.MultiExitModel) -> None:
    """As an engine runs it: one exit at a time, with one tensor of a row per sample between them."""
    output, carried = gpf(images(5)), None
    for head, feature, expected in zip(gpf.classifiers, output.features, output.heads, strict=False):
        step = head.step(feature, carried, [])
        assert torch.equal(step.logits, expected)
        assert step.carried.shape == (5, head.carries)
        carried = step.carried[:, :]


def test_an_exit_asks_for_what_the_one_before_it_carried_on(gpf: exitkit.MultiExitModel) -> None:
    feature = gpf(images(2)).features[1]
    for carried in (None, torch.zeros(2, CLASSES)):
        with pytest.raises(exitkit.ExitkitError, match=r"exit 1 .*tensor \(B, 6\).*carried"):
            gpf.classifiers[1](feature, carried)


def test_imitations_lose_their_error_when_trained(gpf: exitkit.MultiExitModel) -> None:
    optimizer, batch = torch.optim.Adam(shared(gpf).parameters(), lr=0.02), images(16)
    before = sum(loss.item() for loss in gpf(batch).auxiliary)
    for _ in range(40):
        optimizer.zero_grad()
        sum(gpf(batch).auxiliary).backward()
        optimizer.step()
    assert sum(loss.item() for loss in gpf(batch).auxiliary) < 0.2 * before


def test_a_single_exit_has_no_future(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, at=["blocks.1"], method="gpf")
    output = ee(images(2))
    (output.logits[0].square().sum() + output.auxiliary[0]).backward()
    assert output.auxiliary[0].item() == 0
    assert shared(ee).project.grad.any()


# widths, price, files ------------------------------------------------------------------------------------------------


def test_maps_are_reduced_to_128(tiny_net: TinyNet) -> None:
    assert shared(exitkit.attach(tiny_net, EXAMPLE, method="gpf")).width == 128


def test_tokens_keep_their_width() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
            self.linear = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.layers:
                x = block(x)
            logits: Tensor = self.linear(x[:, 0])
            return logits

    assert shared(exitkit.attach(Tokens(), torch.randn(2, 5, 12), method="gpf")).width == 12


def test_the_price_is_state_imitations_and_projections(gpf: exitkit.MultiExitModel) -> None:
    """At exit m: one projection of the past to 2C values, and per exit to come an imitation and its C logits."""
    spent, expected = 0, []
    for m in range(EXITS):
        ahead = EXITS - 1 - m
        spent += (
            FLAT * HIDDEN + HIDDEN * WIDTH + WIDTH * 2 * CLASSES + ahead * (WIDTH**2 + WIDTH * CLASSES) + CLASSES**2
        )
        expected.append(STEM + BLOCK * (m + 1) + spent)
    assert [exit_.macs for exit_ in gpf.exits] == [*expected, TOTAL + spent]
    assert TOTAL == STEM + 4 * BLOCK + LINEAR


def test_shared_weights_are_saved_once_and_come_back(gpf: exitkit.MultiExitModel, tmp_path: Path) -> None:
    gpf.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(exitkit.detach(gpf), tmp_path, EXAMPLE).eval()
    assert again.method == gpf.method
    assert all(torch.equal(a, b) for a, b in zip(again(images(4)).logits, gpf(images(4)).logits, strict=True))
    names = list(gpf.classifiers.state_dict())
    assert [name for name in names if "imitate" in name] == ["0.shared.imitate", "0.shared.imitate_bias"]


def test_a_copy_shares_nothing_with_the_original(gpf: exitkit.MultiExitModel) -> None:
    other = copy.deepcopy(gpf)
    nn.init.zeros_(shared(other).project)
    assert other.classifiers[1].shared is shared(other)  # type: ignore[union-attr]
    assert gpf.classifiers[1].shared is shared(gpf)  # type: ignore[union-attr]
    assert other(images(2)).heads[1].eq(0).all()


def test_another_precision_reaches_the_shared_part(gpf: exitkit.MultiExitModel) -> None:
    output = gpf.double()(images(2).double())
    assert {logits.dtype for logits in output.heads} == {torch.float64}


def test_an_ensemble_may_follow(tiny_net: TinyNet) -> None:
    ee = exitkit.attach(tiny_net, EXAMPLE, method=exitkit.GPF(ensemble="geometric")).eval()
    output = ee(images(2))
    assert torch.equal(
        output.logits[1], ee.combiners[1](torch.stack([z.log_softmax(-1) for z in output.heads[:2]], 1))
    )


# configs -------------------------------------------------------------------------------------------------------------


def test_the_variants_leave_by_their_own_criterion() -> None:
    assert [exitkit.GPF(variant=variant).criterion for variant in ("paper", "ztw")] == ["entropy", "confidence"]
    assert exitkit.GPF(criterion="nats").criterion == "nats"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "papr"}, "variant='papr' is unknown.*Did you mean 'paper'"),
        ({"variant": None, "width": 8}, "variant=None must be"),
        ({"width": 0}, "width=0 must be a whole number"),
        ({"width": 8.0}, r"width=8\.0 must be a whole number"),
        ({"cascade": True}, "two links; choose one"),
    ],
)
def test_impossible_configs_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=message):
        exitkit.GPF(**options)  # type: ignore[arg-type]
