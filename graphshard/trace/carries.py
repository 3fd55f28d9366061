"""What a captured body hands from one micro-batch to the next, and what a step makes of it in the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphshard import fake
from graphshard.dataflow import owns_memory
from graphshard.program import NodeInfo, Phase, Program, Role, Section, Slot
from graphshard.rewrite import add_input, after, call, remove_input, retype, set_outputs

aten = torch.ops.aten


@dataclass
class Carries:
    """Collects the outputs of a program's graphs; :meth:`finish` sets them."""

    program: Program
    mode: fake.FakeTensorMode
    first: dict[Slot, fx.Node] = field(default_factory=dict)  # of the prologue
    results: dict[Slot, fx.Node] = field(default_factory=dict)  # of the body
    last: dict[Slot, fx.Node] = field(default_factory=dict)  # of the epilogue

    def loss(self, value: fx.Node) -> None:
        """Sum the loss over micro-batches; the step returns its mean."""
        total = self._accumulate("loss", value, Phase.FORWARD)
        epilogue = self.program.epilogue
        added = self._accumulator(epilogue, Slot(Role.CARRY, "loss"), total, NodeInfo(phase=Phase.UPDATE))
        record = NodeInfo(phase=Phase.UPDATE, origin="mean.loss")
        share = 1 / self.program.microbatches
        self.last[Slot(Role.LOSS, "loss")] = _append(epilogue, aten.mul.Tensor, (added, share), record)

    def gradient(self, name: str, value: fx.Node) -> None:
        """Sum the gradient of a parameter over micro-batches. The update reads it."""
        self._accumulate(f"grad:{name}", value, Phase.BACKWARD)

    def buffer(self, name: str, value: fx.Node) -> None:
        """A buffer that changes: it starts as it is stored, and the last micro-batch's value is stored."""
        stored, slot = Slot(Role.BUFFER, name), Slot(Role.CARRY, f"buffer:{name}")
        body, record = self.program.body, NodeInfo(module=name.rpartition(".")[0])
        update = replace(record, phase=Phase.UPDATE)
        like = value.meta["val"]
        old = body.input_slots.get(stored)
        carry = self._accumulator(body, slot, like, record)
        if old is not None:
            old.replace_all_uses_with(carry)
            remove_input(body, old)
            value = carry if value is old else value
        if like.stride() != carry.meta["val"].stride() or not owns_memory(value):
            copy = replace(record, origin=f"store.{name}")
            value = _append(body, aten.clone.default, (value,), copy, memory_format=torch.contiguous_format)
        self.first[slot] = self._accumulator(self.program.prologue, stored, like, update)
        self.results[slot] = value
        self.last[stored] = self._accumulator(self.program.epilogue, slot, like, update)

    def output(self, index: int, value: fx.Node) -> None:
        """A tensor of the model's output, one for each micro-batch."""
        self.results[Slot(Role.OUTPUT, str(index))] = value

    def finish(self) -> None:
        """Set the outputs of the program's graphs."""
        set_outputs(self.program.prologue, self.first)
        set_outputs(self.program.body, self.results)
        set_outputs(self.program.epilogue, self.last)

    def _accumulate(self, name: str, value: fx.Node, phase: Phase) -> Tensor:
        slot = Slot(Role.CARRY, name)
        like: Tensor = value.meta["val"]
        module = name.removeprefix("grad:").rpartition(".")[0]
        zero = NodeInfo(phase=Phase.UPDATE, module=module, origin=f"zero.{name}")
        arguments = (list(like.shape), 0.0)
        self.first[slot] = _append(
            self.program.prologue, aten.full.default, arguments, zero, dtype=like.dtype, device=like.device
        )
        record = NodeInfo(phase=phase, module=module)
        carry = self._accumulator(self.program.body, slot, like, record)
        record = replace(record, origin=f"accumulate.{name}")
        with after(value):  # so that the value is not kept until the end
            total = call(self.program.body.graph, aten.add.Tensor, (carry, value), record)
        if total.meta["val"].stride() != carry.meta["val"].stride():  # by dims of size 1, as those of a 1x1 kernel
            with after(value):
                copy = replace(record, origin=f"contiguous.{name}")
                layout = {"memory_format": torch.contiguous_format}
                dense = call(self.program.body.graph, aten.clone.default, (value,), copy, **layout)
            total.replace_input_with(value, dense)
            retype([total])
        self.results[slot] = total
        return like

    def _accumulator(self, section: Section, slot: Slot, like: Tensor, record: NodeInfo) -> fx.Node:
        """A placeholder for ``slot``, contiguous."""
        value = fake.tensor(self.mode, like.shape, like.dtype, device=like.device)
        return add_input(section, slot, value, record, slot.name)


def _append(section: Section, target: Any, args: tuple[Any, ...], record: NodeInfo, **kwargs: Any) -> fx.Node:
    with section.graph.inserting_before(section.output_node):
        return call(section.graph, target, args, record, **kwargs)
