"""What to keep from forward to backward, by a minimum cut: the cheapest values to compute the others from again.

In each block the operations are a network from what is there to what the backward reads. A value's edge costs its bytes
times a price, an operation's the time it takes again, without what fusion spares of reading and writing; the cut of
least capacity says what is kept and what is computed again (the formulation of Jain et al. 2020, "Checkmate", relaxed
as in torch's min-cut partitioner; Ford and Fulkerson 1956). Values that cross blocks are kept, so that no more than one
block is computed again at a time: without that, a cut that keeps fewer bytes can have the larger peak. Growing prices
give a ladder from keeping all to keeping least.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import networkx as nx
import torch
from torch import fx

from graphshard.analysis import FLOPS_PER_BYTE, cost, has_products, is_random, nbytes
from graphshard.blocks import blocks, boundaries, forward_of, root, shows_another
from graphshard.communication import communicates
from graphshard.dataflow import is_getitem
from graphshard.program import Phase, Program, info, val
from graphshard.rows import Space, common, space

if TYPE_CHECKING:
    _Graph = nx.DiGraph[object]  # networkx's classes take no parameters at run time

PRICES = tuple(int(1.5 * 2 ** (k / 2)) for k in range(1, 36))
"""What a byte that is kept may cost, in FLOPs, ascending: from less than reading it once to more than any product."""


POLICIES = ("selective", "full", "all")
"""What may be computed again without a price: of a block all but products and attention, or all; or all there is."""


def is_required(node: fx.Node) -> bool:
    """Whether the backward reads the value of a forward operation."""
    return any(user.op != "output" and info(user).phase is not Phase.FORWARD for user in node.users)


def can_repeat(node: fx.Node) -> bool:
    """Whether computing a node again gives the same: it neither communicates nor draws numbers that have no key."""
    return not communicates(node) and not is_random(node)


@dataclass(frozen=True)
class Rung:
    """One choice for a stage: the blocks before ``blocks`` pay ``PRICES[level]``, the others the price below it."""

    level: int
    blocks: int


@dataclass
class Ladder:
    """The choices for one stage, from recomputing nothing to keeping least."""

    program: Program
    stage: int | None
    _cuts: dict[tuple[object, int], frozenset[int]] = field(default_factory=dict)

    @cached_property
    def block_of(self) -> dict[fx.Node, int]:
        return blocks(forward_of(self.program, self.stage))

    @cached_property
    def kept(self) -> set[fx.Node]:
        """What is kept whatever the price."""
        return boundaries(self.program, self.block_of)

    @cached_property
    def members(self) -> list[list[fx.Node]]:
        """The operations of each block."""
        found: dict[int, list[fx.Node]] = {}
        for node, block in self.block_of.items():
            found.setdefault(block, []).append(node)
        return [found[block] for block in sorted(found)]

    @cached_property
    def rungs(self) -> list[Rung]:
        """Those that differ from the one before; the first recomputes nothing."""
        changes: set[Rung] = set()
        for index in range(len(self.members)):
            self._find(index, 0, len(PRICES), changes)
        return [Rung(0, 0), *sorted(changes, key=lambda rung: (rung.level, rung.blocks))]

    def _find(self, index: int, low: int, high: int, changes: set[Rung]) -> None:
        """Add the levels between at which a block's choice changes. It grows with the price: where both ends agree,
        nothing does."""
        if not any(cost(node) for node in self.choice(index, low) ^ self.choice(index, high)):
            return
        if high - low == 1:
            changes.add(Rung(high, index + 1))
            return
        middle = (low + high) // 2
        self._find(index, low, middle, changes)
        self._find(index, middle, high, changes)

    def recomputed(self, rung: Rung) -> set[fx.Node]:
        """The operations that ``rung`` computes again."""
        found: set[fx.Node] = set()
        for index in range(len(self.members)):
            found |= self.choice(index, rung.level if index < rung.blocks else max(rung.level - 1, 0))
        return found

    def named(self, policy: str) -> set[fx.Node]:
        """The operations that one of POLICIES computes again."""
        again = {node for node in forward_of(self.program, self.stage) if can_repeat(node)}
        if policy != "all":
            again -= self.kept
        return {node for node in again if not _is_dear(node)} if policy == "selective" else again

    def repeated(self, again: set[fx.Node]) -> set[fx.Node]:
        """What a backward that may repeat ``again`` does repeat."""
        return divide(forward_of(self.program, self.stage), again)[1]

    def spent(self, again: set[fx.Node]) -> float:
        """What a backward that may repeat ``again`` spends on it, in FLOPs, as the cuts count it."""
        repeated = self.repeated(again)
        total = 0.0
        for network, members in zip(self._networks, self.members, strict=True):
            inside = {index for index, node in enumerate(members) if node in repeated}
            for index in inside:
                time = network.time[index]
                total += cost(members[index]) if time is None else time
            total += sum(
                read for (source, reader), read in network.reads.items() if reader in inside and source not in inside
            )
        return total

    def choice(self, index: int, level: int) -> frozenset[fx.Node]:
        """What is computed again of a block at a level; level 0 is nothing."""
        if level == 0:
            return frozenset()
        network, members = self._networks[index], self.members[index]
        key = (network.signature, level)
        if key not in self._cuts:
            self._cuts[key] = network.cut(PRICES[level - 1])
        return frozenset(members[i] for i in self._cuts[key])

    @cached_property
    def _networks(self) -> list[_Network]:
        return [_Network(members, self.kept) for members in self.members]


class _Network:
    """The flow network of one block; nodes are numbered in order, so that blocks that are alike share their cuts."""

    def __init__(self, members: list[fx.Node], kept: set[fx.Node]) -> None:
        number = {node: index for index, node in enumerate(members)}
        outside: dict[fx.Node, int] = {}
        self.edges: list[tuple[int, int]] = []
        self.reads: dict[tuple[int, int], int] = {}  # time that it takes to read what is kept, and is not fused
        for node in members:
            for source in map(_shown, node.all_input_nodes):
                if source.op != "call_function":
                    continue  # parameters, buffers and the batch are there in the backward too
                if source not in number:
                    outside.setdefault(source, len(members) + len(outside))
                self.edges.append((number.get(source, outside.get(source, -1)), number[node]))
        self.size: list[int | None] = []  # bytes that keeping the value takes; None: it cannot be kept by itself
        self.time: list[int | None] = []  # of computing it again; None: it cannot be
        self.required: list[bool] = []
        for node in members:
            several = not isinstance(val(node), torch.Tensor)
            alone = node in kept or not (several or shows_another(node))
            self.size.append(nbytes(val(node)) if alone else None)
            self.time.append(None if node in kept or not can_repeat(node) else self._time(node, number))
            self.required.append(is_required(node))
        for node in outside:
            self.size.append(0 if is_required(node) or node in kept else nbytes(val(root(node))))
            self.time.append(None)
            self.required.append(False)
        self.members = len(members)

    def _time(self, node: fx.Node, number: dict[fx.Node, int]) -> int:
        """What a node costs that is computed again, without what fusion spares."""
        time = round(cost(node))
        if not time or (where := space(node)) is None:
            return time
        for shown in node.all_input_nodes:
            source = root(shown)
            if source in number and _fused(source, where):
                read, edge = round(FLOPS_PER_BYTE * nbytes(val(shown))), (number[source], number[node])
                self.reads[edge] = self.reads.get(edge, 0) + read
                time -= read
        if node.users and all(_fused(user, where) for user in node.users if user.op != "output"):
            time -= round(FLOPS_PER_BYTE * nbytes(val(node)))
        return max(time, 0)

    @cached_property
    def signature(self) -> tuple[object, ...]:
        return tuple(self.edges), tuple(self.reads.items()), tuple(self.size), tuple(self.time), tuple(self.required)

    def cut(self, price: int) -> frozenset[int]:
        """The members to compute again where a byte costs ``price``."""
        graph: _Graph = nx.DiGraph()
        graph.add_nodes_from(["source", "sink"])
        for index, (size, time) in enumerate(zip(self.size, self.time, strict=True)):
            before, after = (index, "in"), (index, "out")
            _edge(graph, before, after, None if size is None else size * price)
            _edge(graph, "source", before, time)
            if self.required[index]:
                _edge(graph, after, "sink", None)
        for source, reader in self.edges:
            _edge(graph, (source, "out"), (reader, "in"), None)
        for (source, reader), time in self.reads.items():
            _edge(graph, (source, "in"), (reader, "in"), time)
        _, (_, behind) = nx.minimum_cut(graph, "source", "sink", flow_func=nx.algorithms.flow.dinitz)
        return frozenset(i for i in range(self.members) if (i, "in") in behind and self.time[i] is not None)


def _edge(graph: _Graph, start: object, end: object, capacity: int | None) -> None:
    """None: infinite."""
    graph.add_edge(start, end, **({} if capacity is None else {"capacity": capacity}))


def _is_dear(node: fx.Node) -> bool:
    """Whether the value is the result of matrix products."""
    return has_products(node.all_input_nodes[0] if is_getitem(node) else node)


def _fused(node: fx.Node, where: Space) -> bool:
    """Whether a region of ``where`` may hold ``node``."""
    found = space(node)
    return found is not None and common(found, where) is not None


def _shown(node: fx.Node) -> fx.Node:
    """What stands for ``node`` as an input: a view of something that is always there is always there."""
    first = root(node)
    return first if first.op != "call_function" else node


def divide(forward: list[fx.Node], again: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What a backward that may repeat ``again`` finds kept of ``forward``, and what it repeats of it."""
    pending = [node for node in forward if is_required(node)]
    kept: set[fx.Node] = set()
    repeated: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in kept or node in repeated or node.op != "call_function":
            continue
        if node in again or (shows_another(node) and root(node) in again):  # a view would keep all of what it shows
            repeated.add(node)
            pending += node.all_input_nodes
        else:
            kept.add(node)
    return kept, repeated


def storages(kept: set[fx.Node]) -> set[fx.Node]:
    """What makes the storages that ``kept`` values live in; those of parameters and the batch do not count."""
    found = {root(node) for node in kept}
    return {node for node in found if node.op == "call_function" and isinstance(val(node), torch.Tensor)}


def saved_bytes(ladder: Ladder, again: set[fx.Node]) -> list[int]:
    """Bytes that a micro-batch's forward leaves for a backward that may repeat ``again``, by the block that makes them.

    What no block makes, as what arrives from another stage, counts for the last one.
    """
    kept, _ = divide(forward_of(ladder.program, ladder.stage), again)
    last = max(ladder.block_of.values(), default=0)
    result = [0] * (last + 1)
    for node in storages(kept):
        result[ladder.block_of.get(node, last)] += nbytes(val(node))
    return result
