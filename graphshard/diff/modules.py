"""Rows of a graph nested by the module they come from, as far as they stand together; outputs are one group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from graphshard.diff.rows import Row

SMALLEST = 3
"""Fewer rows than this are not worth a heading of their own."""


@dataclass
class Group:
    """Neighbouring rows of one module: ``path`` is relative to the group around it, "" for the graph itself."""

    path: str
    items: list[Row | Group] = field(default_factory=list)

    def rows(self) -> Iterable[Row]:
        """All rows, those of inner groups included."""
        for item in self.items:
            if isinstance(item, Group):
                yield from item.rows()
            else:
                yield item


def nested(rows: Iterable[Row]) -> Group:
    """The rows of one graph in their order, grouped."""
    whole = Group("")
    stack = [whole]
    for row in rows:
        entry = row.difference.entry
        path = ["return"] if entry.slot else list(filter(None, entry.module.split(".")))
        inside = [group.path for group in stack[1:]]
        same = max(n for n in range(len(path) + 1) if inside[:n] == path[:n])
        del stack[same + 1 :]
        for name in path[same:]:
            inner = Group(name)
            stack[-1].items.append(inner)
            stack.append(inner)
        stack[-1].items.append(row)
    return Group("", list(_tidy(whole)))


def _tidy(group: Group) -> Iterable[Row | Group]:
    """The items of ``group`` without small groups, and with groups that hold only another one joined to it."""
    for item in group.items:
        if isinstance(item, Row):
            yield item
            continue
        inner = list(_tidy(item))
        only = inner[0] if len(inner) == 1 else None
        if isinstance(only, Group):
            yield Group(f"{item.path}.{only.path}", only.items)
        elif sum(1 for _ in Group("", inner).rows()) < SMALLEST:
            yield from inner
        else:
            yield Group(item.path, inner)
