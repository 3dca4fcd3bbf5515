"""Videos and volumes: maps behind one another in time or depth, which heads read as their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from exitkit.surgery.default_inputs import example_for

CLIPS = torch.randn(12, 2, 6, 8, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def block(channels: int = 4, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv3d(4, channels, 3, stride, padding=1), nn.BatchNorm3d(channels), nn.ReLU())


class Clips(nn.Module):
    """Channels first, as torchvision's video ResNets; it ends in a convolution, as S3D."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 4, 1)
        self.blocks = nn.Sequential(block(), block(), block(stride=2), block())
        self.classifier = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3, 4), keepdim=True)).flatten(1)
        return logits


class ClipsLast(nn.Module):
    """Channels last, as torchvision's video Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 5, 1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.GELU()) for _ in range(4)))
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.blocks(self.stem(x).permute(0, 2, 3, 4, 1)).mean((1, 2, 3)))
        return logits


MODELS = [Clips, ClipsLast]


@pytest.fixture(params=MODELS, ids=lambda model: model.__name__)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    model: nn.Module = request.param()
    return model.eval()


def test_their_dimensions_are_told_apart() -> None:
    found = [exitkit.attach(model().eval(), CLIPS[:2], every=1).boundaries[0] for model in MODELS]
    assert [(one.layout, one.shape) for one in found] == [
        ("channels_first", (4, 6, 8, 10)),
        ("channels_last", (6, 8, 10, 5)),
    ]


def test_an_exit_reads_the_mean_over_time(backbone: nn.Module) -> None:
    """As appendix A.1 of Zero Time Waste pools maps, here with γ as it begins."""
    ee = exitkit.attach(backbone, CLIPS[:2], at=["blocks.1"], method="sdn", head="1L").eval()
    output = ee(CLIPS)
    volume = output.features[0] if isinstance(backbone, Clips) else output.features[0].permute(0, 4, 1, 2, 3)
    maps = volume.mean(2)
    pooled = (F.adaptive_avg_pool2d(maps, 4) + F.adaptive_max_pool2d(maps, 4)) / 2
    linear: Any = ee.classifiers[0].linear
    torch.testing.assert_close(output.logits[0], F.linear(pooled.flatten(1), linear.weight, linear.bias))


@pytest.mark.parametrize("head", ["1L", "2L-8", "conv", "separable", "strided", "msdnet(width=4)", "tail", "branch-1"])
def test_the_engine_answers_each_sample_as_its_exit_does(backbone: nn.Module, head: str) -> None:
    at = ["blocks.0"] if head == "branch-1" else ["blocks.0", "blocks.1"]
    ee = exitkit.attach(backbone, CLIPS[:2], at=at, method="sdn", head=head).eval()
    with torch.no_grad():
        output, expected = ee(CLIPS), backbone(CLIPS)
        assert torch.equal(output.heads[-1], expected)
        scores = torch.stack([logits.softmax(-1).amax(-1) for logits in output.logits[:-1]], 1)
        middle = scores.sort(0).values[5:7].mean(0)
        sure = scores > middle
        exits = torch.where(sure.any(1), sure.int().argmax(1), len(at))
        prediction = exitkit.compile(ee, middle.tolist())(CLIPS)
    assert torch.equal(prediction.exit, exits)
    assert len(set(exits.tolist())) > 1
    answers = torch.stack(output.logits)[exits, torch.arange(len(CLIPS))]
    torch.testing.assert_close(prediction.logits, answers)
    assert torch.equal(exitkit.compile(ee, 2.0)(CLIPS).logits, expected)


def test_an_untrained_tail_after_the_last_block_is_the_model_itself(backbone: nn.Module) -> None:
    ee = exitkit.attach(backbone, CLIPS[:2], at=["blocks.3"], method="sdn", head="tail").eval()
    torch.testing.assert_close(ee(CLIPS).logits[0], backbone(CLIPS))


def test_cached_features_train_the_same_exits(backbone: nn.Module) -> None:
    loader = DataLoader(TensorDataset(CLIPS, LABELS), 4)
    trained = []
    for cache in (True, False):
        torch.manual_seed(1)
        ee = exitkit.attach(backbone, CLIPS[:2], at=["blocks.1"], method="sdn")
        exitkit.Trainer(ee, regime="disjoint", epochs=2, cache=cache, show_progress=False).fit(loader)
        trained.append(ee.eval()(CLIPS).logits[0])
    torch.testing.assert_close(*trained)


def test_a_package_answers_as_the_engine(backbone: nn.Module, tmp_path: Path) -> None:
    ee = exitkit.attach(backbone, CLIPS[:2], at=["blocks.0", "blocks.1"]).eval()
    exitkit.export(ee, tmp_path / "clips.pt2", threshold=0.4)
    package, engine = exitkit.load(tmp_path / "clips.pt2", trust=True), exitkit.compile(ee, 0.4)
    for rows in (CLIPS, CLIPS[:1]):
        answered, expected = package(rows), engine(rows)
        assert torch.equal(answered.exit, expected.exit)
        torch.testing.assert_close(answered.logits, expected.logits)


def test_other_classes_replace_a_last_convolution() -> None:
    ee = exitkit.attach(Clips().eval(), CLIPS[:2], num_classes=7)
    assert ee(CLIPS).logits[-1].shape == (12, 7)


def test_inspect_names_the_dimension_before_the_height(capsys: pytest.CaptureFixture[str]) -> None:
    exitkit.inspect(Clips().eval(), CLIPS[:2])
    assert "4 × 6 × 8 × 10 CTHW" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "side"), [("r3d_18", 112), ("swin3d_t", 224)])
def test_torchvision_video_models_declare_their_clips(name: str, side: int) -> None:
    video = pytest.importorskip("torchvision.models.video")
    with torch.device("meta"):
        model = getattr(video, name)()
    assert example_for(model).tensors[0].shape == (2, 3, 16, side, side)
