"""Cut a program into pipeline stages.

The forward is cut where the slowest stage is fastest, or the schedule finishes first, and few bytes cross; the backward
follows. Every value that another stage reads goes through a ``transfer`` straight from the stage that makes it. What is
cheap to compute (masks, positions, views of weights) is computed on each stage instead. A parameter that several stages
read becomes a replica on each: every one accumulates its own gradients; in the epilogue each adds up all of them, in
one order, and updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from graphshard.codegen import schedule as schedules
from graphshard.dataflow import is_getitem, upstream
from graphshard.errors import PassOptionError, StageCountMismatch, StageTooSmall, TooManyStages
from graphshard.partition import Line, least_limit, most_stages, search, times
from graphshard.pipeline import Context
from graphshard.placing import Placer
from graphshard.program import Level, NodeInfo, Phase, Program, Role, Section, Slot, info, set_info
from graphshard.rewrite import call, clone, drop_dead, retype, set_outputs
from graphshard.stage_update import place_epilogue, place_prologue
from graphshard.staging import BodyStaging, Holders, nearest
from graphshard.sums import Place, split_sum

aten = torch.ops.aten
gs = torch.ops.graphshard


LEAST_GAIN = 0.01
"""Part of the makespan for which stages are made unequal."""


@dataclass(frozen=True)
class PipelineCut:
    """``stages``: module paths where stages 1 and later begin; empty: chosen by cost.

    ``byte_flops``: what sending a byte costs, in FLOPs. ``limit_gb``: parameter bytes a stage may hold, in 10^9 bytes.
    ``schedule``: by name, the one that is to finish first; empty: stages are equal.
    """

    stages: tuple[str, ...] = ()
    schedule: str = ""
    byte_flops: float = 64.0  # 1.5 GB/s beside 90 GFLOP/s: two processes of one machine, a core each
    limit_gb: float | None = None
    name: ClassVar[str] = "pipeline-cut"
    exact: ClassVar[bool] = False  # gradients of tied weights are added in another order

    def __post_init__(self) -> None:
        if "" in self.stages:
            raise PassOptionError(self.name, f"stages={'/'.join(self.stages)}", "module paths")
        if self.schedule and self.schedule not in schedules.BY_NAME:
            raise PassOptionError(self.name, f"schedule={self.schedule}", " or ".join(schedules.BY_NAME))
        if not 0 <= self.byte_flops < math.inf:
            raise PassOptionError(self.name, f"byte_flops={self.byte_flops}", "a finite number of at least 0")
        if self.limit_gb is not None and not self.limit_gb > 0:
            raise PassOptionError(self.name, f"limit_gb={self.limit_gb}", "a number above 0")

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is not Level.CAPTURED:
            return program
        program.mesh = ctx.mesh
        program.level = Level.STAGED
        if program.stages == 1:
            _single_stage(program)
            return program
        staging = BodyStaging(program, self.byte_flops)
        holders: Holders = ctx.placement.stages if ctx.placement is not None else {}
        if ctx.placement is not None and holders:
            staging.obey(holders, ctx.placement.operations)
        else:
            staging.cut(self._positions(staging, program))
        staging.assign(holders)
        _place_body(program, staging)
        place_prologue(program)
        place_epilogue(program)
        return program

    def _positions(self, staging: BodyStaging, program: Program) -> tuple[int, ...]:
        stages = program.stages
        if self.stages:
            if len(self.stages) != stages - 1:
                raise StageCountMismatch(len(self.stages), stages)
            return staging.begins(self.stages)
        line = staging.describe_line()
        limit = math.inf if self.limit_gb is None else self.limit_gb * 1e9
        found = search(line, stages, self.byte_flops, limit)
        if found is not None:
            if self.schedule and any(info(node).phase is Phase.BACKWARD for node in program.body.nodes()):
                schedule = schedules.make(self.schedule, stages, program.microbatches)
                found = for_schedule(schedule, line, found, self.byte_flops, limit)
            return found
        if (most := most_stages(line)) < stages:
            raise TooManyStages(stages, most)
        raise StageTooSmall(limit / 1e9, stages, least_limit(line, stages) / 1e9)


def for_schedule(
    schedule: schedules.Schedule, line: Line, equal: tuple[int, ...], byte_cost: float, limit_bytes: float = math.inf
) -> tuple[int, ...]:
    """The cut into the shares that ``schedule`` wants; ``equal``, the one into equal stages, if that is as good, which
    it may be because items are coarse."""
    found = search(line, len(schedule.stages), byte_cost, limit_bytes, schedules.shares(schedule))
    if found is None:
        return equal
    slow, fast = (schedules.simulate(schedule, *[times(line, cut, byte_cost)] * 3).makespan for cut in (equal, found))
    return found if fast < (1 - LEAST_GAIN) * slow else equal


def _single_stage(program: Program) -> None:
    for section in program.sections().values():
        for node in section.graph.nodes:
            if node.op != "output":
                set_info(node, stage=0)


def _place_body(program: Program, staging: BodyStaging) -> None:
    body, places = program.body, staging.places
    for name, param in program.params.items():
        program.params[name] = replace(param, stages=staging.param_stages(name))
    for slot, node in staging.inputs.items():
        if slot.role is not Role.CARRY or not slot.name.startswith("grad:"):
            continue
        stages = places[node]
        held = program.params[slot.name.removeprefix("grad:")].stages
        if stages is not None and len(stages) > 1:
            split_sum(body, slot, stages, places, partial(nearest, held))
    _split_convolutions(body, places)
    drop_dead(body)

    carried = {slot: places[node] for slot, node in body.input_slots.items() if slot.role is Role.CARRY}
    placer = Placer(body, places)
    placer.run()
    outputs: dict[Slot, fx.Node] = {}
    for slot, node in body.outputs.items():
        if slot.role is Role.OUTPUT:
            slot = replace(slot, stage=program.stages - 1)
            outputs[slot] = _owned(body, placer.at(node, slot.stage), slot.stage)
        else:
            (stage,) = carried[slot] or (0,)
            outputs[replace(slot, stage=stage)] = placer.at(node, stage)
    set_outputs(body, outputs)
    placer.finish()
    _forward_first(body)
    _defer_weight_gradients(body)


def _owned(body: Section, node: fx.Node, stage: int) -> fx.Node:
    """A result that only ``stage`` has: what every stage has is handed out once."""
    if info(node).stage is not None:
        return node
    with body.graph.inserting_before(body.output_node):
        return call(body.graph, aten.alias.default, (node,), NodeInfo(stage=stage, made_by="pipeline-cut"))


def _split_convolutions(body: Section, places: dict[fx.Node, Place]) -> None:
    """The gradients of a convolution's input and of its weight as two operations: the second need not be in a hurry."""
    for node in list(body.nodes()):
        if node.target is not aten.convolution_backward.default or places[node] == (0,):
            continue
        mask: Any = node.args[10]
        picks = [user for user in node.users if user.args[1] != 0]
        if not mask[0] or not picks or len(picks) == len(node.users):
            continue
        with body.graph.inserting_before(min(picks)):
            late = clone(node, lambda n: n, made_by="pipeline-cut")
        node.args, late.args = (*node.args[:10], [True, False, False]), (*node.args[:10], [False, *mask[1:]])
        places[late] = places[node]
        for pick in picks:
            pick.replace_input_with(node, late)
        retype([node, late])


def _forward_first(body: Section) -> None:
    """Order the phases; within each the order stays."""
    for node in list(body.nodes()):
        if info(node).phase is not Phase.FORWARD:
            body.output_node.prepend(node)


def _defer_weight_gradients(body: Section) -> None:
    """What no gradient that is sent needs can wait (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2)."""
    sent = [n for n in body.nodes() if n.target is gs.transfer.default and info(n).phase is not Phase.FORWARD]
    needed = upstream(sent, stop=lambda n: info(n).phase is Phase.FORWARD)
    urgent = {n.args[0] if is_getitem(n) else n for n in needed}
    for node in body.nodes():
        maker = node.args[0] if is_getitem(node) else node
        if info(node).phase is Phase.BACKWARD and info(node).stage != 0 and maker not in urgent:
            set_info(node, phase=Phase.WEIGHT)
