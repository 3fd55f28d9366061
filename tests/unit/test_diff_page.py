"""The page of a diff in a browser, on a graph of 2,000 nodes: search, chips, modules, keys, partners, both schemes.

Needs the extra ``browser`` and a Chromium: ``playwright install chromium``, or its path in ``GRAPHSHARD_TEST_BROWSER``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffed import compare, program
from graphshard.diff.html import to_html

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")

LAYERS = 250
LAYER = """  %n{i}_a : f32[2,4] = aten.exp.default(%n{p}) {{module=h.{i}.norm}}
  %n{i}_b : f32[2,4] = aten.neg.default(%n{i}_a) {{module=h.{i}.norm}}
  %n{i}_c : f32[2,4] = aten.sin.default(%n{i}_b) {{module=h.{i}.norm}}
  %n{i}_d : f32[2,4] = aten.cos.default(%n{i}_c) {{module=h.{i}.mlp}}
  %n{i}_e : f32[2,4] = aten.exp.default(%n{i}_d) {{module=h.{i}.mlp}}
  %n{i}_f : f32[2,4] = aten.neg.default(%n{i}_e) {{module=h.{i}.mlp}}
  %n{i}_g : f32[2,4] = aten.sin.default(%n{i}_f) {{module=h.{i}.mlp}}
  %n{i} : f32[2,4] = aten.cos.default(%n{i}_g) {{module=h.{i}.mlp}}
"""
PROLOGUE = "graph prologue {\n  %h_1 = aten.full.default([2], 1.0) {origin=h}\n  return\n}\n"


def body(changed: bool) -> str:
    """2,000 operations; after, every fiftieth layer has another operator and a full has moved to the prologue."""
    lines = ["  %n : f32[2,4] = batch 0\n", "" if changed else "  %h : f32[2] = aten.full.default([2], 1.0)\n"]
    for i in range(LAYERS):
        layer = LAYER.format(i=i, p=i - 1 if i else "")
        lines.append(layer.replace("sin.default", "tanh.default", 1) if changed and i % 50 == 0 else layer)
    return "\n" + "".join(lines) + f"  return output 0 %n{LAYERS - 1}\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        path = os.environ.get("GRAPHSHARD_TEST_BROWSER")
        try:
            chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to run: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "diff.html"
    found = compare(program(body(False)), program(body(True), others=PROLOGUE))
    path.write_text(to_html(found, "capture to last"))
    return path


@pytest.fixture
def page(browser: Any, source: Path) -> Iterator[Any]:
    """The page, freshly loaded; it may neither complain nor ask for anything."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    complaints: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(source.as_uri())
    yield opened
    opened.close()
    assert complaints == []
    assert asked == [source.as_uri()]


def selected(page: Any) -> str:
    text: str = page.locator(".row.on").inner_text()
    return text


def in_sight(page: Any, selector: str) -> bool:
    """Whether an element lies between the bar and the panel."""
    seen: bool = page.evaluate(
        """selector => {
          const box = document.querySelector(selector).getBoundingClientRect();
          const top = document.querySelector("header").offsetHeight;
          const panel = document.getElementById("panel");
          const bottom = panel.hidden ? innerHeight : panel.getBoundingClientRect().top;
          return box.height > 0 && box.top >= top - 1 && box.bottom <= bottom + 1;
        }""",
        selector,
    )
    return seen


def test_it_opens_with_what_differs_in_reach(page: Any) -> None:
    assert page.locator(".row").count() > 2000
    page.keyboard.press(".")
    assert "%h" in selected(page)
    assert page.locator("details[open] details[open] .row.changed").count() >= 5
    assert page.locator(".graph details:not([open])").count() >= 245, "what is the same is closed"


def test_search_steps_through_matches_and_opens_their_modules(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("n123_ module=h.123.norm")
    assert page.locator("#matches").inner_text() == "3 rows"
    assert not page.locator(".row.hit").first.is_visible()
    page.keyboard.press("Enter")
    assert page.locator("#matches").inner_text() == "1 of 3 rows"
    assert "%n123_a :" in selected(page) and in_sight(page, ".row.on")
    page.keyboard.press("Enter")
    assert "%n123_b :" in selected(page)
    page.keyboard.press("Shift+Enter")
    assert "%n123_a :" in selected(page)
    assert page.evaluate("CSS.highlights.get('found').size") > 2
    page.keyboard.press("Escape")
    assert page.locator(".row.hit").count() == 0


def test_only_matches_leaves_nothing_else(page: Any) -> None:
    page.fill("#search", "tanh")
    page.check("#only")
    assert page.locator(".row:not([hidden])").count() == 5
    assert page.locator(".graph details:not([hidden]) > summary:visible").count() <= 3 * 5
    page.fill("#search", "")
    assert page.locator(".row[hidden]").count() == 0


def test_chips_hide_kinds(page: Any) -> None:
    chip = page.locator(".chip.same")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert page.locator(".row.same:not([hidden])").count() == 0
    assert page.locator(".row.changed:not([hidden])").count() == 5
    chip.click()
    assert page.locator(".row[hidden]").count() == 0


def test_a_click_tells_all_and_leads_to_the_partner(page: Any) -> None:
    page.locator(".row.moved").first.click()
    panel = page.locator("#panel")
    assert "graph: body -> prologue" in panel.inner_text()
    assert "aten.full.default" in panel.locator(".sides > div").nth(0).inner_text()
    assert "%h_1" in panel.locator(".sides > div").nth(1).inner_text()
    first = selected(page)
    page.keyboard.press("p")
    assert selected(page) != first and in_sight(page, ".row.on")
    assert "%h_1" in panel.locator(".sides > div").nth(1).inner_text()
    page.keyboard.press("p")
    assert selected(page) == first
    page.keyboard.press("Escape")
    assert not panel.is_visible()


def test_the_keyboard_walks_rows_and_folds_modules(page: Any) -> None:
    page.click("#expand")
    page.locator("#r0").click()
    for _ in range(4):
        page.keyboard.press("j")
    below = selected(page)
    page.keyboard.press("k")
    assert selected(page) != below
    page.keyboard.press("j")
    assert selected(page) == below
    page.keyboard.press("Enter")
    assert not page.locator(".row.on").is_visible()
    page.click("#collapse")
    assert page.locator(".graph details[open]").count() == 0


def test_both_schemes_are_readable(page: Any) -> None:
    def contrast() -> float:
        ratio: float = page.evaluate(
            """() => {
              const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((c) => c / 255)
                .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
                .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
              const style = (selector) => getComputedStyle(document.querySelector(selector));
              const both = [light(style(".row.same").color), light(style("html").backgroundColor)];
              return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
            }"""
        )
        return ratio

    page.emulate_media(color_scheme="light")
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert contrast() > 4.5
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != light
    assert contrast() > 4.5
