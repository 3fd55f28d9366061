"""Start communication early and wait for it late, within a micro-batch.

The gather of the next bucket is in flight while the current one computes; a reduce-scatter is waited for when the next
one starts. Across micro-batches, where only the schedule knows what runs next, codegen/order.py does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import fx

from graphshard.communication import COLLECTIVES, communicates
from graphshard.pipeline import Context
from graphshard.program import Phase, Program, Section, info
from graphshard.rewrite import first_operation

c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Overlap:
    """Reorder; nothing is added or removed."""

    name: ClassVar[str] = "overlap"
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> Program:
        for stage in range(program.stages):
            for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT):
                _prefetch_gathers(program.body, stage, phase)
            _wait_late(program.body, stage)
        for section in (program.prologue, *program.updates()):
            _start_first_then_sink(section)
        return program


def _wait_of(start: fx.Node) -> fx.Node:
    (wait,) = start.users
    return wait


def _prefetch_gathers(body: Section, stage: int, phase: Phase) -> None:
    """Each gather starts as soon as the one before it has arrived: two buckets are whole at a time."""
    gathers = [
        n
        for n in body.nodes()
        if n.target is c10d.all_gather_into_tensor.default and info(n).stage == stage and info(n).phase is phase
    ]
    for current, following in pairwise(gathers):
        _wait_of(current).append(following)


def _wait_late(body: Section, stage: int) -> None:
    reductions = [n for n in body.nodes() if n.target is c10d.reduce_scatter_tensor.default and info(n).stage == stage]
    for current, following in pairwise(reductions):
        if info(current).phase is not info(following).phase:
            continue
        wait = _wait_of(current)
        readers = sorted(wait.users)
        following.prepend(wait)
        for reader in readers:
            if reader.op != "output":
                following.prepend(reader)


def _start_first_then_sink(section: Section) -> None:
    """Collectives on what is there already start first, everything else moves down to its first reader."""
    starts = [
        n for n in section.nodes() if n.target in COLLECTIVES and all(i.op == "placeholder" for i in n.all_input_nodes)
    ]
    for node in reversed(starts):
        if node is not (first := first_operation(section.graph)):
            first.prepend(node)
    started = set(starts)
    _sink([node for node in section.nodes() if node not in started])
    # What needs no wait goes behind the waits of its reader, so that an update stays in one piece.
    stored = set(section.inputs)
    for node in section.nodes():
        if not communicates(node) and node.all_input_nodes and stored.issuperset(node.all_input_nodes):
            stored.add(node)
    _sink([node for node in section.nodes() if node in stored])


def _sink(nodes: list[fx.Node]) -> None:
    for node in reversed(nodes):
        if node.users:
            min(node.users).prepend(node)
