"""What a newcomer meets first: the README, the site's first page, links, the reference, and the habits of a project."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import exitkit
from tests.test_docs import HOME, PAGES, README, ROOT, name

WRITTEN = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *PAGES]
_CODE = re.compile(r"^([ \t]*)```.*?^\1```[ \t]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")


def links(page: Path) -> list[str]:
    """Where the page's links and pictures point to, those in code left out."""
    return [found[0] or found[1] for found in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8")))]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as Markdown's toc and GitHub make them, and of its API entries."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", word) for word in words} | set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if ":" in link:
            assert re.fullmatch(r"https://[\w.-]+(/[\w./~%#-]*)?", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if page.is_relative_to(ROOT / "docs"):
            assert target.is_relative_to(ROOT / "docs"), f"{link} is not on the site"
        assert not anchor or anchor in anchors(target), link


def test_links_and_anchors_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# Choose τ\n[a](b.md#c) ![d](e.svg){ width=1 } `[no](no.md)`\n\n```text\n# no\n[no](no.md)\n```\n::: a.B\n"
    page.write_text(text, encoding="utf-8")
    assert links(page) == ["b.md#c", "e.svg"]
    assert anchors(page) == {"choose-τ", "a.B"}


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.read_bytes()) <= 10_000


def test_the_site_opens_with_the_words_of_the_readme() -> None:
    """The same paragraphs in the same order; what lies outside of the site is named there, not linked."""
    text = re.sub(r"\[([^\]]*)\]\((?!docs/|https:|#)[^)]*\)", r"`\1`", README.read_text(encoding="utf-8"))
    paragraphs = text.replace("](docs/", "](").split("\n\n")
    home = iter(HOME.read_text(encoding="utf-8").split("\n\n"))
    for paragraph in paragraphs:
        assert paragraph.strip() in (mine.strip() for mine in home), paragraph


def rooms() -> Iterator[tuple[str, list[str]]]:
    """The package and its rooms that say which of their names are public."""
    for path in [ROOT / "exitkit" / "__init__.py", *sorted((ROOT / "exitkit").glob("*/__init__.py"))]:
        module = ".".join(path.relative_to(ROOT).parent.parts)
        if hasattr(importlib.import_module(module), "__all__"):
            yield module, list(importlib.import_module(module).__all__)


@pytest.mark.parametrize(("module", "names"), list(rooms()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_name_is_in_the_reference(module: str, names: list[str]) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {found.rpartition(".")[2] for found in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    shown |= {found.rpartition(".")[2] for found in re.findall(r"`(exitkit\.[\w.]+)`", pages)}
    assert {one for one in names if one not in shown} == set()


def test_the_habits_are_there() -> None:
    files = """CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE SECURITY.md .pre-commit-config.yaml
        .github/workflows/ci.yml .github/pull_request_template.md .github/ISSUE_TEMPLATE/bug.yml
        .github/ISSUE_TEMPLATE/idea.yml"""
    for file in files.split():
        assert (ROOT / file).stat().st_size > 0, file
    assert "run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    for script in ("run", "package"):
        assert (ROOT / ".ci" / script).stat().st_mode & 0o100


def test_one_version_everywhere() -> None:
    version = exitkit.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    latest = re.search(r"^## (\d[\w.]*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert latest is not None
    assert latest[1] == version
    tree = ast.parse((ROOT / "exitkit" / "__init__.py").read_text(encoding="utf-8"))
    assert any(ast.unparse(line) == f"__version__ = '{version}'" for line in tree.body)  # which the build reads


def test_yaml_is_well_formed() -> None:
    yaml = pytest.importorskip("yaml", reason="the site's tools bring it: pip install 'exitkit[docs]'")
    for path in [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.yml")]:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


def test_what_a_type_checker_is_shown_runs() -> None:
    path = ROOT / ".ci" / "consumer.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "consumer"})
