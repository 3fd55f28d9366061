"""What changed between two programs. Nodes are aligned by origin: a new name is no change.

Order within a graph is a change only of what communicates: what is computed does not depend on the order of a
functional graph, but when a transfer begins and when it is waited for does. Such a node is reordered if it stands
behind another computation than before, of those that kept their own order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from graphshard import text
from graphshard.communication import communicates
from graphshard.costs import costs
from graphshard.dataflow import arguments
from graphshard.diff.alignment import Alignment, Item, increasing, without_stage
from graphshard.diff.difference import Diff, Difference, Entry, Kind, in_order
from graphshard.program import Level, Program, Slot, info
from graphshard.text.spelling import spell, spell_slot, spell_target, spell_type, type_of

_ATTRIBUTES = ("phase", "module", "stage", "tag", "layout", "as_given")


def diff(before: Program, after: Program, by: str = "") -> Diff:
    """What has to change in ``before`` to give ``after``; the two share no graphs.

    ``by`` is the one pass between them; without it, a pass is known only where a node says which one made it.
    """
    comparison = _Comparison(before, after, by)
    entries = (*comparison.nodes(), *comparison.outputs(), *comparison.removed())
    return Diff(tuple(_header(before, after)), entries, costs(before), costs(after))


class _Comparison:
    def __init__(self, before: Program, after: Program, by: str) -> None:
        self.by = (by,) if by else ()
        self.restaged = Kind.PLACED if before.level is Level.CAPTURED else Kind.RESTAGED
        self.sections = before.sections(), after.sections()
        self.alignment = Alignment(before, after)
        self.moves = dict(self._reordered())

    def nodes(self) -> Iterable[Difference]:
        for item in self.alignment.after:
            entry = self._entry(item, 1)
            old = self.alignment.partner.get(item.node)
            by = self.by or ((entry.made_by,) if entry.made_by else ())
            if item.node in self.alignment.copied:
                yield Difference(Kind.DUPLICATED, self._entry(self.alignment.copied[item.node], 0), entry, (), by)
            elif old is None:
                yield Difference(Kind.ADDED, None, entry, (), by)
            else:
                what = tuple(self._differences(old, item))
                kind = self._kind(old, item, what)
                by = self.by if kind is not Kind.SAME else ()
                yield Difference(kind, self._entry(old, 0), entry, what, by)

    def removed(self) -> Iterable[Difference]:
        for item in self.alignment.before:
            if item.node not in self.alignment.successor:
                yield Difference(Kind.REMOVED, self._entry(item, 0), None, (), self.by)

    def outputs(self) -> Iterable[Difference]:
        for name in in_order(*self.sections):
            old, new = ((s[name].outputs if name in s else {}) for s in self.sections)
            entries = [self._outputs(name, side) for side in (0, 1)]
            # One that only went to another stage is the same output.
            elsewhere = {without_stage(slot): slot for slot in new if slot not in old}
            for slot, node in old.items():
                heir = slot if slot in new else elsewhere.pop(without_stage(slot), None)
                if heir is None:
                    yield Difference(Kind.REMOVED, entries[0][slot], None, (), self.by)
                    continue
                what = [f"slot: {spell_slot(slot)} -> {spell_slot(heir)}"] if heir != slot else []
                what += [] if self._same(node, new[heir]) else [f"value: %{node.name} -> %{new[heir].name}"]
                kind = self.restaged if heir != slot else Kind.CHANGED if what else Kind.SAME
                yield Difference(kind, entries[0][slot], entries[1][heir], tuple(what), self.by if what else ())
            for slot in elsewhere.values():
                yield Difference(Kind.ADDED, None, entries[1][slot], (), self.by)

    def _kind(self, old: Item, new: Item, what: Sequence[str]) -> Kind:
        stages = [info(item.node).stage for item in (old, new)]
        if old.section != new.section:
            return Kind.MOVED
        if None not in stages and stages[0] != stages[1]:
            return Kind.RESTAGED
        if what and all(line.startswith(("stage:", "slot:")) for line in what):
            return self.restaged
        if all(line.startswith("place:") for line in what):
            return Kind.REORDERED if what else Kind.SAME
        return Kind.CHANGED

    def _entry(self, item: Item, side: int) -> Entry:
        section, record = self.sections[side][item.section], info(item.node)
        values = [("type", spell_type(type_of(item.node.meta["val"])))]
        values += [
            (name, str(value)) for name, value in vars(record).items() if value not in (None, "") and value is not False
        ]
        line = text.node_text(item.node, item.section, section)
        return Entry(item.section, item.node.name, line, item.index, "", record.module, tuple(values), record.made_by)

    def _outputs(self, name: str, side: int) -> dict[Slot, Entry]:
        if name not in self.sections[side]:
            return {}
        section = self.sections[side][name]
        return {
            slot: Entry(name, node.name, f"return {spell_slot(slot)} %{node.name}", index, spell_slot(slot))
            for index, (slot, node) in enumerate(section.outputs.items(), len(section.graph.nodes))
        }

    def _differences(self, old: Item, new: Item) -> Iterable[str]:
        if old.section != new.section:
            yield f"graph: {old.section} -> {new.section}"
        if old.slot and new.slot:
            if old.slot != new.slot:
                yield f"slot: {spell_slot(old.slot)} -> {spell_slot(new.slot)}"
        elif old.node.target != new.node.target:
            yield f"operator: {spell_target(old.node.target)} -> {spell_target(new.node.target)}"
        else:
            first, second = arguments(old.node), arguments(new.node)
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
        if new.node in self.moves:
            yield f"place: {self.moves[new.node]}"

    def _same(self, old: Any, new: Any) -> bool:
        """Whether an argument is what it was before."""
        if isinstance(new, fx.Node):
            partner = self.alignment.partner.get(new)
            return partner is not None and partner.node is old
        if isinstance(new, (list, tuple)) and isinstance(old, (list, tuple)):
            return len(old) == len(new) and all(map(self._same, old, new))
        return not isinstance(old, fx.Node) and spell(old) == spell(new)

    def _reordered(self) -> Iterable[tuple[fx.Node, str]]:
        """Communicating nodes that stand behind another computation than before, and behind which ones."""
        pairs = [
            (old, item)
            for item in self.alignment.after
            if item.slot is None and (old := self.alignment.partner.get(item.node)) and old.section == item.section
        ]
        for name in self.sections[1]:
            here = [(old, new) for old, new in pairs if new.section == name]
            computed = [(old, new) for old, new in here if not communicates(new.node)]
            fixed = [computed[i] for i in increasing([old.index for old, _ in computed])]
            behind: list[dict[fx.Node, str]] = [{}, {}]
            for side in (0, 1):
                stations = {pair[side].node: pair[1].node.name for pair in fixed}
                last = ""
                for item in sorted((pair[side] for pair in here), key=lambda item: item.index):
                    last = stations.get(item.node, last)
                    behind[side][item.node] = last
            for old, new in here:
                places = behind[0][old.node], behind[1][new.node]
                if communicates(new.node) and places[0] != places[1]:
                    yield new.node, " -> ".join(f"behind %{place}" if place else "first" for place in places)


def _header(before: Program, after: Program) -> Iterable[str]:
    old, new = (
        [line for line in text.header_lines(program) if not line.startswith("history ")] for program in (before, after)
    )
    known = set(old), set(new)
    for line in old:
        if line not in known[1]:
            yield f"- {line}"
    for line in new:
        if line not in known[0]:
            yield f"+ {line}"
