"""Which pipeline stages hold each value and run each operation, read off a program of any level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from graphshard.communication import MEETINGS, sender
from graphshard.program import Level, Program, Section, info

gs = torch.ops.graphshard


@dataclass(frozen=True)
class Places:
    """``of``: each node of each graph but the output nodes, to the stages it is on, ascending."""

    stages: int
    of: Mapping[fx.Node, tuple[int, ...]]


def stage_places(program: Program) -> Places:
    """Where everything is; before ``pipeline-cut`` there is one stage."""
    nodes = [node for section in program.sections().values() for node in section.graph.nodes if node.op != "output"]
    if program.level is Level.CAPTURED:
        return Places(1, dict.fromkeys(nodes, (0,)))
    # A graph written by hand may name a stage that its mesh lacks; verify.py is who refuses it.
    stages = max(program.stages, *(1 + (info(node).stage or 0) for node in nodes))
    everywhere = tuple(range(stages))
    result: dict[fx.Node, tuple[int, ...]] = {}
    for section in program.sections().values():
        _find(section, everywhere, result)
    return Places(stages, result)


def _find(section: Section, everywhere: tuple[int, ...], result: dict[fx.Node, tuple[int, ...]]) -> None:
    """What has a stage is there; what every stage can compute is where it is read."""
    wanted: dict[fx.Node, set[int]] = {}
    for node in reversed(section.graph.nodes):
        if node.op == "output":
            continue
        stage = info(node).stage
        readers = wanted.get(node, set())
        if stage is not None:
            result[node] = (stage,)
        elif node.target in MEETINGS or any(user.op == "output" for user in node.users):
            result[node] = everywhere
        else:
            result[node] = tuple(sorted(readers))
        reading = (sender(node),) if node.target is gs.transfer.default else result[node]
        for source in node.all_input_nodes:
            wanted.setdefault(source, set()).update(reading)
