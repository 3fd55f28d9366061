"""``fuse``: operations that read and write the same rows become regions, which code generation turns into one kernel.

What one operation of a region makes for another never goes through memory, and what another region made is computed
again where that is cheaper than to read it (duplicates.py). Dropout's mask is computed like any other value, from its
seed. Matrix products, attention and whatever communicates or draws from a generator stay outside, and bound the stretch
of a graph in which a region may lie: no value waits for a product that it does not need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphshard.analysis import has_products, is_random
from graphshard.communication import communicates
from graphshard.dataflow import is_getitem, is_view, upstream
from graphshard.duplicates import CPU_FUNCTION_FLOPS, Group, repeat_cheap
from graphshard.pipeline import Context
from graphshard.program import Phase, Program, Role, Section, info
from graphshard.rewrite import clone, into_region
from graphshard.rows import Space, common, picks, space, sums_rows

aten = torch.ops.aten
gs = torch.ops.graphshard


@dataclass(frozen=True)
class Fuse:
    """Make regions of at most ``most`` operations; ``body``: also of micro-batches, whose values debug_nan shows.
    ``function_flops``: what an exponential costs where the program is to run; ``autotune``: kernels for a GPU search
    their block sizes and warps when they first run, instead of taking those that are right for most."""

    most: int = 64
    body: bool = True
    function_flops: float = CPU_FUNCTION_FLOPS
    autotune: bool = False

    name: ClassVar[str] = "fuse"
    exact: ClassVar[bool] = True  # a region means its operations

    def run(self, program: Program, ctx: Context) -> Program:
        for name, section in program.sections().items():
            if name == "body" and not self.body:
                continue
            groups = _Grouping(section, self.most).run()
            if name == "body":  # an update writes over state, which nobody else may read meanwhile
                repeat_cheap(section, groups, self.most, self.function_flops)
            for group in groups:
                if _computing(group.nodes) > 1:
                    _make_region(section, group, self.autotune)
        return program


class _Grouping:
    """Assigns the nodes of one section, in order."""

    def __init__(self, section: Section, most: int) -> None:
        self.section, self.most = section, most
        self.group: dict[fx.Node, Group] = {}
        self.open: dict[tuple[Phase, int | None], list[Group]] = {}  # groups that may grow, by phase and stage

    def run(self) -> list[Group]:
        for node in self.section.nodes():
            place = (info(node).phase, info(node).stage)
            if communicates(node):
                # Not in an update: it may leave new state behind the gather of its parameter, which does not need that.
                if info(node).phase is not Phase.UPDATE:
                    self.open.clear()
            elif has_products(node):
                self.open.pop(place, None)
            elif picks(node):
                source = node.all_input_nodes[0]
                if source in self.group:
                    self._add(node, self.group[source])
            elif (where := space(node)) is not None and self._may_move(node):
                self._place(node, where, place)
        return list(dict.fromkeys(self.group.values()))  # in order of their first nodes

    def _may_move(self, node: fx.Node) -> bool:
        """Not what code generation writes in place: sums over micro-batches, and casts of what a bucket takes."""
        if is_random(node):
            return False
        slots = [self.section.inputs.get(source) for source in node.all_input_nodes]
        if any(slot is not None and slot.role is Role.CARRY for slot in slots) and info(node).phase is not Phase.UPDATE:
            return False
        packed = len(node.users) == 1 and next(iter(node.users)).target is gs.pack.default
        return not (packed and node.target is aten._to_copy.default)

    def _place(self, node: fx.Node, where: Space, place: tuple[Phase, int | None]) -> None:
        """Join the groups that make what ``node`` reads; with none, begin one."""
        opened = self.open.setdefault(place, [])
        makers = dict.fromkeys(self.group[s] for s in reversed(node.all_input_nodes) if s in self.group)
        joined: Group | None = None
        for group in makers:
            shared = common(group.space, where) if group in opened else None
            if shared is None:
                continue
            if joined is None:
                if len(group.nodes) < self.most and not self._reach(self._outside([node], group), group):
                    joined, where = group, shared
                    self._add(node, group)
            elif len(joined.nodes) + len(group.nodes) <= self.most and self._may_merge(joined, group):
                opened.remove(group)
                joined.first, where = min(joined.first, group.first), shared
                for member in group.nodes:
                    self._add(member, joined)
        if joined is None:
            joined = Group(where, node)
            opened.append(joined)
            self._add(node, joined)
        joined.space = where

    def _add(self, node: fx.Node, group: Group) -> None:
        group.nodes[node] = None
        self.group[node] = group

    def _may_merge(self, one: Group, other: Group) -> bool:
        """No path leads from one to the other through what is in neither."""
        both = (one, other)
        around = [
            source
            for group in both
            for source in self._outside(group.nodes, group)
            if self.group.get(source) not in both
        ]
        return not any(self._reach(around, group) for group in both)

    def _outside(self, nodes: Iterable[fx.Node], group: Group) -> list[fx.Node]:
        return [s for node in nodes for s in node.all_input_nodes if self.group.get(s) is not group]

    def _reach(self, sources: Iterable[fx.Node], group: Group) -> bool:
        """Whether any of ``sources`` depends on ``group``, where groups compute as one."""
        seen: set[fx.Node] = set()
        stack = list(sources)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            unit = self.group.get(node)
            if unit is group:
                return True
            if unit is None:
                # What stands before the group cannot depend on it, unless as part of another group.
                if group.first < node:
                    stack += node.all_input_nodes
            else:
                seen.update(unit.nodes)
                stack += self._outside(unit.nodes, unit)
        return False


def _computing(nodes: Iterable[fx.Node]) -> int:
    """How many do more than show another's result."""
    return sum(not (is_view(node) or is_getitem(node)) for node in nodes)


def _make_region(section: Section, group: Group, autotune: bool) -> None:
    """A region of the group's nodes, where the last of them is."""
    # No other node of the group reads a sum over all rows, which is there behind the last of them.
    group.nodes |= {pick: None for node in group.nodes if sums_rows(node) for pick in node.users}
    members = sorted(group.nodes)
    for node in reversed(members):
        if not node.users:
            section.graph.erase_node(node)
            members.remove(node)
    read = [node for node in members if any(user not in group.nodes for user in node.users)]
    results = dict.fromkeys(base for node in read if (base := _shown(node, group)) in group.nodes)
    needed = upstream(results, stop=lambda node: node not in group.nodes)
    nodes = [node for node in members if node in needed]
    if _computing(nodes) < 2:
        return  # nobody reads the others
    inside = set(nodes)
    # What reads the region, views of its results too, waits until the last of its nodes is there.
    behind: dict[fx.Node, None] = {}
    node = nodes[0]
    while (node := node.next) is not nodes[-1]:
        if node not in inside and any(source in inside or source in behind for source in node.all_input_nodes):
            behind[node] = None
    made = into_region(section, nodes, list(results), "fuse", autotune)
    next_one = list(made.values())[-1].next
    for node in behind:
        next_one.prepend(node)
    for node in nodes:
        if is_view(node) and any(user not in inside for user in node.users):
            made[node] = _again(node, made, inside, next(iter(behind), next_one))
    for old, new in made.items():
        old.replace_all_uses_with(new, lambda user: user not in inside)
    for node in reversed(nodes):
        section.graph.erase_node(node)


def _shown(node: fx.Node, group: Group) -> fx.Node:
    """What ``node``, if it is a view, shows of the group's own, or of what the group reads."""
    while node in group.nodes and is_view(node):
        (node,) = node.all_input_nodes
    return node


def _again(view: fx.Node, made: dict[fx.Node, fx.Node], inside: Collection[fx.Node], before: fx.Node) -> fx.Node:
    """A view that the region itself reads, once more outside of it: as a result it would be a copy."""
    if view in made or view not in inside:
        return made.get(view, view)
    source = _again(view.all_input_nodes[0], made, inside, before)
    with view.graph.inserting_before(before):
        made[view] = clone(view, lambda _: source)
    return made[view]
