"""What a step of a program costs each pipeline stage, at any level: FLOPs, bytes sent, bytes held.

A rank of a stage stands for its data-parallel peers, which are alike. The body counts once per micro-batch, prologue
and epilogue once. A captured program is one stage, whatever its mesh says. Communication costs bytes and no FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from graphshard import analysis
from graphshard.communication import communicates, communication_axis, sender, sent_bytes
from graphshard.memory.footprint import footprints
from graphshard.mesh import AXES
from graphshard.places import stage_places
from graphshard.program import Phase, Program, info

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard


@dataclass(frozen=True)
class StageCosts:
    """What a step costs one rank of a stage."""

    flops: Mapping[str, int]  # by phase; without phases that do nothing
    sent_bytes: Mapping[str, int]  # by mesh axis; transfers between stages count for pp
    stored_bytes: int  # parameters, buffers, constants and optimizer state, held between steps
    peak_bytes: int  # estimated: see memory/footprint.py


@dataclass(frozen=True)
class Costs:
    """What a step costs, stage by stage."""

    stages: tuple[StageCosts, ...]

    @property
    def flops(self) -> dict[str, int]:
        """By phase, summed over one rank of every stage."""
        return _summed([stage.flops for stage in self.stages], [str(phase) for phase in Phase])

    @property
    def sent_bytes(self) -> dict[str, int]:
        """By mesh axis, summed over one rank of every stage."""
        return _summed([stage.sent_bytes for stage in self.stages], AXES)

    @property
    def peak_bytes(self) -> int:
        """Of the stage that holds most."""
        return max(stage.peak_bytes for stage in self.stages)


def costs(program: Program) -> Costs:
    """What a step of ``program`` costs, its optimizer state being there already; time is linear in the nodes."""
    places = stage_places(program)
    count = places.stages
    flops, sent = [Counter[str]() for _ in range(count)], [Counter[str]() for _ in range(count)]
    for name, section in program.sections().items():
        if name == "first_epilogue":
            continue
        times = program.microbatches if name == "body" else 1
        for node in section.nodes():
            axis = communication_axis(node)
            if axis:
                for stage in (sender(node),) if node.target is gs.transfer.default else places.of[node]:
                    sent[stage][axis] += times * sent_bytes(node, program.mesh.size(axis))
            elif not communicates(node):
                for stage in places.of[node]:
                    flops[stage][str(info(node).phase)] += times * analysis.flops(node)
    held = footprints(program, places)
    return Costs(
        tuple(
            StageCosts(dict(+flops[stage]), dict(+sent[stage]), held[stage].stored_bytes, held[stage].peak_bytes)
            for stage in range(count)
        )
    )


def _summed(parts: Iterable[Mapping[str, int]], order: Iterable[str]) -> dict[str, int]:
    total = sum((Counter(part) for part in parts), Counter[str]())
    return {name: total[name] for name in order if total[name]}
