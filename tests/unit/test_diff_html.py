"""The page of a diff, read without a browser: every line of both graphs once, nested by module, names escaped."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from diffed import BODY, compare, program
from graphshard.diff.difference import Diff, Kind
from graphshard.diff.html import to_html

RELU = "%z : f32[2,8] = aten.relu.default(%y)"
PROLOGUE = "graph prologue {\n  %h_1 = aten.full.default([2], 1.0) {origin=h}\n  return\n}\n"


class Page(HTMLParser):
    """Rows with their cells, the modules around them, and what the page loads."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.modules: list[tuple[int, str, bool]] = []  # depth, title, open
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.data: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.title = ""
        self.text = ""
        self.feed(source)
        assert self.tags == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [found[name] for name in ("src", "href") if name in found]
        if "row" in found.get("class", "").split():
            self.rows.append({**found, "cells": []})
        elif tag == "details" and "style" in found:
            self.modules.append((self.tags.count("details"), "", "open" in found))
        if tag not in ("meta", "link", "input"):
            self.tags.append(tag)
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag
        if tag == "span" and self.rows and len(self.rows[-1]["cells"]) < 2:
            self.rows[-1]["cells"].append(self.text)
        elif tag == "b" and self.tags[-1] == "summary" and self.modules and not self.modules[-1][1]:
            depth, _, is_open = self.modules[-1]
            self.modules[-1] = (depth, self.text, is_open)
        elif tag == "script" and not self.data:
            self.data = json.loads(self.text)
        elif tag == "title":
            self.title = self.text
        self.text = ""


def page(found: Diff, title: str = "a to b") -> Page:
    return Page(to_html(found, title))


def test_every_line_of_either_graph_is_in_one_cell_in_order() -> None:
    after = BODY.replace(RELU, f"%n = aten.neg.default(%y)\n  {RELU.replace('%y', '%n')}")
    found = page(compare(program(), program(after)))
    cells = [row["cells"] for row in found.rows]
    names = [[text.split()[0] for text in side if text] for side in zip(*cells, strict=True)]
    assert names == [["%w", "%x", "%y", "%z", "return"], ["%w", "%x", "%y", "%n", "%z", "return"]]
    assert [row["data-kind"] for row in found.rows] == ["same", "same", "same", "added", "changed", "same"]
    assert [row["id"] for row in found.rows] == [f"r{number}" for number in range(6)]
    assert len(found.ids) == len(set(found.ids))
    assert [one["kind"] for one in found.data] == [row["data-kind"] for row in found.rows]
    assert found.data[4]["what"] == ["self: %y -> %n"]


def test_the_page_loads_nothing() -> None:
    found = page(compare(program(), program(BODY.replace("relu", "neg"))))
    assert found.loads == ["data:,"]


def test_names_are_escaped_everywhere() -> None:
    evil = '</script><img src=x onerror="alert(1)">&amp;'
    before, after = (
        BODY.replace("{module=lin}", f"{{module={json.dumps(module)}}}") for module in (evil, evil + "&lt;b>")
    )
    found = page(compare(program(before), program(after)), title=f"<b>{evil}")
    assert found.title == f"graphshard diff: <b>{evil}"
    (row,) = [row for row in found.rows if row["data-kind"] == "changed"]
    assert [json.dumps(evil)[1:-1] in cell for cell in row["cells"]] == [True, True]
    assert evil in found.data[2]["what"][0]
    assert "img" not in found.tags and found.loads == ["data:,"]


def test_names_of_modules_are_escaped() -> None:
    evil = MODULES.replace("{module=h.0.norm}", '{module="<img src=x>"}')
    found = page(compare(program(evil), program(evil)))
    assert found.modules[0] == (0, "<img src=x>", False) and found.loads == ["data:,"]


def test_both_sides_stay_in_order_when_nodes_changed_theirs() -> None:
    swapped = MODULES.replace("exp.default(%a)", "exp.default(%x)")
    first = "  %a : f32[2,4] = aten.exp.default(%x) {module=h.0.norm}\n"
    after = swapped.replace(first, "").replace("  %c :", f"{first}  %c :")
    cells = [row["cells"] for row in page(compare(program(swapped), program(after))).rows]
    names = [[text.split()[0] for text in side if text] for side in zip(*cells, strict=True)]
    assert names[0][:4] == ["%x", "%a", "%b", "%c"] and names[1][:4] == ["%x", "%b", "%a", "%c"]
    assert len(cells) == len(names[0]) + 1


def test_what_moved_is_two_rows_that_know_each_other() -> None:
    before = BODY.replace("  %y :", "  %h = aten.full.default([2], 1.0)\n  %y :")
    found = page(compare(program(before), program(others=PROLOGUE)))
    here, there = (row for row in found.rows if row["data-kind"] == "moved")
    assert (here["data-partner"], there["data-partner"]) == (there["id"], here["id"])
    assert [bool(text) for row in (here, there) for text in row["cells"]] == [False, True, True, False]


def test_a_duplicate_points_at_its_original() -> None:
    copy = "  %y_1 = aten.mm.default(%x, %w) {phase=backward, module=lin, origin=y, made_by=recompute}\n"
    found = page(compare(program(), program(BODY.replace("  return", copy + "  return"))))
    (row,) = [row for row in found.rows if row["data-kind"] == "duplicated"]
    original = next(one for one in found.rows if one["id"] == row["data-partner"])
    assert original["cells"][0].startswith("%y :")


MODULES = """
  %x : f32[2,4] = batch 0
  %a : f32[2,4] = aten.exp.default(%x) {module=h.0.norm}
  %b : f32[2,4] = aten.exp.default(%a) {module=h.0.norm}
  %c : f32[2,4] = aten.exp.default(%b) {module=h.0.norm}
  %d : f32[2,4] = aten.exp.default(%c) {module=h.0.mlp}
  %e : f32[2,4] = aten.exp.default(%d) {module=h.1.mlp}
  %f : f32[2,4] = aten.exp.default(%e) {module=h.1.mlp}
  %g : f32[2,4] = aten.exp.default(%f) {module=h.1.mlp}
  %i : f32[2,4] = aten.exp.default(%g)
  return output 0 %i
"""


def test_modules_nest_and_those_without_a_difference_are_closed() -> None:
    found = page(compare(program(MODULES), program(MODULES.replace("exp.default(%a)", "neg.default(%a)"))))
    assert found.modules == [(0, "h", True), (1, "0", True), (2, "norm", True), (1, "1.mlp", False)]
    changed = next(i for i, row in enumerate(found.rows) if row["data-kind"] == "changed")
    assert found.rows[changed]["cells"][0].startswith("%b")


@pytest.mark.parametrize("kind", [Kind.ADDED, Kind.CHANGED])
def test_a_chip_for_every_kind_there_is(kind: Kind) -> None:
    after = BODY.replace(RELU, f"%n = aten.neg.default(%y)\n  {RELU.replace('%y', '%n')}")
    source = to_html(compare(program(), program(after)), "")
    assert f'data-kind="{kind}" data-mark=' in source
    assert f'data-kind="{Kind.MOVED}" data-mark=' not in source
