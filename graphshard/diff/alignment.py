"""Which node of one program is which of another: by origin, so that a new name, place or graph makes no new node."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import fx

from graphshard.communication import communicates
from graphshard.program import Program, Slot, info


@dataclass(frozen=True, eq=False)
class Item:
    """A node and where it is."""

    section: str
    node: fx.Node
    index: int
    slot: Slot | None  # of an input

    @property
    def identity(self) -> Hashable:
        """What stays the same through rewrites; of a node without origin, its name."""
        record = info(self.node)
        return self.slot or (self.node.target, record.origin or (record.made_by, self.node.name))

    @property
    def purpose(self) -> tuple[Hashable, ...]:
        """What an operation that communicates is for; empty for others, and for one that stems from a captured node."""
        record = info(self.node)
        if self.slot or record.origin or not record.module or not communicates(self.node):
            return ()
        return self.node.target, record.module, record.stage

    @property
    def origin(self) -> str:
        """Origin of an operation; inputs are told by their slots."""
        return "" if self.slot else info(self.node).origin


class Alignment:
    """Pairs of nodes. ``before`` and ``after`` are all nodes but the output ones, in order.

    ``partner`` maps a node after to what it was before, ``successor`` the other way. ``copied`` maps a node after that
    is a further one of the same origin and operator to the one before.
    """

    def __init__(self, before: Program, after: Program) -> None:
        self.before, self.after = _items(before), _items(after)
        self.partner: dict[fx.Node, Item] = {}
        self.successor: dict[fx.Node, Item] = {}
        self.copied: dict[fx.Node, Item] = {}
        self._pair(lambda item: (item.section, item.identity))
        # The same place on another stage.
        self._pair(lambda item: (item.section, without_stage(item.slot)) if item.slot else None)
        # A rewrite that puts another operator in a node's place hands the origin on.
        self._pair(lambda item: (item.section, item.origin) if item.origin else None)
        # The same operation in another graph.
        self._pair(lambda item: item.identity if item.origin else None)
        # Communication has no origin: the same collective for the same module, even in another graph, as hoisting does.
        self._pair(lambda item: (item.section, *item.purpose) if item.purpose else None)
        self._pair(lambda item: item.purpose or None)
        originals = {item.identity: item for item in self.before if item.origin}
        for item in self.after:
            if item.node not in self.partner and item.origin and item.identity in originals:
                self.copied[item.node] = originals[item.identity]

    def _pair(self, key: Callable[[Item], Hashable]) -> None:
        """Align nodes of equal key that are not aligned yet: those of equal name first, then those of equal phase."""
        groups = defaultdict[Hashable, tuple[list[Item], list[Item]]](lambda: ([], []))
        for side, items, taken in ((0, self.before, self.successor), (1, self.after, self.partner)):
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


def increasing(values: Sequence[int]) -> list[int]:
    """Positions of a longest increasing subsequence of ``values``, which are distinct; O(n log n) (Fredman 1975)."""
    tops: list[int] = []  # of each pile, the position of its smallest last value
    before: list[int] = []
    for position, value in enumerate(values):
        pile = bisect_left(tops, value, key=values.__getitem__)
        before.append(tops[pile - 1] if pile else -1)
        tops[pile : pile + 1] = [position]
    result = []
    position = tops[-1] if tops else -1
    while position >= 0:
        result.append(position)
        position = before[position]
    return result[::-1]


def without_stage(slot: Slot) -> Hashable:
    """A slot but for the stage that holds it."""
    return slot.role, slot.name, slot.key


def _items(program: Program) -> list[Item]:
    return [
        Item(name, node, index, section.inputs.get(node))
        for name, section in program.sections().items()
        for index, node in enumerate(section.graph.nodes)
        if node.op != "output"
    ]


def _same_name(old: Item, new: Item) -> bool:
    return old.node.name == new.node.name


def _same_phase(old: Item, new: Item) -> bool:
    return info(old.node).phase == info(new.node).phase


def _anything(old: Item, new: Item) -> bool:
    return True
