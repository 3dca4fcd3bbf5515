"""Progress of what takes long: a bar where there is a terminal, lines where there is none, nothing where it is not wanted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

import exitkit
from exitkit.common import console

Loader = Callable[..., DataLoader[tuple[Tensor, ...]]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every item instead of one in ten seconds."""
    monkeypatch.setattr(console, "_PAUSE", -1.0)


@pytest.mark.usefixtures("impatient")
def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.tracked("abc", "letters")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["letters: 1 of 3", "letters: 2 of 3"]
    assert all(line.endswith("s left") for line in lines)
    assert list(console.tracked(iter("abc"), "letters", of=object())) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["letters: 1", "letters: 2"]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.tracked(range(1000), "numbers")) == list(range(1000))
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(console.tracked("abc", "letters")) == ["a", "b", "c"]
    assert "letters" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    before = len(terminal.getvalue())
    assert list(console.tracked("abc", "letters", shown=False)) == ["a", "b", "c"]
    assert len(terminal.getvalue()) == before


@pytest.mark.usefixtures("impatient")
def test_what_takes_long_shows_progress(
    tiny_ee: exitkit.MultiExitModel, loader: Loader, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(run: Callable[[], Any]) -> str:
        run()
        return capsys.readouterr().err

    batches = loader(48, 16)
    assert "batches collected: 2 of 3" in said(lambda: exitkit.collect(tiny_ee, batches))
    assert said(lambda: exitkit.collect(tiny_ee, batches, show_progress=False)) == ""
    assert "ensembles fitted: 2 of 3" in said(lambda: exitkit.training.fit_ensemble(tiny_ee, batches))
    trained = said(lambda: exitkit.Trainer(tiny_ee, epochs=1, cache=True).fit(batches))
    assert "batches cached: 2 of 3" in trained
    assert "batches for the ensemble: 2 of 3" in trained
    assert said(lambda: exitkit.Trainer(tiny_ee, epochs=1, cache=True, show_progress=False).fit(batches)) == ""


def test_a_run_says_that_it_goes_on_once_its_checkpoint_is_accepted(
    tiny_ee: exitkit.MultiExitModel, loader: Loader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(epochs: int, **options: Any) -> str:
        exitkit.Trainer(tiny_ee, epochs=epochs, output_dir=tmp_path, **options).fit(loader())
        return capsys.readouterr().err

    assert "going on" not in said(1)
    with pytest.raises(exitkit.ArgumentError, match="made with epochs=1"):
        said(2)
    assert "going on" not in capsys.readouterr().err
    assert said(1).startswith(f"going on from {tmp_path / 'checkpoint.pt'}\n")
    assert said(1, show_progress=False) == ""
