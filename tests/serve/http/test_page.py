"""The page at / in a browser: by mouse, by keyboard alone, on a telephone, in the dark."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoints import TEXTS, StandIn
from waiting import PATIENCE

from lorica.serve.encoder import Base, EncoderEngine
from lorica.serve.encoder import engine as engine_module
from lorica.serve.http import Key, Keys, Served

api = pytest.importorskip("playwright.sync_api")
BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium or google-chrome here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; at the end it has said nothing on the console, and asked nothing of anybody else."""
    pages: list[Any] = []
    said: list[str] = []

    def open_page(url: str, expected: str = "", **options: Any) -> Any:
        page = browser.new_page(**options)
        page.set_default_timeout(20_000)
        pages.append(page)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda m: said.append(m.text) if not (expected and expected in m.text) else None)
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith((url, "data:")) else None)
        page.goto(url)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


def send(page: Any) -> None:
    """Ask, once the answers before have come: until then the page takes no other question."""
    page.wait_for_selector("#send:enabled")
    page.keyboard.press("Control+Enter")


def test_two_adapters_write_side_by_side(url: str, engine: StandIn, opened: Callable[..., Any]) -> None:
    page = opened(url)
    page.wait_for_selector("#rows tr:nth-child(2):last-child")
    assert page.title() == "lorica / base"
    engine.pause = 0.005
    page.select_option("#one", "blue")
    page.select_option("#two", "red")
    page.fill("#text", "hello")
    page.click("#send")
    page.wait_for_selector("#answer-two h2 span:text-matches('tokens')")
    page.wait_for_selector("#answer-one h2 span:text-matches('tokens')")
    assert page.text_content("#answer-one .text") == TEXTS["blue"]
    assert page.text_content("#answer-two .text") == TEXTS["red"]
    written = {engine.tokenizer.decode(ids) for ids in engine.prompts}
    assert written == {"<user>hello</user><assistant>"}
    engine.fails_after = 3
    page.click("#send")
    page.wait_for_selector("#answer-two .error")
    assert page.text_content("#answer-two .error") == "the engine died"


def test_by_keyboard_alone(url: str, engine: StandIn, opened: Callable[..., Any]) -> None:
    page = opened(url)
    page.wait_for_selector("#rows tr:nth-child(2):last-child")
    keys = page.keyboard
    page.evaluate("document.activeElement.blur()")
    keys.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message"
    keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "one"
    keys.type("red")
    keys.press("Tab")
    keys.press("Tab")
    keys.type("abc")
    engine.pause = 0.2
    keys.press("Control+Enter")
    page.wait_for_selector("#answer-one.going")
    keys.press("Escape")
    page.wait_for_selector("#answer-one h2 span:text-is('stopped')")
    while engine.running:
        page.wait_for_timeout(20)
    engine.pause = 0
    reached = set()
    for _ in range(30):
        keys.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel || ''"))
    assert {"most", "heat", "send", "filter", "Ask blue", "Ask beside it: red"} <= reached


def test_an_encoder_tells_probabilities_on_a_telephone(
    encoder: tuple[Path, dict[str, Any]], serve: Callable[[Served], str], opened: Callable[..., Any]
) -> None:
    folder, _ = encoder
    base = Base.open(str(folder / "model"))
    url = serve(Served("tiny", EncoderEngine(base, [folder / "adapters"]), default="three"))
    page = opened(url, viewport={"width": 375, "height": 720}, color_scheme="dark")
    page.wait_for_selector("#rows tr:nth-child(5):last-child")
    assert page.input_value("#one") == "three"
    page.fill("#text", "lovely film")
    send(page)
    page.wait_for_selector("#answer-one .bar")
    assert len(page.query_selector_all("#answer-one .bar")) == 3
    shares = [float(each.text_content().rstrip(" %")) for each in page.query_selector_all("#answer-one em")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True)
    page.click("[data-name=tags] button.two")
    page.wait_for_function("document.getElementById('two').value === 'tags'")
    send(page)
    page.wait_for_selector("#answer-two .words, #answer-two .error")
    assert page.query_selector("#answer-two .words"), page.text_content("#answer-two")
    page.select_option("#two", "score")
    send(page)
    page.wait_for_selector("#answer-two .score")
    page.select_option("#two", "")
    send(page)
    page.wait_for_selector("#answer-two .strip")
    page.fill("#filter", "tag")
    assert [row.get_attribute("data-name") for row in page.query_selector_all("#rows tr")] == ["tags"]
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 375
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", dark))) < 60


def test_an_adapter_that_is_being_read_is_asked_what_it_tells(
    encoder: tuple[Path, dict[str, Any]],
    serve: Callable[[Served], str],
    opened: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = encoder
    fit, read = engine_module.fit, threading.Event()

    def slow(base: Base, adapter: Any, path: Path) -> Any:
        if path.name == "tags":
            read.wait(PATIENCE)
        return fit(base, adapter, path)

    monkeypatch.setattr(engine_module, "fit", slow)
    base = Base.open(str(folder / "model"))
    page = opened(serve(Served("tiny", EncoderEngine(base, [folder / "adapters"]))))
    try:
        page.wait_for_selector("[data-name=tags] .state.loading")
        page.select_option("#one", "tags")
        page.fill("#text", "lovely film")
        send(page)
        page.wait_for_selector("#answer-one.going")
    finally:
        read.set()
    page.wait_for_selector("#send:enabled")
    assert page.query_selector("#answer-one .words"), page.text_content("#answer-one")


def test_a_key_is_asked_for(
    serve: Callable[[Served], str], engine: StandIn, opened: Callable[..., Any]
) -> None:
    keys = Keys([Key(hashlib.sha256(b"sk-the-key").digest(), "x", frozenset({"blue"}))])
    url = serve(Served("base", engine, keys=keys))
    page = opened(url, expected="401")
    page.wait_for_selector("#locked:not(.hidden)")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#wrong:text-matches('not a key')")
    page.fill("#key", "sk-the-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows tr:nth-child(1):last-child")
    assert page.text_content("#rows .name") == "blue"
