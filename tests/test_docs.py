"""Every Python block of the documentation runs, page by page; every command in it exists, with its options."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, HOME = ROOT / "README.md", ROOT / "docs" / "index.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RUN = [README, *(page for page in PAGES if page != HOME)]
"""Pages whose code is run; that of the site's first page is the README's."""
_FENCE = re.compile(r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)^\1```[ \t]*$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line number and contents of the page's fenced blocks in a language, those inside of admonitions too."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found[2] == language:
            yield text.count("\n", 0, found.start()) + 2, textwrap.dedent(found[3])


def run(page: Path, namespace: dict[str, Any]) -> None:
    """The page's blocks in order, in one namespace; errors point at the page's own lines."""
    for line, block in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """What is typed after ``exitkit``, from console blocks; a backslash continues a line."""
    text = "\n".join(block for _, block in blocks(page, "console")).replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in text.splitlines() if line.strip().startswith("$ exitkit ")]


@pytest.mark.parametrize("page", [page for page in RUN if any(blocks(page, "python"))], ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, {"__name__": "page"})


@pytest.mark.parametrize("page", [page for page in [README, *PAGES] if commands(page)], ids=name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    typer = pytest.importorskip("typer")
    from exitkit.cli.app import app

    group = typer.main.get_command(app)
    for line in commands(page):
        command, *arguments = shlex.split(line, comments=True)[1:]
        assert command in group.commands, line
        group.commands[command].make_context(command, arguments)  # refuses unknown options and missing ones


def test_the_site_builds(tmp_path: Path) -> None:
    """Every link and every name in the reference is found."""
    pytest.importorskip("material", reason="the site needs: pip install 'exitkit[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs: pip install 'exitkit[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    html = (tmp_path / "reference" / "exitkit" / "index.html").read_text(encoding="utf-8")
    for function in (
        "inspect",
        "attach",
        "compile",
        "export",
        "load",
    ):  # the function, not the module of the same name
        assert f'{function}</span><span class="p">(</span>' in html
    assert "STATE_WIDTH" not in html
    assert ":func:" not in html


def test_blocks_are_found_with_their_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# T\n\n??? note\n    ```python\n    a = 1\n    ```\n\n```python\nassert a == 2\n```\n")
    assert list(blocks(page, "python")) == [(5, "a = 1\n"), (9, "assert a == 2\n")]
    with pytest.raises(AssertionError) as failed:
        run(page, {})
    assert failed.traceback[-1].lineno == 8  # counted from 0
