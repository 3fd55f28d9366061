"""``fuse``: operations that read and write the same rows become regions, which code generation turns into one kernel.

What one operation of a region makes for another never goes through memory, and what another region made is computed
again where that is cheaper than to read it (duplicates.py). Dropout's mask is computed like any other value, from its
seed. Matrix products, attention and whatever communicates or draws from a generator stay outside, and bound the stretch
of a graph in which a region may lie: no value waits for a product that it does not need. What only reads the same
values is computed together, too, as both results of SwiGLU's backward are, and Lion's parameter and average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphshard.analysis import has_products, is_random, nbytes
from graphshard.communication import communicates
from graphshard.dataflow import is_view
from graphshard.duplicates import CPU_FUNCTION_FLOPS, Group, repeat_cheap
from graphshard.errors import PassOptionError
from graphshard.make_region import computing, make_region
from graphshard.pipeline import Context
from graphshard.program import Phase, Program, Role, Section, info, val
from graphshard.rows import Extent, Space, common, picks, space

aten = torch.ops.aten
gs = torch.ops.graphshard

_Place = tuple[Phase, int | None, str]


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

    def __post_init__(self) -> None:
        if self.most < 1:
            raise PassOptionError(self.name, f"most={self.most}", "an integer of at least 1")
        if not 0 <= self.function_flops < math.inf:
            raise PassOptionError(self.name, f"function_flops={self.function_flops}", "a finite number of at least 0")

    def run(self, program: Program, ctx: Context) -> Program:
        for name, section in program.sections().items():
            if name == "body" and not self.body:
                continue
            in_body = name == "body"  # an update writes over state, which nobody else may read meanwhile
            if in_body:
                _bring_forward(section)
            groups = _Grouping(section, self.most).run()
            if in_body:
                repeat_cheap(section, groups, self.most, self.function_flops)
            for group in groups:
                if computing(group.nodes) > 1:
                    make_region(section, group.nodes, self.autotune)
        return program


def _bring_forward(section: Section) -> None:
    """Operations go ahead of products that stand between them and what they alone read, where they make no more than
    that: a region can then hold both, and memory neither meanwhile."""
    for node in list(section.nodes()):
        operands = [source for source in node.all_input_nodes if source.op == "call_function"]
        ended = [s for s in operands if len(s.users) == 1 and _place(s) == _place(node) and _is_member(section, s)]
        if not ended or not _is_member(section, node) or sum(map(_nbytes, ended)) < _nbytes(node):
            continue
        known = max(operands)
        between, other = [], node.prev
        while other is not known:
            between.append(other)
            other = other.prev
        if any(map(has_products, between)) and not any(map(communicates, between)):
            known.append(node)


def _is_member(section: Section, node: fx.Node) -> bool:
    """Whether a region may hold ``node``, which makes one tensor of its own."""
    return isinstance(val(node), torch.Tensor) and not is_view(node) and _may_move(section, node) and bool(space(node))


def _may_move(section: Section, node: fx.Node) -> bool:
    """Not what code generation writes in place: sums over micro-batches, and casts of what a bucket takes."""
    if is_random(node):
        return False
    slots = [section.inputs.get(source) for source in node.all_input_nodes]
    if any(slot is not None and slot.role is Role.CARRY for slot in slots) and info(node).phase is not Phase.UPDATE:
        return False
    packed = len(node.users) == 1 and next(iter(node.users)).target is gs.pack.default
    return not (packed and node.target is aten._to_copy.default)


def _place(node: fx.Node) -> _Place:
    """No region mixes phases, stages or devices."""
    return info(node).phase, info(node).stage, info(node).device


def _nbytes(node: fx.Node) -> int:
    return nbytes(val(node))


class _Grouping:
    """Assigns the nodes of one section, in order."""

    def __init__(self, section: Section, most: int) -> None:
        self.section, self.most = section, most
        self.group: dict[fx.Node, Group] = {}
        self.open: dict[_Place, list[Group]] = {}  # groups that may grow

    def run(self) -> list[Group]:
        for node in self.section.nodes():
            place = _place(node)
            if communicates(node):
                # Not in an update: it may leave new state behind the gather of its parameter, which does not need that.
                if info(node).phase is not Phase.UPDATE:
                    self._close(*self.open)
            elif has_products(node):
                self._close(place)
            elif picks(node):
                source = node.all_input_nodes[0]
                if source in self.group:
                    self._add(node, self.group[source])
            elif (where := space(node)) is not None and _may_move(self.section, node):
                self._assign(node, where, place)
        self._close(*self.open)
        return list(dict.fromkeys(self.group.values()))  # in order of their first nodes

    def _close(self, *places: _Place) -> None:
        """The groups of these places grow no more. Those that read the same values in full become one."""
        for place in places:
            groups = self.open.pop(place, [])
            read = {group: self._read_in_full(group) for group in groups}
            for at, group in enumerate(groups):
                for other in groups[at + 1 :]:
                    shared = common(group.space, other.space)
                    if (
                        shared
                        and read[group] & read[other]
                        and self._fits(group, other)
                        and self._may_merge(group, other)
                    ):
                        groups.remove(other)
                        self._merge(group, other, shared)
                        read[group] = self._read_in_full(group)

    def _read_in_full(self, group: Group) -> set[fx.Node]:
        """What others make of which the group reads every element."""
        sources = self._outside(group.nodes, group)
        return {s for s in sources if isinstance(val(s), torch.Tensor) and group.space.extent(val(s)) is Extent.FULL}

    def _assign(self, node: fx.Node, where: Space, place: _Place) -> None:
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
            elif self._fits(joined, group) and self._may_merge(joined, group):
                opened.remove(group)
                where = shared
                self._merge(joined, group, where)
        if joined is None:
            joined = Group(where)
            opened.append(joined)
            self._add(node, joined)
        joined.space = where

    def _fits(self, one: Group, other: Group) -> bool:
        return len(one.nodes) + len(other.nodes) <= self.most

    def _merge(self, group: Group, other: Group, space: Space) -> None:
        """``group`` takes over the nodes of ``other``."""
        group.space = space
        for member in other.nodes:
            self._add(member, group)

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
                stack += node.all_input_nodes  # also of what stands before the group: a path may lead through another
            else:
                seen.update(unit.nodes)
                stack += self._outside(unit.nodes, unit)
        return False
