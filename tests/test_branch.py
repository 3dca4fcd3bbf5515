"""Heads that copy the rest of the backbone without some of its blocks, and a head of its own for each exit."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from exitkit.exits.copied.shorten import gaps
from exitkit.models import cifar_resnet
from exitkit.surgery.boundaries import Activation, Boundary, ModuleCall
from tests.toy import BLOCK, LINEAR, STEM, TinyBlock, TinyNet, all_equal, images

transformers = pytest.importorskip("transformers")


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(20).eval()


def test_an_untrained_branch_is_the_backbone_without_those_blocks() -> None:
    model, x = _resnet(), images(2, 3, 32, 32)
    ee = exitkit.attach(model, at=["layer1.0", "layer2.1"], head=["branch-2", "branch-1"], method="sdn").eval()
    first, second = ee(x).features
    with torch.no_grad():
        rest = [model.layer1[2], model.layer2[0], model.layer2[2], model.layer3[0], model.layer3[2]]
        assert torch.equal(ee(x).heads[0], model.linear(nn.Sequential(*rest)(first).mean((2, 3))))
        assert torch.equal(ee(x).heads[1], model.linear(model.layer3[0](second).mean((2, 3))))


def test_text_reads_its_mask_in_every_block_that_is_left() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 99, "num_labels": 5}
    config = transformers.BertConfig(num_hidden_layers=4, initializer_range=0.3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 99, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    ee = exitkit.attach(model, batch, at=["bert.encoder.layer.0"], head="branch-2", method="sdn").eval()
    heads = ee(**batch).heads
    model.bert.encoder.layer = nn.ModuleList([model.bert.encoder.layer[0], model.bert.encoder.layer[3]])
    model.config.num_hidden_layers = 2
    torch.testing.assert_close(heads[0], model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_blocks_before_the_exit_count() -> None:
    model = TinyNet().eval()
    short = exitkit.attach(model, images(), at=["blocks.1"], head="branch-2", method="sdn").eval()
    tail = exitkit.attach(model, images(), at=["blocks.1"], head="tail", method="sdn").eval()
    assert torch.equal(short(images()).heads[0], tail(images()).heads[0])


def test_the_price_of_a_branch() -> None:
    ee = exitkit.attach(TinyNet().eval(), images(), at=["blocks.0"], head="branch-3", method="sdn")
    assert ee.exits[0].macs == STEM + 3 * BLOCK + LINEAR


def test_its_batch_norm_learns_and_the_backbones_does_not() -> None:
    model = TinyNet().eval().requires_grad_(False)
    ee = exitkit.attach(model, images(), at=["blocks.0"], head="branch-2", method="sdn")
    before = {name: tensor.clone() for name, tensor in ee.state_dict().items()}
    exitkit.Trainer(ee, epochs=1, show_progress=False).fit([(images(8), torch.arange(8) % 3)])
    changed = {name for name, tensor in ee.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("backbone.") for name in changed)
    assert sum(name.endswith("running_mean") for name in changed) == 1
    trained = {name: tensor.clone() for name, tensor in ee.state_dict().items()}
    ee.eval()(images(4))
    assert all(torch.equal(trained[name], tensor) for name, tensor in ee.state_dict().items())


@pytest.mark.parametrize("method", ["sdn", "ztw"])
def test_branches_are_saved_and_really_stop(method: str, tmp_path: Path) -> None:
    model, x = _resnet(), images(6, 3, 32, 32)
    ee = exitkit.attach(model, at=["layer1.0", "layer1.2"], head=["branch-1", "branch-2"], method=method).eval()
    with torch.no_grad():
        for classifier in ee.classifiers:
            classifier.linear.weight.normal_()
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(model, tmp_path).eval()
    assert again.head == ("branch-1", "branch-2")
    with torch.no_grad():
        logits = ee(x).logits
        assert all_equal(again(x).logits, logits)
    scores = logits[0].softmax(1).amax(1)  # also of log-probabilities, which ztw's ensemble gives
    tau = float(scores.sort().values[2:4].mean())
    prediction = exitkit.compile(ee, tau)(x)
    assert 0 < int((prediction.exit == 0).sum()) < 6
    expected = torch.stack(logits, 1)[torch.arange(6), prediction.exit]
    torch.testing.assert_close(prediction.logits, expected, rtol=1e-5, atol=1e-5)


def test_pruning_keeps_each_exits_head() -> None:
    ee = exitkit.attach(_resnet(), at=["layer1.0", "layer1.2"], head=["1L", "branch-2"], method="sdn")
    assert ee.prune_exits([0]).head == ("branch-2",)


class WideningBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = TinyBlock(channels)
        self.wider = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        wider: Tensor = self.wider(self.block(x))
        return wider


class Widening(nn.Module):
    """Every block has a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(WideningBlock(8 * 2**i) for i in range(3)))
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.blocks(x).mean((2, 3)))
        return logits


def test_bad_branches() -> None:
    with pytest.raises(ExitkitError, match=r"head='branch-1' at 'blocks.0' would be all the rest of the backbone"):
        exitkit.attach(Widening(), images(2, 8), at=["blocks.0"], head="branch-1")
    with pytest.raises(ExitkitError, match=r"head='branch-0' is unknown.* Allowed are .*'branch-3'"):
        exitkit.attach(TinyNet(), images(), every=1, head="branch-0")
    with pytest.raises(ExitkitError, match=r"head=\['1L', 'conv'\] has 2 heads for 3 exits"):
        exitkit.attach(TinyNet(), images(), every=1, head=["1L", "conv"])
    with pytest.raises(ExitkitError, match=r"head=\[\] is unknown"):
        exitkit.attach(TinyNet(), images(), every=1, head=[])


def _block(index: int, width: int) -> Boundary:
    made = (Activation(f"add_{index}", (width, 4, 4), "channels_first"),)
    return Boundary(ModuleCall(f"blocks.{index}", 0, "Block"), 0, (), made, 0, 10 * index + 9, True, 0, 0.0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_what_is_left_is_short_and_fits_together(runs: list[int], most: int, data: st.DataObject) -> None:
    widths = [8 * 2**stage for stage, length in enumerate(runs) for _ in range(length)]
    blocks = [_block(index, width) for index, width in enumerate(widths)]
    start = data.draw(st.integers(0, len(blocks) - 1))
    dropped: set[int] = set()
    for before, after in gaps(blocks, blocks[start], most):
        assert before.shape == after.shape
        assert before.position >= blocks[start].position
        dropped |= set(range(blocks.index(before) + 1, blocks.index(after) + 1))
    kept = [index for index in range(len(blocks)) if index not in dropped]
    for width, run in groupby(kept, key=lambda index: widths[index]):
        before_exit = sum(w == width for w in widths[: start + 1])
        assert len(list(run)) == max(min(most, widths.count(width)), before_exit)
    changes = [index for index in range(1, len(widths)) if widths[index] != widths[index - 1]]
    assert not dropped & {index for index in changes if index > start}
