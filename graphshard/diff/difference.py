"""The difference of two programs as data. diff.py finds it; diff_text, diff_json and diff_html show it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from graphshard.costs import Costs


class Kind(StrEnum):
    """What became of a node, input or output; of several things the first in this order."""

    ADDED = "added"
    REMOVED = "removed"
    DUPLICATED = "duplicated"  # a further node of the same origin and operator, as recomputation makes
    MOVED = "moved"  # to another graph
    RESTAGED = "restaged"  # to another pipeline stage
    CHANGED = "changed"  # operator, arguments, type or attributes
    PLACED = "placed"  # given its first pipeline stage, and nothing else
    REORDERED = "reordered"  # communicates, and earlier or later than before
    SAME = "same"

    @property
    def has_own_partner(self) -> bool:
        """Whether what is before is this entry's alone: a duplicate has its original beside it."""
        return self not in (Kind.ADDED, Kind.DUPLICATED)


@dataclass(frozen=True)
class Entry:
    """A node, input or output of a graph."""

    section: str
    name: str  # of the node
    text: str  # its line of graph text
    index: int  # in its graph; outputs come last
    slot: str = ""  # of an output
    module: str = ""
    attributes: tuple[tuple[str, str], ...] = ()  # of a node: type, and fields of its NodeInfo that say something
    made_by: str = ""  # the pass that made the node

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others of its program."""
        return self.section, f"return {self.slot}" if self.slot else self.name


@dataclass(frozen=True)
class Difference:
    """An entry before and after; None where there is none. Of what is duplicated, ``before`` is the original."""

    kind: Kind
    before: Entry | None
    after: Entry | None
    what: tuple[str, ...] = ()  # what differs, one line each, such as ``mat2: %w -> %view``
    by: tuple[str, ...] = ()  # the passes responsible, in the order they ran; empty: not known

    @property
    def entry(self) -> Entry:
        """What it is after, or was."""
        entry = self.after or self.before
        assert entry is not None
        return entry


@dataclass(frozen=True)
class Diff:
    """The difference of two programs, node by node, what stayed the same included.

    ``header``: lines of the header that came or went, after ``+`` or ``-``. ``entries``: in order of the graphs after;
    what is gone comes last. ``steps``: the costs after each pass, where several passes lie between.
    """

    header: tuple[str, ...]
    entries: tuple[Difference, ...]
    before: Costs
    after: Costs
    steps: tuple[tuple[str, Costs], ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.header) or any(entry.kind is not Kind.SAME for entry in self.entries)

    def of(self, kind: Kind) -> list[Difference]:
        """All entries of one kind."""
        return [entry for entry in self.entries if entry.kind is kind]


def in_order(*given: Iterable[str]) -> list[str]:
    """The graphs that any of ``given`` names, in execution order."""
    known = {name for names in given for name in names}
    return [name for name in ("prologue", "body", "epilogue", "first_epilogue") if name in known]
