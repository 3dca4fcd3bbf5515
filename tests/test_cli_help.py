"""What the command line says of itself: help as it was reviewed, the version, what there is to run on, and quiet.

python -m tests.test_cli_help writes the help that the test compares with; read what changed before it is committed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import exitkit
from exitkit.common.console import tracked, without_progress

typer = pytest.importorskip("typer", reason="the command line needs: pip install 'exitkit[cli]'")
from typer.testing import CliRunner  # noqa: E402

from exitkit.cli import main  # noqa: E402
from exitkit.cli.app import app  # noqa: E402

REVIEWED = Path(__file__).parent / "help.txt"
WIDTH = 80


def groups(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of the group and of every command in it."""
    yield path
    for name, command in group.commands.items():
        yield from groups(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]


def helps() -> str:
    """Every command's help, as wide as an ordinary terminal."""
    texts = []
    for path in groups(typer.main.get_command(app)):
        result = CliRunner().invoke(app, [*path, "--help"], prog_name="exitkit", terminal_width=WIDTH)
        assert result.exit_code == 0, path
        texts.append(re.sub(r" +$", "", result.output, flags=re.MULTILINE).rstrip())
    return "\n\n\n".join(texts) + "\n"


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    monkeypatch.setattr("sys.argv", ["exitkit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return (stop.value.code, *capsys.readouterr())


def test_help_is_what_was_reviewed() -> None:
    assert helps() == REVIEWED.read_text(encoding="utf-8"), "python -m tests.test_cli_help writes it anew"


def test_help_fits_a_terminal_and_gives_an_example_of_every_command() -> None:
    text = REVIEWED.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= WIDTH + 20  # an example may be longer: it is to be copied
    described = [line for line in text.splitlines() if not line.startswith("    exitkit ")]
    assert max(map(len, described)) <= WIDTH
    examples = re.findall(r"^    exitkit (\S+)", text, re.MULTILINE)
    assert {path[0] for path in groups(typer.main.get_command(app)) if path} <= set(examples)


def test_examples_are_commands_that_exist() -> None:
    group = typer.main.get_command(app)
    for command, *arguments in (
        line.split() for line in re.findall(r"^    exitkit (.+)$", REVIEWED.read_text(encoding="utf-8"), re.MULTILINE)
    ):
        group.commands[command].make_context(command, arguments)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, capsys, "--version") == (0, f"exitkit {exitkit.__version__}\n", "")


def test_completion_can_be_installed() -> None:
    options = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    assert {"--install-completion", "--show-completion"} <= options


def test_verbose_shows_where_an_error_was_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, brief = call(monkeypatch, capsys, "inspect", "resnet18")
    assert code == 2
    assert "Traceback" not in brief
    assert len(brief.splitlines()) <= 2
    code, _, long = call(monkeypatch, capsys, "-v", "inspect", "resnet18")
    assert code == 2
    assert "Traceback" in long
    assert long.endswith(brief)
    assert call(monkeypatch, capsys, "inspect", "-v")[0] == 2  # not an option of a command


def test_quiet_hides_progress_and_warnings_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    ee = exitkit.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 4), at=["0"])
    data = [(torch.randn(8, 4), torch.arange(8) % 3)]
    with without_progress(), warnings.catch_warnings(record=True) as heard:
        exitkit.Trainer(ee, epochs=1).fit(data)
        assert list(tracked(range(3), "counted")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert heard == []
    exitkit.Trainer(ee, epochs=1).fit(data)
    assert "epoch 1" in capsys.readouterr().err


def test_doctor_tells_what_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = call(monkeypatch, capsys, "doctor", "--json", "--no-compiling")
    assert code == 0
    found = json.loads(printed)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["exitkit"] == exitkit.__version__
    assert found["machine"]["devices"].startswith("cpu")
    assert found["machine"]["threads"].startswith(f"{torch.get_num_threads()} of")
    for what in ("attach", "run", "export .pt2"):
        assert found["works here"][what].startswith("yes"), found["works here"]
    assert "compile" not in found["works here"]


def test_doctor_says_what_does_not_work() -> None:
    from exitkit.cli.doctor import tried

    def broken() -> None:
        raise RuntimeError("no compiler\nand more")

    assert tried(broken) == "no: RuntimeError: no compiler"


def test_inspect_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = call(monkeypatch, capsys, "inspect", "tests.toy:net", "--image-size", "8", "--json")
    assert code == 0
    found = json.loads(printed)
    assert sum(stage["macs"] for stage in found["stages"]) == found["macs"]
    assert {"blocks.0", "blocks.1"} <= set(found["boundaries"])


@pytest.mark.parametrize("budgets", ["", "25,x", "0,50", "-5", "nan", "inf", "25,1001"])
def test_budgets_that_are_none_are_refused(budgets: str) -> None:
    from exitkit.cli.options import shares_of

    assert shares_of("25, 35,112.5,1000") == [0.25, 0.35, 1.125, 10.0]
    with pytest.raises(exitkit.ArgumentError, match="--budgets"):
        shares_of(budgets)


def test_a_table_of_budgets_of_ones_own_says_what_a_dash_means() -> None:
    from exitkit.cli.bench import comparison_table, over_budget

    log_probs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]] * 4).log()
    outputs = exitkit.ExitOutputs(
        log_probs, torch.tensor([0, 0, 1, 1]), macs=torch.tensor([4.0, 10.0]), backbone_macs=10.0
    )
    rows = outputs.curve().budget_table([0.3, 0.5]).rows
    assert [*rows][:2] == ["30%", "50%"]
    assert rows["30%"] is None
    assert rows["50%"] is not None
    table = comparison_table({"sdn": outputs}, "title", [0.3, 0.5])
    assert [column.header for column in table.columns][2:4] == ["30%", "50%"]
    usual = comparison_table({"branchynet": outputs}, "title")  # of the budgets of the papers
    assert Console(width=200).measure(usual).maximum <= 80
    both = comparison_table({"sdn": outputs}, "title", [0.5], top=2)
    assert [list(column.cells) for column in both.columns][:3] == [
        ["sdn", "sdn, top 2"],
        ["+0.0%"] * 2,
        ["50.00%", "100.00%"],
    ]
    (line,) = over_budget({"sdn": outputs}, [0.3, 0.5])
    assert "30%" in line
    assert "40.0%" in line
    assert over_budget({"sdn": outputs}, [0.5]) == []


if __name__ == "__main__":
    REVIEWED.write_text(helps(), encoding="utf-8")
