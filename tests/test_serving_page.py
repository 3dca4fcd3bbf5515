"""The live page as its reader meets it: in Chromium, by mouse and keyboard, on a phone, in the dark. Without Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from exitkit.serving.service import Service
from tests.test_report_in_a_browser import browser  # noqa: F401 - a fixture
from tests.test_serving_http import image_service, picture

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
uvicorn = pytest.importorskip("uvicorn", reason="the server needs: pip install 'exitkit[serve]'")


def application(service: Service) -> Any:
    from starlette.requests import Request

    from exitkit.serving.http import respond

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await (await respond(service, Request(scope, receive)))(scope, receive, send)

    return answer


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """An image of white leaves at exit 0 for any τ below 1, one of grey (0.5) for those below a half."""
    listening = socket.create_server(("127.0.0.1", 0))
    service = image_service(timeout_s=10)
    config = uvicorn.Config(application(service), log_level="error", lifespan="off", loop="asyncio", http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:  # noqa: F811
    opened = browser.new_page(viewport={"width": 380, "height": 760}, color_scheme="dark")
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "request", lambda sent: complaints.append(sent.url) if not sent.url.startswith((address, "blob:")) else None
    )
    opened.goto(address)
    expect(opened).to_have_title("pets")
    yield opened
    assert complaints == []
    opened.close()


def upload(page: Any, content: bytes) -> None:
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": content})


def text(page: Any, name: str, expected: str) -> None:
    expect(page.locator(f"#{name}")).to_have_text(expected)


def test_an_image_is_answered_and_counted(page: Any) -> None:
    upload(page, picture())
    text(page, "label", "cat")
    text(page, "exit", "1 of 3")
    text(page, "score", "1.000")
    text(page, "cost", "25%")
    assert " ms, cat" in page.locator("#full").inner_text()
    expect(page.locator("#exits tr").first.locator("td").first).not_to_have_text("0")
    rows = page.locator("#exits tr").all_inner_texts()
    assert rows[2].startswith("full model")
    assert page.locator("#shown").is_visible()


def test_the_slider_by_keyboard(page: Any) -> None:
    upload(page, picture(grey=128))
    text(page, "exit", "1 of 3")  # 128 / 255 is above the server's 0.5
    slider = page.get_by_role("slider", name="Threshold τ")
    assert slider.is_disabled()
    page.get_by_label("The server's own thresholds").focus()
    page.keyboard.press("Space")
    slider.focus()
    page.keyboard.press("End")
    text(page, "exit", "3 of 3")
    page.keyboard.press("Home")
    text(page, "exit", "1 of 3")


def test_a_bad_image_is_one_clear_line_and_the_next_is_answered(page: Any) -> None:
    upload(page, b"nothing")
    expect(page.locator("#error")).to_contain_text("no image")
    assert page.locator("#answer").is_hidden()
    upload(page, picture())
    text(page, "label", "cat")
    text(page, "error", "")


def test_it_fits_a_phone_in_the_dark(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(23, 23, 26)"
    assert all(page.locator(f"#{name}").count() == 1 for name in ("drop", "tau", "monitor"))
    assert page.get_by_label("Drop an image here, or choose one").count() == 1
