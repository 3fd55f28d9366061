"""Both graphs of a diff side by side: every entry of either in its order, partners in one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphshard.diff.alignment import increasing
from graphshard.diff.difference import Diff, Difference, Entry, in_order


@dataclass(frozen=True)
class Row:
    """A line of either graph or of both. A pair whose order changed, or that moved to another graph, is two rows."""

    difference: Difference
    before: Entry | None
    after: Entry | None


def rows(diff: Diff) -> dict[str, list[Row]]:
    """The rows of every graph; each side reads as its graph does, from top to bottom."""
    left: dict[str, list[Row]] = {}
    right: dict[str, list[Row]] = {}
    for difference in diff.entries:
        old, new = difference.before, difference.after
        if new is not None:
            right.setdefault(new.section, []).append(Row(difference, None, new))
            if difference.kind.has_own_partner and old is not None:
                left.setdefault(old.section, []).append(Row(difference, old, None))
        elif old is not None:
            left.setdefault(old.section, []).append(Row(difference, old, None))
    return {name: _merged(left.get(name, []), right.get(name, [])) for name in in_order(left, right)}


def _merged(left: list[Row], right: list[Row]) -> list[Row]:
    left.sort(key=lambda row: row.before.index if row.before else 0)
    right.sort(key=lambda row: row.after.index if row.after else 0)
    at = {id(row.difference): position for position, row in enumerate(left)}
    pairs = [(at[id(row.difference)], position) for position, row in enumerate(right) if id(row.difference) in at]
    result: list[Row] = []
    i = j = 0
    anchors: Iterable[tuple[int, int]] = (pairs[k] for k in increasing([old for old, _ in pairs]))
    for old, new in (*anchors, (len(left), len(right))):
        result += left[i:old] + right[j:new]
        if old < len(left):
            result.append(Row(right[new].difference, left[old].before, right[new].after))
        i, j = old + 1, new + 1
    return result
