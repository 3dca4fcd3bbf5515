"""The recipe that ``exitkit init`` writes, the page about recipes, and what is said of a key that is wrong."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import exitkit
from exitkit.cli.recipes.recipe import Recipe, read_recipe
from exitkit.training import Distillation, Loss
from tests.test_cli import invoke, refused, run  # noqa: F401

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "recipe.md"
NOT_IN_RECIPES = {"model", "loss", "optimizer", "schedule", "show_progress", "history", "_"}
KEYS = {
    "top": {f.name for f in fields(Recipe)} - {"exits", "trainer", "optimizer", "schedule", "loss"},
    "exits": {"every", "at", "at_cost", "placement", "first", "head", "method", "num_classes", "num_outputs"},
    "trainer": {f.name for f in fields(exitkit.Trainer) if f.name not in NOT_IN_RECIPES},
    "trainer.phase": {"exits", "stages", "alternate", "share", "lr", "backbone_lr"},
    "optimizer": {"name"},
    "schedule": {"name", "warmup", "cycles"},
    "loss": {f.name for f in fields(Loss)},
    "loss.distillation": {f.name for f in fields(Distillation)},
}


def test_the_page_names_every_key_of_every_table() -> None:
    sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    named = {re.sub(r"[`\[\]]", "", text.splitlines()[0]): text for text in sections}
    named["top"] = named.pop("At the top, above every table")
    assert named.keys() == KEYS.keys()
    for table, keys in KEYS.items():
        assert {key for key in keys if f"`{key}`" not in named[table]} == set(), table


def written(run: Any, folder: Path) -> str:
    run("init", folder / "mine.toml")
    return (folder / "mine.toml").read_text("utf-8")


def test_init_writes_a_recipe_that_can_be_read(run: Any, tmp_path: Path) -> None:
    text = written(run, tmp_path)
    made = read_recipe(tmp_path / "mine.toml", {})
    assert made.model == "torchvision:resnet18"
    for table, keys in KEYS.items():
        part = re.split(r"^#? ?\[+([a-z.]+)\]", "[top]\n" + text, flags=re.MULTILINE)
        body = dict(zip(part[1::2], part[2::2], strict=True))[table]
        given = set(re.findall(r"^(?:# )?([a-z_]+) = ", body, re.MULTILINE))
        assert keys - {"distillation"} <= given, table


def test_every_example_in_it_can_be_taken(run: Any, tmp_path: Path) -> None:
    """Each commented key alone, uncommented."""
    lines = written(run, tmp_path).splitlines()
    tried = 0
    for index, line in enumerate(lines):
        if not re.match(r"# [a-z_]+ = ", line):
            continue
        header = (
            max(at for at in range(index) if re.match(r"(# )?\[", lines[at]))
            if any(re.match(r"(# )?\[", earlier) for earlier in lines[:index])
            else None
        )
        changed = [one[2:] if at in (index, header) and one.startswith("# ") else one for at, one in enumerate(lines)]
        needs = {"momentum": "name", "cycles": "name", "warmup": "name"}.get(line.split()[1])
        if needs:  # beside the name that they are options of
            changed = [
                one[2:] if one.startswith(f"# {needs} = ") and header < at < index else one
                for at, one in enumerate(changed)
            ]  # type: ignore[operator]
        if line.startswith("# unlabelled = "):  # beside per_class and a teacher
            changed = [one.removeprefix("# ") if one.startswith("# per_class = ") else one for one in changed]
            changed.append("[loss.distillation]")
        if header and "[[trainer.phase]]" in lines[header]:  # instead of the regime, and with exits
            changed = [
                one.removeprefix("# ") if one.startswith("# exits = ") else one
                for one in changed
                if not one.startswith("regime = ")
            ]
        (tmp_path / "changed.toml").write_text("\n".join(changed))
        read_recipe(tmp_path / "changed.toml", {})
        tried += 1
    assert tried > 40


def test_init_never_overwrites(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine")
    assert "exists, and would be lost" in refused("init", tmp_path / "mine.toml")
    assert (tmp_path / "mine.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3", "key 'epochs' is in the wrong place; it goes into [trainer]"),
        (
            "[trainer]\nbatch_size = 3",
            "key 'trainer.batch_size' is in the wrong place; it goes to the top, above every",
        ),
        ("[optimizer]\nlr = 0.1", "key 'optimizer.lr' is in the wrong place; it goes into [trainer]"),
        ("[trainer]\nmomentum = 0.9", "key 'trainer.momentum' is in the wrong place; it goes into [optimizer]"),
        ("[loss]\nteachers = 'last'", "key 'loss.teachers' is in the wrong place; it goes into [loss.distillation]"),
        ("[trainer]\nnum_classes = 3", "goes to the top, above every [table] or into [exits]"),
    ],
)
def test_a_misplaced_key_is_told_where_it_goes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(f'model = "tests.toy:net"\ndata = "x.npz"\n{text}\n')
    with pytest.raises(exitkit.ArgumentError, match=re.escape(message)):
        read_recipe(tmp_path / "mine.toml", {})


def test_all_allowed_keys_are_listed(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('model = "tests.toy:net"\ndata = "x.npz"\n[trainer]\nepoch = 3\n')
    with pytest.raises(exitkit.ArgumentError) as refusal:
        read_recipe(tmp_path / "mine.toml", {})
    assert "Did you mean 'trainer.epochs'" in str(refusal.value)
    assert all(f"'trainer.{key}'" in str(refusal.value) for key in KEYS["trainer"])
