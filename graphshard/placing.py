"""Puts the operations of a graph on the stages decided for them: copies where several stages compute a value, transfers
where one reads another's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx
from torch.fx.node import map_arg

from graphshard.analysis import sent_as
from graphshard.dataflow import is_getitem
from graphshard.execution import type_of
from graphshard.program import NodeInfo, Phase, Section, info, set_info, val
from graphshard.rewrite import add_input, after, call, clone, drop_dead, retype_from
from graphshard.sums import Places

aten = torch.ops.aten
gs = torch.ops.graphshard

_MEETING = (gs.stage_sum.default, gs.stage_broadcast.default)
"""Operators that read values of several stages."""


class Placer:
    """Rewrites one section in place. Every operation and placeholder must have a place."""

    def __init__(self, section: Section, places: Places, once: bool = False) -> None:
        self.section, self.places = section, places
        self.once = once  # prologue or epilogue: transfers may go either way
        self.arguments = {n: (n.args, n.kwargs) for n in section.nodes()}
        self.copies: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self.taken: set[fx.Node] = set()  # originals that are the copy of some stage already
        self.sent: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> None:
        """Give every operation its stage; those that go wherever they are read, when :meth:`at` asks for them."""
        for node in list(self.section.nodes()):
            place = self.places[node]
            for stage in (None,) if place is None else place:
                self.at(node, stage)

    def finish(self) -> None:
        """Clean up once all that is wanted was asked for: what is left over, and types behind transfers."""
        for node in list(self.section.inputs):
            if node in self.places and node not in self.taken:
                place = self.places[node]
                self._copy(node, None if place is None else (place or (0,))[0])
        drop_dead(self.section)
        left = [(node, new) for (node, _), new in self.sent.items() if new.users]
        retype_from(new for node, new in left if val(new).stride() != val(node).stride())

    def at(self, node: fx.Node, stage: int | None) -> fx.Node:
        """The node that has the value of ``node`` on ``stage``; None: on every stage."""
        place = self.places[node]
        if place is None:
            return self._copy(node, None)
        if place == () or stage in place:
            return self._copy(node, stage)
        assert stage is not None, f"{node} is on stage {place} only, and every stage reads it"
        if sent_as(node) is not node:
            return self._copy(node, stage)  # a view of what is sent
        return self._transfer(node, stage)

    def _copy(self, node: fx.Node, stage: int | None) -> fx.Node:
        key = (node, stage)
        if key in self.copies:
            return self.copies[key]
        if node in self.section.inputs:
            new = self._placeholder(node, stage)
        else:
            args, kwargs = self.arguments[node]
            there = (lambda n: self.at(n, stage)) if node.target not in _MEETING else self._own
            new_args, new_kwargs = map_arg(args, there), map_arg(kwargs, there)
            new = node
            if node in self.taken:
                with after(node):
                    new = clone(node, lambda n: n, made_by="pipeline-cut")
            new.args, new.kwargs = new_args, new_kwargs
            set_info(new, stage=stage)
        self.taken.add(node)
        self.copies[key] = new
        return new

    def _own(self, node: fx.Node) -> fx.Node:
        place = self.places[node]
        return self.at(node, place[0] if place else None)

    def _placeholder(self, node: fx.Node, stage: int | None) -> fx.Node:
        slot = replace(self.section.inputs[node], stage=stage or 0)
        if node in self.taken:
            return add_input(self.section, slot, val(node), replace(info(node), stage=stage), node.name)
        self.section.inputs[node] = slot
        set_info(node, stage=stage)
        return node

    def _transfer(self, node: fx.Node, stage: int) -> fx.Node:
        if (node, stage) in self.sent:
            return self.sent[node, stage]
        place = self.places[node]
        assert place, f"{node} needs no transfer"
        src = max((s for s in place if s < stage), default=place[0])
        value = self.at(node, src)
        record = self._record(node, src)
        with after(_last_pick(value)):
            if record.phase is Phase.FORWARD and src > stage:
                # Only gradients travel to earlier stages: what their backward reads travels with them.
                record = replace(record, phase=Phase.BACKWARD)
                value = call(node.graph, aten.alias.default, (value,), record)
            elif node.op == "placeholder" and not self.once:
                # A buffer that each micro-batch updates lives in one place: what is sent is this one's.
                value = call(node.graph, aten.clone.default, (value,), record)
            elif not _fills_its_memory(node):
                # A part of another value: what is sent is copied anyway, and this way the rest can go.
                dense = {"memory_format": torch.contiguous_format}
                value = call(node.graph, aten.clone.default, (value,), record, **dense)
            new = call(node.graph, gs.transfer.default, (value, src, stage), replace(record, stage=stage))
        self.sent[node, stage] = new
        return new

    def _record(self, node: fx.Node, stage: int) -> NodeInfo:
        phase = Phase.UPDATE if self.once else info(node).phase
        return NodeInfo(phase=phase, module=info(node).module, stage=stage, made_by="pipeline-cut")


def _fills_its_memory(node: fx.Node) -> bool:
    """Whether the elements of a tensor lie in one run of memory, in whatever order."""
    value = val(node)
    return not isinstance(value, torch.Tensor) or type_of(value).storage_bytes == value.nbytes


def _last_pick(node: fx.Node) -> fx.Node:
    """``node``, or the last of the picks that stand right behind it: results of one operator stay together."""
    while is_getitem(node) and is_getitem(node.next) and node.next.args[0] is node.args[0]:
        node = node.next
    return node
