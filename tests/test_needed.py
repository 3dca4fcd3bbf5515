"""Training runs what its losses read: the backbone stops after the last exit that counts or teaches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import exitkit
from exitkit import GPF, MultiExitModel, Trainer
from exitkit.training import Distillation, Loss, Phase, step
from tests.toy import TinyNet

Loaders = Callable[..., DataLoader[tuple[Tensor, ...]]]

LABELS = Loss()
LAST, NEXT = (Loss(distillation=Distillation(teachers)) for teachers in ("last", "next"))
ANOTHER = Loss(distillation=Distillation(TinyNet()))
SECOND = (Phase((1,), (1,)),)
"""One phase: the second exit and its stage."""


@pytest.fixture
def ee(tiny_net: TinyNet) -> MultiExitModel:
    """SDN, exits after blocks 0, 1 and 2 of four; its own classifier is exit 3."""
    return exitkit.attach(tiny_net, torch.randn(2, 1, 8, 8), every=1, method="sdn")


def fitted(ee: MultiExitModel, batches: Any, **options: Any) -> MultiExitModel:
    Trainer(ee, **({"epochs": 1, "lr": 1e-2, "show_progress": False} | options)).fit(batches)
    return ee


def blocks_run(ee: MultiExitModel, batches: Any, **options: Any) -> list[bool]:
    """Of each of the four blocks, whether it runs in every step; a regime may look at the graph of all of them before."""
    calls = [0] * 4

    def count(block: int) -> None:
        calls[block] += 1

    for block, module in enumerate(ee.backbone.blocks):
        module.register_forward_hook(lambda module, args, output, block=block: count(block))
    fitted(ee, batches, **options)
    assert all(count < 3 or count >= len(batches) for count in calls)
    return [count >= len(batches) for count in calls]


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 3),
        ({"loss": ANOTHER}, 3),
        ({"loss": LAST}, 4),
        ({"loss": NEXT}, 4),
        ({"regime": SECOND}, 2),
        ({"regime": SECOND, "loss": NEXT}, 3),
        ({"regime": "mixed"}, 4),
    ],
)
def test_nothing_runs_behind_the_last_exit_that_is_read(
    ee: MultiExitModel, loader: Loaders, options: dict[str, Any], blocks: int
) -> None:
    assert blocks_run(ee, loader(), **options) == [block < blocks for block in range(4)]


@pytest.mark.parametrize(
    "options",
    [{}, {"regime": "branch-wise", "epochs": 4}, {"regime": SECOND, "loss": NEXT}, {"loss": ANOTHER}],
    ids=["disjoint", "branch-wise", "next teaches", "another model teaches"],
)
def test_the_weights_learned_are_those_of_the_whole_pass(
    ee: MultiExitModel, loader: Loaders, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    whole = copy.deepcopy(ee)
    fitted(ee, loader(), **options)
    monkeypatch.setattr(step, "last_needed", lambda exits, distillation, model: len(model.classifiers))
    ran = blocks_run(whole, loader(), **options)
    assert ran[3]
    other = whole.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in ee.state_dict().items())


def test_imitations_of_later_exits_need_these(tiny_net: TinyNet, loader: Loaders) -> None:
    """GPF's exits learn to imitate the states of the exits behind them."""
    ee = exitkit.attach(tiny_net, torch.randn(2, 1, 8, 8), every=1, method=GPF())
    assert blocks_run(ee, loader(), regime=(Phase((0,), (0,)),)) == [True, True, True, False]


def test_a_backbone_that_catches_exceptions_is_stopped_too(loader: Loaders) -> None:
    class Careful(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            out = self.stem(x)
            for block in self.blocks:
                try:
                    out = block(out)
                except Exception:
                    out = out * 0
            logits: Tensor = self.linear(out.mean((2, 3)))
            return logits

    ee = exitkit.attach(Careful(), torch.randn(2, 1, 8, 8), every=1, method="sdn")
    assert blocks_run(ee, loader()) == [True, True, True, False]


def test_a_hugging_face_model_is_as_before_after_being_stopped() -> None:
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
    }
    torch.manual_seed(0)
    bert: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**size)).eval()
    ids = torch.randint(1, 20, (4, 6))
    before = bert(ids, output_hidden_states=True)
    ee = exitkit.attach(bert, {"input_ids": ids[:2]}, every=1, method="sdn", head="1L")
    ran: list[nn.Module] = []
    bert.bert.encoder.layer[2].register_forward_hook(lambda module, args, output: ran.append(module))
    fitted(ee, [{"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}])
    assert not ran
    after = bert(ids, output_hidden_states=True)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(*pair) for pair in zip(after.hidden_states, before.hidden_states, strict=True))
