"""Stages of the prologue and the epilogue, once the body's are known.

Everything goes to the stage of what it initialises or updates. Norms and the loss go to every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from graphshard.dataflow import is_pooled
from graphshard.placing import Placer
from graphshard.program import NodeInfo, Phase, Program, Role, Section, Slot, info, val
from graphshard.rewrite import add_input, call, set_outputs
from graphshard.sums import Place

aten = torch.ops.aten
gs = torch.ops.graphshard


def carry_stages(program: Program) -> dict[str, tuple[int, ...]]:
    """Each carry of the body to the stages that have one of its name."""
    found: dict[str, list[int]] = {}
    for slot in program.body.inputs.values():
        if slot.role is Role.CARRY:
            found.setdefault(slot.name, []).append(slot.stage)
    return {name: tuple(sorted(stages)) for name, stages in found.items()}


def place_prologue(program: Program) -> None:
    """Initialise each carry on the stages that have it."""
    section, carried = program.prologue, carry_stages(program)
    places: dict[fx.Node, Place] = {}
    for node, slot in section.inputs.items():
        places[node] = carried.get(f"buffer:{slot.name}", ()) if slot.role is Role.BUFFER else None
    _derive(section, places, {})
    wanted = [(slot, node, carried.get(slot.name, (0,))) for slot, node in section.outputs.items()]
    _place(section, places, wanted)


def place_epilogue(program: Program) -> None:
    """Update each parameter on every stage that holds it; norms and the loss go to all stages."""
    carried = carry_stages(program)
    for section in program.updates():
        _Epilogue(program, section, carried).run()


class _Epilogue:
    def __init__(self, program: Program, section: Section, carried: dict[str, tuple[int, ...]]) -> None:
        self.program, self.section, self.carried = program, section, carried
        self.places: dict[fx.Node, Place] = {}
        self.reach: dict[fx.Node, Place] = {}  # where readers go, if not to the place itself

    def run(self) -> None:
        for node, slot in list(self.section.inputs.items()):
            self.places[node] = self._input_place(slot)
            if slot.role is Role.CARRY and slot.name.startswith("grad:"):
                self._gradient(node, slot)
        _derive(self.section, self.places, self.reach)
        wanted: list[tuple[Slot, fx.Node, tuple[int, ...]]] = []
        for slot, node in self.section.outputs.items():
            stages = self._output_stages(slot)
            if slot.role is Role.LOSS and self.places[node]:
                node = self._broadcast(node)
            wanted.append((slot, node, stages))
        _place(self.section, self.places, wanted)

    def _holders(self, name: str) -> tuple[int, ...]:
        return self.program.params[name].stages

    def _input_place(self, slot: Slot) -> Place:
        match slot.role:
            case Role.PARAM | Role.MASTER | Role.STATE:
                return self._holders(slot.name)
            case Role.CARRY:
                return self.carried.get(slot.name, (0,))
            case Role.BUFFER:
                return self.carried.get(f"buffer:{slot.name}", ())
            case _:
                return None

    def _output_stages(self, slot: Slot) -> tuple[int, ...]:
        match slot.role:
            case Role.PARAM | Role.MASTER | Role.STATE:
                return self._holders(slot.name)
            case Role.BUFFER:
                return self.carried.get(f"buffer:{slot.name}", (0,))
            case Role.OUTPUT if slot.name.startswith("grad:"):
                return self._holders(slot.name.removeprefix("grad:"))[:1]
            case _:
                return (0,)

    def _gradient(self, node: fx.Node, slot: Slot) -> None:
        """What the update reads is the sum over stages, which each holder computes from the others' sums."""
        stages, holders = self.carried.get(slot.name, (0,)), self._holders(slot.name.removeprefix("grad:"))
        self.reach[node] = holders
        if len(stages) == 1:
            return
        readers = list(node.users)
        self.places[node], total = stages[:1], node
        module = slot.name.removeprefix("grad:").rpartition(".")[0]
        record = NodeInfo(phase=Phase.UPDATE, module=module, made_by="pipeline-cut")
        self.section.inputs[node] = replace(slot, stage=stages[0])
        for stage in stages[1:]:
            other = add_input(self.section, replace(slot, stage=stage), val(node), info(node), node.name)
            self.places[other] = (stage,)
            with self.section.graph.inserting_before(min(readers, default=self.section.output_node)):
                total = call(self.section.graph, aten.add.Tensor, (total, other), record)
            self.places[total] = holders
        for reader in readers:
            reader.replace_input_with(node, total)

    def _broadcast(self, loss: fx.Node) -> fx.Node:
        (src, *_) = self.places[loss] or ()
        record = replace(info(loss), made_by="pipeline-cut", origin="")
        with self.section.graph.inserting_before(self.section.output_node):
            node = call(self.section.graph, gs.stage_broadcast.default, (loss, src, "pp"), record)
        self.places[node] = None
        return node


def _derive(section: Section, places: dict[fx.Node, Place], reach: dict[fx.Node, Place]) -> None:
    """Places of operations from those of their inputs."""
    for node in list(section.nodes()):
        if node in places:
            continue
        if is_pooled(node):
            _split_norm(section, node, places)
            continue
        sources = [reach.get(s, places[s]) for s in node.all_input_nodes]
        staged = [set(place) for place in sources if place]
        if staged:
            common = set.intersection(*staged)
            places[node] = tuple(sorted(common)) or (max(min(stages) for stages in staged),)
        else:
            places[node] = None if None in sources else ()


def _split_norm(section: Section, norm: fx.Node, places: dict[fx.Node, Place]) -> None:
    """A sum of squares per stage, and their sum on every stage. A replicated parameter counts on its first stage."""
    groups: dict[int, list[fx.Node]] = {}
    parts: Iterable[Any] = norm.args[0]  # type: ignore[assignment]
    for part in parts:
        groups.setdefault((places[part] or (0,))[0], []).append(part)
    record = replace(info(norm), made_by="pipeline-cut")
    sums, target = [], cast(Callable[..., Any], norm.target)
    with section.graph.inserting_before(norm):
        for stage in sorted(groups):
            sums.append(call(section.graph, target, (groups[stage],), replace(record, origin="")))
            places[sums[-1]] = (stage,)
        total = call(section.graph, gs.stage_sum.default, (sums, "pp"), record)
    places[total] = None
    norm.replace_all_uses_with(total)
    section.graph.erase_node(norm)


def _place(section: Section, places: dict[fx.Node, Place], wanted: list[tuple[Slot, fx.Node, tuple[int, ...]]]) -> None:
    placer = Placer(section, places, once=True)
    placer.run()
    outputs = {replace(slot, stage=stage): placer.at(node, stage) for slot, node, stages in wanted for stage in stages}
    set_outputs(section, outputs)
    placer.finish()
