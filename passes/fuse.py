"""``fuse``: operations that read and write the same rows become regions, which code generation turns into one kernel.

What one operation of a region makes for another never goes through memory, and what another region made is computed
again where that is cheaper than to read it (duplicates.py). Dropout's mask is computed like any other value, from its
seed. Matrix products, attention and whatever communicates or draws from a generator stay outside, and bound the stretch
of a graph in which a region may lie: no value waits for a product that it does not need. What only reads the same
values is computed together, too, as both results of SwiGLU's backward are, and Lion's parameter and average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphshard.analysis import has_products, is_random, nbytes
from graphshard.communication import communicates
from graphshard.dataflow import is_pointwise, is_view
from graphshard.duplicates import CPU_FUNCTION_FLOPS, Group, repeat_cheap
from graphshard.errors import PassOptionError
from graphshard.homes import on_host
from graphshard.make_region import computing, make_region
from graphshard.pipeline import Context
from graphshard.program import Phase, Program, Role, Section, info, val
from graphshard.rewrite import call, first_operation
from graphshard.rows import Extent, Space, column_space, common, picks, space

aten = torch.ops.aten
gs = torch.ops.graphshard

_WORTHWHILE = (
    *(aten._softmax.default, aten._softmax_backward_data.default, aten._log_softmax.default),
    *(aten.native_layer_norm.default, aten.native_layer_norm_backward.default),
)
"""Operators of which one alone is worth a kernel on a GPU: torch's read their operands more often."""

_Place = tuple[Phase, int | None, str]


@dataclass(frozen=True)
class Fuse:
    """Make regions of at most ``most`` operations; ``body``: also of micro-batches, whose values debug_nan shows.
    ``function_flops``: what an exponential costs where the program is to run; ``autotune``: kernels for a GPU search
    their block sizes and warps when they first run, instead of taking those that are right for most. ``on_gpu``: for
    kernels that sum over rows, too, and read and write less than torch's own even of one operator; what the backward
    needs of a log-softmax is then one number a row."""

    most: int = 64
    body: bool = True
    function_flops: float = CPU_FUNCTION_FLOPS
    autotune: bool = False
    on_gpu: bool = False

    name: ClassVar[str] = "fuse"

    def __post_init__(self) -> None:
        if self.most < 1:
            raise PassOptionError(self.name, f"most={self.most}", "an integer of at least 1")
        if not 0 <= self.function_flops < math.inf:
            raise PassOptionError(self.name, f"function_flops={self.function_flops}", "a finite number of at least 0")

    @property
    def exact(self) -> bool:
        """A region means its operations; but a log-softmax is rounded otherwise where its sums are kept."""
        return not self.on_gpu

    def run(self, program: Program, ctx: Context) -> Program:
        for name, section in program.sections().items():
            if name == "body" and not self.body:
                continue
            in_body = name == "body"  # an update writes over state, which nobody else may read meanwhile
            if in_body:
                _bring_forward(section)
                if self.on_gpu:
                    _keep_log_sums(section)
            elif self.on_gpu:
                _gather_scalars(section, self.most, self.autotune)
            groups = _Grouping(section, self.most, self.on_gpu and in_body).run()
            if in_body:
                repeat_cheap(section, groups, self.most, self.function_flops)
            for group in groups:
                alone = in_body and self.on_gpu and any(node.target in _WORTHWHILE for node in group.nodes)
                if computing(group.nodes) > (not alone):
                    make_region(section, group.nodes, self.autotune, least=1 if alone else 2)
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


def _keep_log_sums(section: Section) -> None:
    """A log-softmax is its input less one number a row: the backward can compute it again from that, in one pass."""
    for node in list(section.nodes()):
        if node.target is not aten._log_softmax.default or node.args[2] or space(node) is None:
            continue
        source, dim, _ = node.args
        with node.graph.inserting_before(node):
            sums = call(node.graph, aten.logsumexp.default, (source, [dim], True), info(node))
            result = call(node.graph, aten.sub.Tensor, (source, sums), info(node))
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)


def _gather_scalars(section: Section, most: int, autotune: bool) -> None:
    """What an update computes of its inputs that are numbers, such as steps, comes first, in regions: each operation is
    a launch otherwise, and takes as long as updating a million elements."""
    found: dict[fx.Node, None] = {}
    for node in section.nodes():
        numbers = all(source in found or source.op == "placeholder" for source in node.all_input_nodes)
        scalars = all(_is_number(n) for n in (node, *node.all_input_nodes))
        if numbers and scalars and is_pointwise(node) and not is_random(node) and not on_host(node):
            found[node] = None
    end = None
    for node in found:
        (first_operation(section.graph).prepend if end is None else end.append)(node)
        end = node
    for place in dict.fromkeys(map(_place, found)):
        for chunk in _chunks([node for node in found if _place(node) == place], most):
            make_region(section, chunk, autotune)


def _is_number(node: fx.Node) -> bool:
    value = val(node)
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _chunks(nodes: Sequence[fx.Node], most: int) -> list[list[fx.Node]]:
    """Groups of about ``most`` operations; those that read one another are in one. Alike ones have one kernel."""
    home: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        own = [node]
        for other in {id(home[s]): home[s] for s in node.all_input_nodes if s in home}.values():
            own = [*other, *own]
        home |= dict.fromkeys(own, own)
    chunks: list[list[fx.Node]] = [[]]
    for part in {id(part): part for part in home.values()}.values():
        if chunks[-1] and len(chunks[-1]) + len(part) > most:
            chunks.append([])
        chunks[-1] += part
    return [sorted(chunk) for chunk in chunks if chunk]


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

    def __init__(self, section: Section, most: int, sums_columns: bool) -> None:
        self.section, self.most, self.sums_columns = section, most, sums_columns
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
            elif (where := self._space(node)) is not None and _may_move(self.section, node):
                self._assign(node, where, place)
        self._close(*self.open)
        return list(dict.fromkeys(self.group.values()))  # in order of their first nodes

    def _space(self, node: fx.Node) -> Space | None:
        found = space(node)
        return column_space(node) if found is None and self.sums_columns else found

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
