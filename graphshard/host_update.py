"""Which updates the CPU makes, in host memory, where the state of a bucket is kept there; and the graph of that.

Either the state comes to the device and leaves it again, or gradients go to the state, and new parameters come back.
What is computed in host memory reads values that are there: what is kept there, what was offloaded, and what the CPU
made of these. Scalars, such as the number of the step, are computed there once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphshard.analysis import FLOPS_PER_BYTE, FLOPS_PER_HOST_BYTE, FLOPS_PER_HOST_MEMORY_BYTE, nbytes
from graphshard.communication import communicates
from graphshard.dataflow import downstream, is_pointwise, is_view
from graphshard.program import HOST, NodeInfo, Role, Section, Slot, info, set_info, val
from graphshard.rewrite import after, call, clone, drop_dead, set_outputs

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard


@dataclass(frozen=True)
class Bucket:
    """The update of one bucket, as a graph that reloads and offloads its state has it."""

    slot: Slot  # of its parameters
    stored: dict[fx.Node, fx.Node]  # what has been reloaded to the placeholder that it is
    nodes: list[fx.Node]  # what reads that, and what reads these, in order
    leaving: list[fx.Node]  # what is offloaded of them

    @property
    def given(self) -> list[fx.Node]:
        """What else they read, on the device."""
        inside = {*self.nodes, *self.stored}
        sources = [source for node in self.nodes for source in _operands(node)]
        return [source for source in dict.fromkeys(sources) if source not in inside]

    @property
    def returned(self) -> list[fx.Node]:
        """What others read of them on the device."""
        inside = {*self.nodes, *self.leaving}
        return [node for node in self.nodes if any(user not in inside for user in node.users)]


@dataclass(frozen=True)
class Prices:
    """What the update of a bucket costs a GPU, in FLOPs, on either side of the link."""

    device: float
    host: float


def prices(bucket: Bucket) -> Prices:
    """By the bytes that cross the link, and those that the update reads and writes in one pass."""
    crossing = sum(map(_nbytes, (*bucket.given, *bucket.returned)))
    state = sum(map(_nbytes, (*bucket.stored, *bucket.leaving)))
    made = {source for node in bucket.leaving for source in node.all_input_nodes} | set(bucket.returned)
    touched = sum(map(_nbytes, (*bucket.stored, *bucket.given, *made)))
    return Prices(
        device=FLOPS_PER_HOST_BYTE * state + FLOPS_PER_BYTE * touched,
        host=FLOPS_PER_HOST_BYTE * crossing + FLOPS_PER_HOST_MEMORY_BYTE * touched,
    )


def buckets(section: Section) -> Iterator[Bucket]:
    """The updates that the CPU could make: element by element, each of one bucket's state in host memory alone."""
    found: dict[Slot, dict[fx.Node, fx.Node]] = {}
    for node in section.nodes():
        if node.target is gs.reload.default and node.args[1] == "cpu" and node.all_input_nodes[0] in section.inputs:
            slot = section.inputs[node.all_input_nodes[0]]
            (arrived,) = node.users
            key = Slot(Role.SHARD, slot.name, stage=slot.stage)
            found.setdefault(key, {})[arrived] = node.all_input_nodes[0]
    reached = {key: downstream(stored, stop=communicates) for key, stored in found.items()}
    for key, stored in found.items():
        nodes = _with_operands(section, reached[key], stored)
        others = {node for other, theirs in reached.items() if other != key for node in theirs}
        leaving = [user for node in nodes for user in node.users if user.target is gs.offload.default]
        own = all(is_pointwise(node) and not is_view(node) for node in nodes) and others.isdisjoint(nodes)
        if own and nodes and all(node.args[1] == "cpu" for node in leaving):
            yield Bucket(key, stored, nodes, leaving)


def _with_operands(section: Section, nodes: list[fx.Node], stored: Collection[fx.Node]) -> list[fx.Node]:
    """Also what is there for them alone and made of no more bytes than it has, such as a gradient that is clipped."""
    inside = {*nodes, *stored}
    for node in reversed(list(section.nodes())):
        if node in inside or not is_pointwise(node) or is_view(node) or not inside.issuperset(node.users):
            continue
        operands = [source for source in node.all_input_nodes if val(source).dim() and source not in inside]
        if operands and sum(map(_nbytes, operands)) <= _nbytes(node):
            inside.add(node)
    return sorted(inside.difference(stored))


def move_to_host(section: Section, chosen: Iterable[Bucket]) -> None:
    """The CPU makes the updates of these buckets."""
    there: dict[fx.Node, fx.Node] = {}
    for bucket in chosen:
        _Mover(section, bucket, there).run()
    if there:
        drop_dead(section)


class _Mover:
    """``there``: a value to the same one in host memory; it grows."""

    def __init__(self, section: Section, bucket: Bucket, there: dict[fx.Node, fx.Node]) -> None:
        self.section, self.bucket, self.there = section, bucket, there
        there |= bucket.stored

    def run(self) -> None:
        bucket = self.bucket
        returned = bucket.returned
        inside = {*bucket.nodes, *bucket.leaving}
        for node in bucket.nodes:
            if node.target is aten.copy.default:
                self._cast(node)
        for node in bucket.nodes:
            for source in node.all_input_nodes:
                if source not in inside:
                    node.replace_input_with(source, self._there(source))
            set_info(node, device=HOST)
        for node in returned:
            self._bring(node, inside)
        away = {offload: offload.all_input_nodes[0] for offload in bucket.leaving}
        outputs = self.section.outputs
        set_outputs(self.section, {slot: away.get(node, node) for slot, node in outputs.items()})

    def _cast(self, node: fx.Node) -> None:
        """What is written over another value does not read that; nor need it be there."""
        old, new = node.all_input_nodes
        node.target, node.args = aten._to_copy.default, (new,)
        node.kwargs = {"dtype": val(old).dtype}

    def _there(self, node: fx.Node) -> fx.Node:
        if node in self.there:
            return self.there[node]
        with after(node):
            if _is_scalar_work(node):
                sources = {source: self._there(source) for source in node.all_input_nodes}
                copy = clone(node, sources.__getitem__, device=HOST, origin="", made_by="offload")
                last = max((*sources.values(), node))
                if copy < last:
                    last.append(copy)
                self.there[node] = copy
            else:
                self.there[node] = call(node.graph, gs.offload.default, (node, "cpu"), self._record(node))
        return self.there[node]

    def _bring(self, node: fx.Node, inside: Collection[fx.Node]) -> None:
        with after(node):
            start = call(node.graph, gs.reload.default, (node, "cpu"), self._record(node))
            arrived = call(node.graph, c10d.wait_tensor.default, (start,), self._record(node))
        node.replace_all_uses_with(arrived, lambda user: user not in inside and user is not start)

    def _record(self, node: fx.Node) -> NodeInfo:
        stage = self.bucket.slot.stage if info(node).stage is not None else None
        return NodeInfo(info(node).phase, info(node).module, stage=stage, made_by="offload")


def _operands(node: fx.Node) -> list[fx.Node]:
    """Of a copy over another value, what is copied."""
    return node.all_input_nodes[1:] if node.target is aten.copy.default else node.all_input_nodes


def _is_scalar_work(node: fx.Node) -> bool:
    """Whether scalars alone make the scalar ``node``, on one rank."""
    values = (node, *node.all_input_nodes)
    return is_pointwise(node) and bool(node.all_input_nodes) and all(val(value).dim() == 0 for value in values)


def _nbytes(node: fx.Node) -> int:
    return nbytes(val(node))
