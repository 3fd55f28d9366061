"""What changed between two programs. Nodes are aligned by origin: a new name or place is no rewrite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphshard import text
from graphshard.program import Program, Section, Slot, info
from graphshard.text_spelling import spell, spell_slot, spell_target, spell_type, type_of

_ATTRIBUTES = ("phase", "module", "stage", "tag", "layout")
_COLLAPSE = 4
"""As many nodes with one and the same change of type or attributes print as one line."""


@dataclass(frozen=True)
class Entry:
    """A node, input or output of a graph. ``position``: its place in the graph after; of what is gone, where it was."""

    section: str
    name: str
    text: str
    position: float


@dataclass(frozen=True)
class Change:
    """A node before and after; ``what`` differs, one line each, such as ``mat2: %w -> %view``."""

    before: Entry
    after: Entry
    what: tuple[str, ...]


@dataclass(frozen=True)
class Copy:
    """A node that was there, and a further one of the same origin and operator."""

    original: Entry
    copy: Entry


@dataclass(frozen=True)
class Diff:
    """The difference of two programs. ``header``: its lines that came or went, after ``+`` or ``-``. ``moved``: from one
    graph to another."""

    header: tuple[str, ...] = ()
    added: tuple[Entry, ...] = ()
    removed: tuple[Entry, ...] = ()
    changed: tuple[Change, ...] = ()
    moved: tuple[Change, ...] = ()
    duplicated: tuple[Copy, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return any((self.header, self.added, self.removed, self.changed, self.moved, self.duplicated))

    def render(self, color: bool = False) -> str:
        """Readable text, graph by graph: ``+`` added, ``-`` removed, ``~`` changed; ``color``: with ANSI escapes."""
        if not self:
            return "no difference"
        blocks = ["\n".join(self.header)] if self.header else []
        lines = sorted(self._lines(), key=lambda line: line[1])
        for section in _in_order({name for name, _, _ in lines}):
            mine = [body for name, _, body in lines if name == section]
            blocks.append("\n".join([f"graph {section}: {self._counts(section)}", *(f"  {body}" for body in mine)]))
        whole = "\n\n".join(blocks)
        return "\n".join(map(_paint, whole.split("\n"))) if color else whole

    def _lines(self) -> list[tuple[str, float, str]]:
        """Section, position and text of every difference."""
        lines = [(e.section, e.position, f"+ {e.text}") for e in self.added]
        lines += [(e.section, e.position, f"- {e.text}") for e in self.removed]
        for copy in self.duplicated:
            note = f"copy of %{copy.original.name}{_elsewhere(copy.original, copy.copy)}"
            lines.append((copy.copy.section, copy.copy.position, f"+ {copy.copy.text}\n      {note}"))
        for change in self.moved:
            notes = "".join(f"\n      {what}" for what in (f"moved from graph {change.before.section}", *change.what))
            lines.append((change.after.section, change.after.position, f"~ {change.after.text}{notes}"))
        alike = defaultdict[tuple[str, tuple[str, ...]], list[Change]](list)
        for change in self.changed:
            alike[change.after.section, change.what].append(change)
        for (section, what), changes in alike.items():
            if len(changes) >= _COLLAPSE and all(w.split(":")[0] in ("type", *_ATTRIBUTES) for w in what):
                names = [f"%{change.after.name}" for change in changes]
                listing = ", ".join(names if len(names) <= _COLLAPSE else [*names[:3], "...", names[-1]])
                line = f"~ {len(changes)} nodes: {'; '.join(what)} ({listing})"
                lines.append((section, changes[0].after.position, line))
            else:
                notes = "".join(f"\n      {w}" for w in what)
                lines += [(section, c.after.position, f"~ {c.after.text}{notes}") for c in changes]
        return lines

    def _counts(self, section: str) -> str:
        counts = {
            "added": sum(e.section == section for e in self.added),
            "removed": sum(e.section == section for e in self.removed),
            "changed": sum(c.after.section == section for c in self.changed),
            "moved here": sum(c.after.section == section for c in self.moved),
            "duplicated": sum(c.copy.section == section for c in self.duplicated),
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def diff(before: Program, after: Program) -> Diff:
    """What has to change in ``before`` to give ``after``; the two share no graphs."""
    return _Alignment(before, after).diff()


def diff_text(before: Path | str, after: Path | str, color: bool = False) -> str:
    """The rendered difference of two files of graph text. Raises what text.read raises."""
    return diff(text.read(before), text.read(after)).render(color)


@dataclass(frozen=True)
class _Item:
    section: str
    node: fx.Node
    index: int
    slot: Slot | None  # of an input

    @property
    def identity(self) -> Hashable:
        """What stays the same through rewrites within a graph."""
        record = info(self.node)
        return self.slot or (self.node.target, record.origin or (record.made_by, self.node.name))


class _Alignment:
    def __init__(self, before: Program, after: Program) -> None:
        self.programs = before, after
        self.sections = before.sections(), after.sections()
        self.old, self.new = _items(before), _items(after)
        self.partner: dict[fx.Node, _Item] = {}  # node after -> what it was before
        self.successor: dict[fx.Node, _Item] = {}  # and the other way
        self.copied: dict[fx.Node, _Item] = {}  # node after -> the node before that it is a further copy of
        self._pair(lambda item: (item.section, item.identity))
        # A rewrite that puts another operator in a node's place hands the origin on.
        self._pair(lambda item: (item.section, info(item.node).origin) if _has_origin(item) else None)
        self._pair(lambda item: item.identity if _has_origin(item) else None)
        originals = {item.identity: item for item in self.old if _has_origin(item)}
        for item in self.new:
            if item.node not in self.partner and item.identity in originals and _has_origin(item):
                self.copied[item.node] = originals[item.identity]

    def _pair(self, key: Callable[[_Item], Hashable]) -> None:
        """Align nodes of equal key that are not aligned yet: those of equal name first, then those of equal phase."""
        groups = defaultdict[Hashable, tuple[list[_Item], list[_Item]]](lambda: ([], []))
        for side, items, taken in ((0, self.old, self.successor), (1, self.new, self.partner)):
            for item in items:
                if item.node not in taken and (value := key(item)) is not None:
                    groups[value][side].append(item)
        for old, new in groups.values():
            if not old:
                continue
            for alike in (_same_name, _same_phase, _anything):
                for item in list(new):
                    found = next((candidate for candidate in old if alike(candidate, item)), None)
                    if found is not None:
                        old.remove(found)
                        new.remove(item)
                        self.partner[item.node], self.successor[found.node] = found, item

    def diff(self) -> Diff:
        added, changed, moved, duplicated = [], [], [], []
        for item in self.new:
            entry = self._entry(item, 1, item.index)
            old = self.partner.get(item.node)
            if item.node in self.copied:
                original = self.copied[item.node]
                duplicated.append(Copy(self._entry(original, 0, original.index), entry))
            elif old is None:
                added.append(entry)
            else:
                what = tuple(self._differences(old.node, item.node))
                change = Change(self._entry(old, 0, item.index), entry, what)
                if old.section != item.section:
                    moved.append(change)
                elif what:
                    changed.append(change)
        removed = []
        place: dict[str, float] = defaultdict(lambda: -0.5)
        for item in self.old:
            heir = self.successor.get(item.node)
            if heir is None:
                removed.append(self._entry(item, 0, place[item.section]))
            elif heir.section == item.section:
                place[item.section] = heir.index + 0.5
        outputs = self._outputs()
        return Diff(
            tuple(_header(*self.programs)),
            (*added, *outputs.added),
            (*removed, *outputs.removed),
            (*changed, *outputs.changed),
            tuple(moved),
            tuple(duplicated),
        )

    def _entry(self, item: _Item, side: int, position: float) -> Entry:
        section = self.sections[side][item.section]
        return Entry(item.section, item.node.name, text.node_text(item.node, item.section, section), position)

    def _differences(self, old: fx.Node, new: fx.Node) -> Iterable[str]:
        if old.op == new.op == "call_function" and old.target != new.target:
            yield f"operator: {spell_target(old.target)} -> {spell_target(new.target)}"
        else:
            first, second = _arguments(old), _arguments(new)
            for name in first | second:
                if name not in first or name not in second:
                    yield f"{name}: {spell(first[name]) if name in first else 'default'} -> " + (
                        spell(second[name]) if name in second else "default"
                    )
                elif self._key(first[name], before=True) != self._key(second[name], before=False):
                    yield f"{name}: {spell(first[name])} -> {spell(second[name])}"
        kinds = [spell_type(type_of(node.meta["val"])) for node in (old, new)]
        if kinds[0] != kinds[1]:
            yield f"type: {kinds[0]} -> {kinds[1]}"
        for name in _ATTRIBUTES:
            values = [getattr(info(node), name) for node in (old, new)]
            if values[0] != values[1]:
                yield " -> ".join([f"{name}: {_shown(values[0])}", _shown(values[1])])

    def _key(self, value: Any, before: bool) -> Hashable:
        """An argument with nodes replaced by what they are before."""
        if isinstance(value, fx.Node):
            return value if before or value not in self.partner else self.partner[value].node
        if isinstance(value, (list, tuple)):
            return tuple(self._key(item, before) for item in value)
        return spell(value)

    def _outputs(self) -> Diff:
        added, removed, changed = [], [], []
        for name in _in_order({*self.sections[0], *self.sections[1]}):
            old, new = ((s[name].outputs if name in s else {}) for s in self.sections)
            end = len(self.sections[1].get(name, Section()).graph.nodes)
            for index, slot in enumerate(old | new):
                entries = [
                    Entry(name, side[slot].name, f"return {spell_slot(slot)} %{side[slot].name}", end + index)
                    for side in (old, new)
                    if slot in side
                ]
                if slot not in old:
                    added += entries
                elif slot not in new:
                    removed += entries
                elif self._key(old[slot], before=True) != self._key(new[slot], before=False):
                    first, second = entries
                    changed.append(Change(first, second, (f"value: %{first.name} -> %{second.name}",)))
        return Diff((), tuple(added), tuple(removed), tuple(changed))


def _items(program: Program) -> list[_Item]:
    return [
        _Item(name, node, index, section.inputs.get(node))
        for name, section in program.sections().items()
        for index, node in enumerate(section.graph.nodes)
        if node.op != "output"
    ]


def _has_origin(item: _Item) -> bool:
    return item.slot is None and bool(info(item.node).origin)


def _same_name(old: _Item, new: _Item) -> bool:
    return old.node.name == new.node.name


def _same_phase(old: _Item, new: _Item) -> bool:
    return info(old.node).phase == info(new.node).phase


def _anything(old: _Item, new: _Item) -> bool:
    return True


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names that the operator gives them."""
    target = node.target
    names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    positional = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(node.args)}
    return positional | node.kwargs


def _shown(value: object) -> str:
    return '""' if value == "" else str(value)


def _header(before: Program, after: Program) -> Iterable[str]:
    old, new = (
        [line for line in text.header_lines(program) if not line.startswith("history ")] for program in (before, after)
    )
    for line in old:
        if line not in new:
            yield f"- {line}"
    for line in new:
        if line not in old:
            yield f"+ {line}"


def _in_order(names: set[str]) -> list[str]:
    return [name for name in ("prologue", "body", "epilogue", "first_epilogue") if name in names]


def _elsewhere(original: Entry, copy: Entry) -> str:
    return "" if original.section == copy.section else f" in graph {original.section}"


def _paint(line: str) -> str:
    """``line`` in the colour of its mark, by ANSI escapes."""
    mark = line.lstrip()[:1]
    code = {"+": "32", "-": "31", "~": "33"}.get(mark) or ("1" if line.startswith("graph ") else "")
    return f"\x1b[{code}m{line}\x1b[0m" if code else line
