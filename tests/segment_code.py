"""Graph text to what code generators take, and what graphs mean, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from graphshard import text
from graphshard.codegen.accumulation import sums_of
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.segments import Code, emit
from graphshard.execution import Kernel
from graphshard.passes.fuse import Fuse
from graphshard.pipeline import Context
from graphshard.program import Role, Section
from graphshard.runtime.arena import Placing
from graphshard.runtime.segments import compile_segments

c10d = torch.ops._c10d_functional
CPU = torch.device("cpu")


def section(lines: str) -> Section:
    """The body whose text is ``lines``."""
    return text.parse("graphshard 1\nlevel sharded\ngraph body {\n" + lines + "\n}\n").body


def update(lines: str) -> Section:
    """The epilogue whose text is ``lines``, with what it can have in regions."""
    head = "graphshard 1\nlevel sharded\ngraph body {\n  return\n}\n"
    program = text.parse(f"{head}graph epilogue {{\n{lines}\n}}\n")
    return Fuse().run(program, Context()).epilogue


@dataclass
class Made(Code):
    """A segment, and the kernels that it calls."""

    kernels: dict[str, Kernel]


def returned(graph: Section) -> list[fx.Node]:
    """The operations whose results the graph returns."""
    return list(dict.fromkeys(node for node in graph.outputs.values() if node.op == "call_function"))


def code(graph: Section, *, first: bool = False, accumulate: bool = True, on_gpu: bool = False) -> Made:
    """A segment of all operations. Carries are accumulated in place, as in a body, or read like anything else."""
    carries = [slot for slot in graph.input_slots if slot.role is Role.CARRY and accumulate]
    nodes, kernels = list(graph.nodes()), Kernels(on_gpu)
    sums = sums_of(graph, carries, [nodes], on_gpu=on_gpu)
    made = emit("f", nodes, returned(graph), graph, kernels, sums=sums, first=first)
    return Made(**vars(made), kernels=kernels.table)


def parts(graph: Section, runs: list[list[fx.Node]], *, first: bool) -> list[Made]:
    """A segment of each of ``runs``, all operations together. Every part of a sum is written to its carry."""
    carries = [slot for slot in graph.input_slots if slot.role is Role.CARRY]
    sums = sums_of(graph, carries, runs, on_gpu=False)
    result = []
    for nodes in runs:
        begins = sums.begins(nodes)
        outputs = [node for node in returned(graph) if node in nodes] + begins
        kernels = Kernels()
        made = emit("f", nodes, outputs, graph, kernels, sums=sums, first=first)
        sums.begun.update(begins)
        result.append(Made(**vars(made), kernels=kernels.table))
    return result


def run(made: Made, values: Mapping[str, Tensor], coordinates: Mapping[str, int] | None = None) -> tuple[Tensor, ...]:
    """The segment's results for inputs by name."""
    args = [values[name] for name in made.segment.inputs]
    memory = Placing(CPU).of_run(0, made.segment.places)
    results = compile_segments({"f": made.segment}, made.kernels)["f"](args, coordinates or {}, CPU, memory)
    assert not args, "a segment takes its arguments out of the list, so that nothing else holds them"
    return results


def evaluate(graph: Section, values: Mapping[str, Tensor]) -> list[Tensor]:
    """What the segment should return: each operator run as it is."""
    environment: dict[fx.Node, Any] = {node: values[node.name] for node in graph.inputs}
    for node in graph.nodes():
        args, kwargs = tree_map_only(fx.Node, environment.__getitem__, (node.args, dict(node.kwargs)))
        assert callable(node.target)
        environment[node] = args[0] if node.target is c10d.wait_tensor.default else node.target(*args, **kwargs)
    return [environment[node] for node in returned(graph)]
