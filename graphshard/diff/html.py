"""A diff as one page of HTML: no network, no framework, readable without its script, which searches and filters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from html import escape
from importlib import resources
from itertools import groupby
from string import Template
from typing import Any

from graphshard.diff.cost_change import CostChange, by_pass, cost_changes
from graphshard.diff.difference import Diff, Entry, Kind
from graphshard.diff.modules import Group, nested
from graphshard.diff.rows import Row, rows

MARKS = {
    Kind.ADDED: "+",
    Kind.REMOVED: "−",
    Kind.DUPLICATED: "»",
    Kind.MOVED: "→",
    Kind.RESTAGED: "⇄",
    Kind.CHANGED: "~",
    Kind.PLACED: "@",
    Kind.REORDERED: "↕",
    Kind.SAME: "",
}

CHUNK = 50
"""As many rows are drawn, or left undrawn while they are out of sight, together."""


def to_html(diff: Diff, title: str) -> str:
    """The whole page. Modules in which nothing differs are closed when it opens."""
    graphs = rows(diff)
    numbered = {id(row): number for number, row in enumerate(row for mine in graphs.values() for row in mine)}
    counts = Counter(entry.kind for entry in diff.entries)
    page = _Page(graphs, numbered)
    parts = {
        "title": escape(title),
        "chips": "\n".join(_chip(kind, counts[kind]) for kind in Kind if counts[kind]),
        "costs": _costs(diff),
        "program": _program(diff),
        "graphs": "\n".join(page.graph(name) for name in graphs),
        "data": _json([_data(row) for mine in graphs.values() for row in mine]),
        "style": _file("style.css"),
        "script": _file("script.js"),
    }
    return Template(_file("page.html")).substitute(parts)


def _file(name: str) -> str:
    return resources.files("graphshard.diff").joinpath("page", name).read_text("utf-8").rstrip()


def _json(value: Any) -> str:
    """``value`` to stand in a script element, which only "<" could end."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _chip(kind: Kind, count: int) -> str:
    return (
        f'<button class="chip {kind}" data-kind="{kind}" data-mark="{MARKS[kind] or "="}" '
        f'aria-pressed="true">{kind} {count}</button>'
    )


def _costs(diff: Diff) -> str:
    tables = [_table(("a step", "before", "after", "change"), map(_cost_row, cost_changes(diff.before, diff.after)))]
    if changes := by_pass(diff.before, diff.steps):
        heading = ("by pass", *(change.title for change in changes[0][1]))
        lines = (f"<td>{escape(name)}</td>{''.join(map(_delta, found))}" for name, found in changes)
        tables.append(_table(heading, lines))
    return f'<details open><summary><b>costs</b></summary><div class="tables">{"".join(tables)}</div></details>'


def _table(heading: tuple[str, ...], lines: Iterable[str]) -> str:
    rows = ["".join(f"<th>{escape(title)}</th>" for title in heading), *lines]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cost_row(change: CostChange) -> str:
    old, new, _ = change.spelled()
    return f"<td>{escape(change.title)}</td><td>{old}</td><td>{new}</td>{_delta(change)}"


def _delta(change: CostChange) -> str:
    grown = (change.after or 0) - (change.before or 0)
    tone = "less" if grown < 0 else "more" if grown > 0 else "none"
    return f'<td class="{tone}">{change.spelled()[2]}</td>'


def _program(diff: Diff) -> str:
    if not diff.header:
        return ""
    lines = "\n".join(map(escape, diff.header))
    return (
        f"<details{' open' if len(diff.header) < 9 else ''}><summary><b>program</b> "
        f"{len(diff.header)} lines</summary><pre>{lines}</pre></details>"
    )


class _Page:
    """The graphs of one page; ``numbers``: of each row by identity, over all graphs."""

    def __init__(self, graphs: dict[str, list[Row]], numbers: dict[int, int]) -> None:
        self.graphs, self.numbers = graphs, numbers
        self.places: dict[tuple[bool, tuple[str, str]], int] = {}  # side and key of an entry to its row
        for mine in graphs.values():
            for row in mine:
                for side, entry in ((False, row.before), (True, row.after)):
                    if entry is not None:
                        self.places[side, entry.key] = numbers[id(row)]

    def graph(self, name: str) -> str:
        """One graph with its heading."""
        mine = self.graphs[name]
        sides = [sum(getattr(row, side) is not None for row in mine) for side in ("before", "after")]
        heading = f"<h2>graph {escape(name)}: {sides[0]} lines before, {sides[1]} after</h2>"
        return f'{heading}\n<div class="graph">\n{"".join(self._items(nested(mine), 0))}</div>'

    def _items(self, group: Group, depth: int) -> Iterator[str]:
        for is_row, items in groupby(group.items, lambda item: isinstance(item, Row)):
            if is_row:
                alike = [item for item in items if isinstance(item, Row)]
                for begin in range(0, len(alike), CHUNK):
                    chunk = alike[begin : begin + CHUNK]
                    yield f'<div class="rows" style="--rows:{len(chunk)}">\n'
                    yield from map(self._row, chunk)
                    yield "</div>\n"
            else:
                for item in items:
                    assert isinstance(item, Group)
                    yield from self._module(item, depth + 1)

    def _module(self, group: Group, depth: int) -> Iterator[str]:
        found = list(group.rows())
        counts = Counter(row.difference.kind for row in found)
        kinds = [kind for kind in Kind if counts[kind] and kind is not Kind.SAME]
        tags = [f'<i class="{kind}">{MARKS[kind]}{counts[kind]}</i>' for kind in kinds]
        title = f"<b>{escape(group.path)}</b> {len(found)}{''.join(tags)}"
        style = f"--depth:{depth};--rows:{len(found)}"
        yield f'<details{" open" if tags else ""} style="{style}"><summary>{title}</summary>\n'
        yield from self._items(group, depth)
        yield "</details>\n"

    def _row(self, row: Row) -> str:
        kind, number = row.difference.kind, self.numbers[id(row)]
        partner = self._partner(row)
        link = "" if partner in (None, number) else f' data-partner="r{partner}"'
        cells = ["" if entry is None else escape(entry.text, quote=False) for entry in (row.before, row.after)]
        return (
            f'<div class="row {kind}" id="r{number}" data-kind="{kind}"{link} tabindex="-1">'
            f"<span>{cells[0]}</span><b>{MARKS[kind]}</b><span>{cells[1]}</span></div>\n"
        )

    def _partner(self, row: Row) -> int | None:
        """The row that shows the other side."""
        found = row.difference
        if row.after is None:
            return self.places.get((True, found.after.key)) if found.after else None
        return self.places.get((False, found.before.key)) if found.before else None


def _data(row: Row) -> dict[str, Any]:
    """What the script shows of a row beside its text."""
    found = row.difference
    same = found.kind is Kind.SAME
    return {
        "kind": str(found.kind),
        "by": list(found.by),
        "what": list(found.what),
        "before": _entry(found.before),
        "after": None if same else _entry(found.after),  # of what is the same, one side says it all
    }


def _entry(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {"graph": entry.section, "attributes": dict(entry.attributes)}
