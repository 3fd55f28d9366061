"""How many bytes a rank holds, estimated on the program: no schedule, no lowering.

The peak of a stage is the sum of

- what outlives a step: parameters, buffers, constants, optimizer state;
- the batch, all micro-batches of it;
- the values of the body in node order, each from the node that makes it to its last reader, storage that views share
  counted once. Carries live throughout, and a carry's new value is written over the old one; accumulators that begin
  at zero do not exist before a step of one micro-batch;
- for each further micro-batch in flight, what the forward hands to the backward. Stage s of S has S - s in flight, as
  1F1B has.

It leaves out: other schedules (GPipe has all micro-batches in flight, and a schedule with weight actions keeps what
they read for longer); the prologue and the epilogue; how lowering moves communication across micro-batches; results
that it writes over an operand; buffers of the communication library, and what the allocator loses. Against simulate.py,
on plans of the zoo's transformers, it is within 5% without a pipeline, 21% too low to 5% too high under 1F1B and up to
31% too low under ZB-H1. It is too low where the update, old values beside new, outweighs the activations: 33% for
convolutions over four stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphshard.analysis import nbytes
from graphshard.dataflow import is_getitem, storage_source
from graphshard.homes import home_of, homes
from graphshard.places import Places
from graphshard.program import Phase, Program, Role, Slot, info, val

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

STORED = (Role.PARAM, Role.FLAT, Role.SHARD, Role.BUFFER, Role.MASTER, Role.STATE)
"""What a rank keeps between steps."""

_THERE = (*STORED, Role.CONSTANT)


@dataclass(frozen=True)
class Footprint:
    """Bytes one rank of a stage holds: between steps, and at the peak of a step."""

    stored_bytes: int
    peak_bytes: int


def footprints(program: Program, places: Places) -> list[Footprint]:
    """Of every stage."""
    stored = _stored(program, places)
    batch = [0] * places.stages
    for node, slot in program.body.inputs.items():
        if slot.role is Role.BATCH:
            for stage in places.of[node]:
                batch[stage] += program.microbatches * nbytes(val(node))
    live, kept = _live(program, places)
    result = []
    for stage in range(places.stages):
        in_flight = min(program.microbatches, places.stages - stage)
        peak = stored[stage] + batch[stage] + live[stage] + (in_flight - 1) * kept[stage]
        result.append(Footprint(stored[stage], peak))
    return result


def _stored(program: Program, places: Places) -> list[int]:
    """Bytes between steps, by stage; a slot that only an epilogue writes is optimizer state that it creates. What is
    offloaded is not on the device."""
    away = homes(program)
    sizes: dict[tuple[Slot, int], int] = {}
    for section in program.sections().values():
        for node, slot in section.inputs.items():
            if slot.role in _THERE and slot not in away:
                for stage in places.of[node] or (slot.stage,):
                    sizes[slot, stage] = nbytes(val(node))
        for slot, node in section.outputs.items():
            if slot.role in _THERE and slot not in away:
                sizes.setdefault((slot, slot.stage), nbytes(val(node)))
    result = [0] * places.stages
    for (_, stage), size in sizes.items():
        result[stage] += size
    return result


def _live(program: Program, places: Places) -> tuple[list[int], list[int]]:
    """Peak bytes of the body's values, and bytes that its forward hands to its backward, by stage."""
    roots = _roots(program)
    order = [node for node in program.body.graph.nodes if node.op != "output"]
    order.sort(key=lambda node: info(node).phase is Phase.WEIGHT)  # it ends a micro-batch's backward: see lower.py
    ends = {node: len(order) for node in program.body.output_node.all_input_nodes}
    dying: list[list[fx.Node]] = [[] for _ in range(len(order) + 1)]
    last: dict[fx.Node, int] = {}
    saved: set[fx.Node] = set()
    for position, node in enumerate(order):
        root = roots[node]
        last[root] = max(last.get(root, 0), position, ends.get(node, 0))
        read = node.all_input_nodes
        if node.target is c10d.wait_tensor.default:
            read = [*read, *read[0].all_input_nodes]  # what a collective reads is in use until then
        for source in read:
            source = roots[source]
            last[source] = max(last[source], position)
            if info(node).phase is not Phase.FORWARD and info(source).phase is Phase.FORWARD:
                saved.add(source)
    for root, position in last.items():
        dying[position].append(root)
    sizes = {root: _size(root, program) for root in last}
    live, peak, kept = ([0] * places.stages for _ in range(3))
    for position, node in enumerate(order):
        if roots[node] is node:
            for stage in places.of[node]:
                live[stage] += sizes[node]
                peak[stage] = max(peak[stage], live[stage])
                if node in saved and node.op != "placeholder":
                    kept[stage] += sizes[node]
        for root in dying[position]:
            for stage in places.of[root]:
                live[stage] -= sizes[root]
    return peak, kept


def _roots(program: Program) -> dict[fx.Node, fx.Node]:
    """Each node of the body to the one that makes the storage it lives in."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in program.body.graph.nodes:
        source = storage_source(node)
        roots[node] = node if source is None else roots[source]
    inputs = program.body.input_slots
    overwritten = {
        node: inputs[slot]
        for slot, node in program.body.outputs.items()
        if slot in inputs and roots[node] is node and node.op == "call_function" and _size(inputs[slot], program)
    }
    return {node: overwritten.get(root, root) for node, root in roots.items()}


def _size(root: fx.Node, program: Program) -> int:
    """Bytes of the storage that ``root`` makes; 0 for what is counted elsewhere or does not exist."""
    if home_of(root):
        return 0
    slot = program.body.inputs.get(root)
    if slot is not None:
        return nbytes(val(root)) if slot.role is Role.CARRY and not _first_time(slot, program) else 0
    if any(is_getitem(user) for user in root.users):
        return 0  # its results count, one by one
    return nbytes(val(root))


def _first_time(slot: Slot, program: Program) -> bool:
    """Whether the carry is an accumulator that the only micro-batch of a step gives its first value."""
    made = program.prologue.outputs.get(slot) if program.microbatches == 1 else None
    return made is not None and made.target is aten.full.default and bool(made.args[1] == 0)
