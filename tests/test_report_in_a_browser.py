"""The report as its reader meets it: in Chromium, by mouse and keyboard, on a phone, in the dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from exitkit import ExitOutputs
from exitkit.report import calibrated, write_report, write_samples, write_thresholds
from tests.test_report import made, run_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: install chromium, or run playwright install chromium ({error.message[:80]})")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def outputs() -> dict[str, ExitOutputs]:
    """Two methods; the report opens on the second."""
    outputs = made(600)
    return {"pbee": replace(outputs, criterion="patience"), "sdn": outputs}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, outputs: dict[str, ExitOutputs]) -> Path:
    directory = run_of(tmp_path_factory.mktemp("run"), **outputs)
    colours = np.random.default_rng(0).random((600, 3, 8, 8), dtype=np.float32)
    write_samples(directory, TensorDataset(torch.from_numpy(colours)), outputs)
    write_thresholds(directory, {"sdn": calibrated(outputs["sdn"], None, 0.5, 0, max_drop=0.05)})
    return write_report([directory])


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The opened report; whatever it logs as an error, throws or fetches fails the test."""
    opened, complaints = browser.new_page(), []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    opened.goto(report.as_uri())
    yield opened
    assert complaints == []
    opened.close()


def shown(page: Any, name: str) -> float:
    return float(page.locator(f"#{name}").inner_text().strip("%×"))


@pytest.mark.parametrize("name", ["pbee", "sdn"])
def test_numbers_follow_the_slider_and_are_those_of_the_curve(
    page: Any, outputs: dict[str, ExitOutputs], name: str
) -> None:
    page.get_by_role("combobox", name="Method").select_option(name)
    slider, one = page.get_by_role("slider", name="Threshold τ"), outputs[name]
    last = int(slider.get_attribute("max"))
    for place in sorted({0, 1, last // 3, last // 2, last}):
        slider.fill(str(place))
        tau = page.evaluate("([n, k]) => JSON.parse(document.getElementById('data').textContent)"
                            ".methods.find((m) => m.name === n).thresholds[k]", [name, place])  # fmt: skip
        point = one.curve().at_threshold(tau)
        assert shown(page, "threshold") == pytest.approx(tau, rel=1e-5)
        assert page.locator("#accuracy").inner_text() == f"{point.accuracy:.2%}"
        assert shown(page, "cost") == pytest.approx(100 * point.cost, abs=0.0501)
        assert shown(page, "speedup") == pytest.approx(1 / point.cost, abs=0.00501)
        own = [float(cell.strip("%")) for cell in page.locator("#exits td:nth-child(3)").all_inner_texts()]
        assert own == pytest.approx(100 * one.accuracy(), abs=0.0501)
        rates = [float(cell.strip("%")) for cell in page.locator("#exits td:nth-child(4)").all_inner_texts()]
        assert rates == pytest.approx(100 * one.exit_rates(tau), abs=0.0501)
        exits, everyone = one.exits_at(tau), np.arange(len(one))
        assert one.labels is not None
        given = np.zeros((4, 4), int)
        np.add.at(given, (one.labels.numpy(), one.answers.numpy()[everyone, exits]), 1)
        cells = [int(cell) for cell in page.locator("#confusion td").all_inner_texts()]
        assert cells == given.ravel().tolist()


def test_cursor_lies_on_the_curve(page: Any) -> None:
    page.get_by_role("combobox", name="Method").select_option("sdn")
    paths = page.locator("svg [id^=curve-line2d] > path").evaluate_all("all => all.map(p => p.getAttribute('d'))")
    corners = np.array([pair for path in paths for pair in re.findall(r"[ML] (\S+) (\S+)", path)], float)
    seen = []
    for place in (0, 40, 80, 120):
        page.get_by_role("slider", name="Threshold τ").fill(str(place))
        x, y = (float(page.locator("#curve-cursor use").get_attribute(axis)) for axis in "xy")
        assert np.hypot(*(corners - [x, y]).T).min() < 0.6
        seen.append(x)
    assert seen == sorted(seen)
    assert seen[-1] > seen[0] + 50


def test_slider_starts_at_the_chosen_threshold_and_moves_by_keyboard(
    page: Any, outputs: dict[str, ExitOutputs]
) -> None:
    chosen = calibrated(outputs["sdn"], None, 0.5, 0, max_drop=0.05).chosen
    assert isinstance(chosen.threshold, float)
    page.get_by_role("combobox", name="Method").select_option("sdn")
    assert (
        page.locator("#accuracy").inner_text()
        == f"{outputs['sdn'].curve().at_threshold(chosen.threshold).accuracy:.2%}"
    )
    assert str(chosen.guarantee) in page.inner_text("main")
    slider = page.get_by_role("slider", name="Threshold τ")
    before = int(slider.input_value())
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert int(slider.input_value()) == before + 1
    assert slider.get_attribute("aria-valuetext") == f"τ {page.locator('#threshold').inner_text()}"
    page.keyboard.press("End")
    assert page.locator("#accuracy").inner_text() == f"{outputs['sdn'].accuracy()[-1]:.2%}"


def test_the_command_exports_what_is_shown(page: Any, outputs: dict[str, ExitOutputs], report: Path) -> None:
    """Without a threshold at the promised one, which then keeps its promise; else with a τ that means the same when typed."""
    assert page.get_by_role("combobox", name="Method").locator("option:checked").inner_text() == "sdn"
    command = f"exitkit export {report.parent} --method sdn"
    assert page.locator("#command").inner_text() == page.locator("#decision code").inner_text() == command
    slider = page.get_by_role("slider", name="Threshold τ")
    slider.fill("7")
    typed, tau = page.locator("#command").inner_text().split(" --threshold ")
    assert typed == command
    point = outputs["sdn"].at(float(tau))
    assert page.locator("#accuracy").inner_text() == f"{point.accuracy:.2%}"
    assert page.locator("#cost").inner_text() == f"{point.cost:.1%}"


def test_the_first_screen_has_the_decision_and_its_picture(page: Any) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    for part in ("h2.lead", ".cards", "#decision svg", "#decision code"):
        box = page.locator(part).first.bounding_box()
        assert box["y"] + box["height"] <= 900, part
    left, right = (page.locator(part).first.bounding_box() for part in (".lead", ".picture"))
    assert left["x"] < 100
    assert right["x"] + right["width"] > 1300
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440


def test_the_legend_is_off_the_curves(page: Any) -> None:
    curves = page.locator("svg [id^=curve-axes] [id^=curve-patch_2]").first.bounding_box()
    legend = page.locator("svg [id^=curve-legend]").first.bounding_box()
    assert legend["y"] >= curves["y"] + curves["height"]


def test_gallery_sorts_its_samples_by_the_threshold(page: Any) -> None:
    page.get_by_role("combobox", name="Method").select_option("sdn")
    slider = page.get_by_role("slider", name="Threshold τ")
    slider.fill(slider.get_attribute("max"))
    assert page.locator("#early img, #wrong img").count() == 0
    assert page.locator("#late img").count() == 12
    slider.fill("0")
    assert page.locator("#late img").count() == 0
    early, wrong = (page.locator(f"#{kind} figcaption").first.inner_text() for kind in ("early", "wrong"))
    assert re.fullmatch(r"\d, at exit \d", early)
    assert re.fullmatch(r"\d instead of \d, at exit \d(; the backbone says \d|; so says the backbone)?", wrong)
    assert page.locator("#wrong img").first.evaluate("image => image.naturalWidth") == 8


def test_texts_are_quoted_and_many_classes_are_a_list_of_mistakes(browser: Any, tmp_path: Path) -> None:
    outputs = made(600, classes=20)
    write_samples(tmp_path, [(f"<i>film</i> {row}", 0) for row in range(600)], {"sdn": outputs})
    page = browser.new_page()
    page.goto(write_report([run_of(tmp_path, sdn=outputs)]).as_uri())
    quoted = page.locator("blockquote").first.inner_text()
    assert re.fullmatch(r"<i>film</i> \d+", quoted)
    tau = outputs.curve().at_budget(0.5).threshold
    answers = outputs.answers.numpy()[np.arange(600), outputs.exits_at(tau)]
    rows = [[int(cell) for cell in row.split()] for row in page.locator("#confusion tbody tr").all_inner_texts()]
    assert outputs.labels is not None
    labels = outputs.labels.numpy()
    assert len(rows) == 12
    assert all(((labels == label) & (answers == answer)).sum() == count for label, answer, count in rows)
    page.close()


def test_everything_has_a_name_for_those_who_do_not_see_it(page: Any) -> None:
    assert page.locator("[role=img]:not([aria-label])").count() == 0
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("#numbers").get_attribute("aria-live") == "polite"
    assert page.locator("th:not([scope])").count() == 0
    alt = page.locator("figure[role=img]").first.get_attribute("aria-label")
    assert alt.startswith("Accuracy against average cost")
    duplicates = page.evaluate("() => { const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
                               "return ids.filter((id, i) => ids.indexOf(id) !== i); }")  # fmt: skip
    assert duplicates == []


def test_fits_a_phone_and_the_dark(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.{place}).{what}")
        for place, what in (("querySelector('svg text')", "fill"), ("body", "backgroundColor"))
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
    assert brightness[0] > 0.8
    assert brightness[1] < 0.2
    page.close()
