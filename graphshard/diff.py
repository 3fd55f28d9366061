"""What changed between two programs. Nodes are aligned by origin: a new name or place is no rewrite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphshard import text
from graphshard.alignment import Alignment, Item, without_stage
from graphshard.program import Program, Slot, info
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
    """The difference of two programs. ``header``: its lines that came or went, after ``+`` or ``-``. ``moved``: to
    another graph."""

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
    return _Comparison(before, after).diff()


def diff_text(before: Path | str, after: Path | str, color: bool = False) -> str:
    """The rendered difference of two files of graph text. Raises what text.read raises."""
    return diff(text.read(before), text.read(after)).render(color)


class _Comparison:
    def __init__(self, before: Program, after: Program) -> None:
        self.programs = before, after
        self.sections = before.sections(), after.sections()
        self.alignment = Alignment(before, after)

    def diff(self) -> Diff:
        added, changed, moved, duplicated = [], [], [], []
        for item in self.alignment.after:
            entry = self._entry(item, 1, item.index)
            old = self.alignment.partner.get(item.node)
            if item.node in self.alignment.copied:
                original = self.alignment.copied[item.node]
                duplicated.append(Copy(self._entry(original, 0, original.index), entry))
            elif old is None:
                added.append(entry)
            else:
                what = tuple(self._differences(old, item))
                change = Change(self._entry(old, 0, item.index), entry, what)
                if old.section != item.section:
                    moved.append(change)
                elif what:
                    changed.append(change)
        outputs = self._outputs()
        return Diff(
            tuple(_header(*self.programs)),
            (*added, *outputs.added),
            (*self._removed(), *outputs.removed),
            (*changed, *outputs.changed),
            tuple(moved),
            tuple(duplicated),
        )

    def _removed(self) -> Iterable[Entry]:
        """What has no successor, each placed after the last one before it that has."""
        place: dict[str, float] = defaultdict(lambda: -0.5)
        for item in self.alignment.before:
            heir = self.alignment.successor.get(item.node)
            if heir is None:
                yield self._entry(item, 0, place[item.section])
            elif heir.section == item.section:
                place[item.section] = heir.index + 0.5

    def _entry(self, item: Item, side: int, position: float) -> Entry:
        section = self.sections[side][item.section]
        return Entry(item.section, item.node.name, text.node_text(item.node, item.section, section), position)

    def _differences(self, old: Item, new: Item) -> Iterable[str]:
        if old.slot and new.slot:
            if old.slot != new.slot:
                yield f"slot: {spell_slot(old.slot)} -> {spell_slot(new.slot)}"
        elif old.node.target != new.node.target:
            yield f"operator: {spell_target(old.node.target)} -> {spell_target(new.node.target)}"
        else:
            first, second = _arguments(old.node), _arguments(new.node)
            for name in first | second:
                if name not in first or name not in second or not self._same(first[name], second[name]):
                    yield f"{name}: " + " -> ".join(spell(s[name]) if name in s else "default" for s in (first, second))
        kinds = [spell_type(type_of(item.node.meta["val"])) for item in (old, new)]
        if kinds[0] != kinds[1]:
            yield f"type: {kinds[0]} -> {kinds[1]}"
        for name in _ATTRIBUTES:
            values = [getattr(info(item.node), name) for item in (old, new)]
            if values[0] != values[1]:
                yield f"{name}: " + " -> ".join('""' if value == "" else str(value) for value in values)

    def _same(self, old: Any, new: Any) -> bool:
        """Whether an argument is what it was before."""
        if isinstance(new, fx.Node):
            partner = self.alignment.partner.get(new)
            return partner is not None and partner.node is old
        if isinstance(new, (list, tuple)) and isinstance(old, (list, tuple)):
            return len(old) == len(new) and all(map(self._same, old, new))
        return not isinstance(old, fx.Node) and spell(old) == spell(new)

    def _outputs(self) -> Diff:
        added, removed, changed = [], [], []
        for name in _in_order({*self.sections[0], *self.sections[1]}):
            old, new = ((s[name].outputs if name in s else {}) for s in self.sections)
            end = len(self.sections[1][name].graph.nodes) if name in self.sections[1] else 0
            # One that only went to another stage is the same output.
            elsewhere = {without_stage(slot): slot for slot in new if slot not in old}
            for index, (slot, node) in enumerate(old.items()):
                before = _output(name, slot, node, end + index)
                heir = slot if slot in new else elsewhere.pop(without_stage(slot), None)
                if heir is None:
                    removed.append(before)
                    continue
                what = [f"slot: {spell_slot(slot)} -> {spell_slot(heir)}"] if heir != slot else []
                what += [] if self._same(node, new[heir]) else [f"value: %{node.name} -> %{new[heir].name}"]
                if what:
                    changed.append(Change(before, _output(name, heir, new[heir], end + index), tuple(what)))
            late = [slot for slot in new if slot in elsewhere.values()]
            added += [_output(name, slot, new[slot], end + len(old) + i) for i, slot in enumerate(late)]
        return Diff((), tuple(added), tuple(removed), tuple(changed))


def _output(section: str, slot: Slot, node: fx.Node, position: float) -> Entry:
    return Entry(section, node.name, f"return {spell_slot(slot)} %{node.name}", position)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names that the operator gives them."""
    target = node.target
    names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    positional = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(node.args)}
    return positional | node.kwargs


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
