"""The page of errors tells what exitkit says: each is brought about here, and its text compared with the page's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import exitkit
from tests.test_docs import ROOT, blocks
from tests.toy import TinyNet

PAGE = ROOT / "docs" / "guides" / "how-it-fails.md"
X = torch.randn(2, 1, 8, 8)


def sections() -> dict[str, str]:
    """Each error's heading, and the message below it in one line."""
    text = PAGE.read_text(encoding="utf-8")
    messages = [" ".join(block.split()) for _, block in blocks(PAGE, "text")]
    return dict(zip(re.findall(r"^### (.+)$", text, re.MULTILINE), messages, strict=True))


class Wrong(nn.Module):
    """A classifier of vectors with four features whose forward is one of the mistakes."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.mistake = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.mistake(self.linear, x)


def tiny(**options: Any) -> exitkit.MultiExitModel:
    return exitkit.attach(TinyNet(), X, every=1, head="1L", **options)


def pairs(samples: int, classes: int = 3) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(samples) % classes), 32)


def attached_to(forward: Callable[[nn.Linear, Tensor], Tensor]) -> Callable[[Path], object]:
    return lambda _: exitkit.attach(Wrong(forward), torch.randn(2, 4))


def saved_for_another_backbone(folder: Path) -> None:
    tiny().save_pretrained(folder / "exits")
    exitkit.MultiExitModel.from_pretrained(TinyNet(), folder / "exits")


def trained_on(_: Path) -> None:
    loader = pairs(600)
    outputs = exitkit.collect(tiny(), loader)
    exitkit.choose_threshold(outputs, max_drop=0.02, exclude=exitkit.evaluation.content_hashes(loader))


def damaged(folder: Path) -> None:
    (folder / "model.pt2").write_bytes(b"PK\x03\x04 half of a package")
    exitkit.load(folder / "model.pt2", trust=True)


def other_settings(folder: Path) -> None:
    ee = tiny()
    for lr in (1e-3, 1e-2):
        exitkit.Trainer(ee, epochs=1, lr=lr, output_dir=folder / "run").fit(pairs(32))


BROUGHT_ABOUT: dict[str, Callable[[Path], object]] = {
    "The input is not known": lambda _: exitkit.attach(nn.Sequential(nn.Linear(4, 3))),
    "The example input does not fit": lambda _: exitkit.attach(TinyNet(), torch.randn(2, 4)),
    "The model cannot be captured": attached_to(lambda linear, x: linear(x) if x.sum() > 0 else linear(-x)),
    "The forward fixes the batch size": attached_to(lambda linear, x: linear(x).view(1, 3)),
    "The model returns something else than logits": attached_to(
        lambda linear, x: linear(x)[:, None].expand(-1, 5, -1)
    ),
    "There is no such boundary": lambda _: exitkit.attach(TinyNet(), X, at=["layer9"]),
    "Inputs of another kind than at attach": lambda _: exitkit.compile(tiny(), 0.5)(torch.zeros(2, 1, 8, 8).byte()),
    "Labels that the model has not": lambda _: exitkit.Trainer(tiny(), epochs=1).fit(pairs(32, classes=10)),
    "The loader yields no labels": lambda _: exitkit.Trainer(tiny(), epochs=1).fit([X]),
    "The training diverged": lambda _: exitkit.Trainer(tiny(), epochs=9, lr=1e30).fit(pairs(320)),
    "Another run is in the folder": other_settings,
    "The budget is too small": lambda _: exitkit.collect(tiny(), pairs(32)).curve().at_budget(0.01),
    "Too few samples for the promise": lambda _: exitkit.choose_threshold(
        exitkit.collect(tiny(), pairs(64)), max_drop=0.01
    ),
    "The promise was to be made on training samples": trained_on,
    "No threshold was given": lambda _: exitkit.compile(tiny()),
    "The saved exits are of another backbone": saved_for_another_backbone,
    "The package is damaged": damaged,
    "There is no such device": lambda folder: (
        exitkit.export(tiny(), folder / "model.pt2", threshold=0.5),
        exitkit.load(folder / "model.pt2", trust=True, device="cuda:99"),
    ),
    "The model's name is not understood": lambda _: load_model("resnet18"),
}


def load_model(name: str) -> nn.Module:
    pytest.importorskip("typer")
    from exitkit.cli import sources

    return sources.load_model(name, None, None)


def test_there_are_twenty_and_most_are_brought_about() -> None:
    assert len(sections()) == 20
    assert set(BROUGHT_ABOUT) <= set(sections())


@pytest.mark.parametrize("title", BROUGHT_ABOUT)
def test_the_page_has_what_is_said(title: str, tmp_path: Path) -> None:
    """``…`` on the page stands for anything: torch's own words, say, or numbers that are not the point."""
    if torch.cuda.is_available() and "device" in title:
        pytest.skip("its words are those of a machine without a GPU")
    with pytest.raises(exitkit.ExitkitError) as caught:
        BROUGHT_ABOUT[title](tmp_path)
    said = " ".join(str(caught.value).split())
    pattern = ".*".join(re.escape(part) for part in sections()[title].split("…"))
    assert re.fullmatch(pattern, said), said
