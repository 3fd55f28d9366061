"""What a plan with ``debug_nan`` knows of the body's values: which other ones each is made of, and what it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from graphshard import text
from graphshard.communication import communicates
from graphshard.dataflow import has_floats, is_getitem, resolve
from graphshard.execution import SUM, Watched
from graphshard.homes import before_moves
from graphshard.program import Program, Role, Slot, info, source_line
from graphshard.rewrite import list_arg

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard


def watched(program: Program, stage: int, nodes: list[fx.Node]) -> dict[str, Watched]:
    """Every floating-point value of ``nodes``, the part of ``stage`` of the body in order, and of the body's inputs."""
    results = _results(program)
    found = {node.name: _input(program, node, slot) for node, slot in program.body.inputs.items() if has_floats(node)}
    for node in nodes:
        if has_floats(node) and node.target is not c10d.wait_tensor.default:
            found[node.name] = _operation(program, stage, node, results.get(node, ""))
    return found


def _input(program: Program, node: fx.Node, slot: Slot) -> Watched:
    carried = program.body.outputs.get(slot)
    kind, _, name = slot.name.partition(":")
    if slot.role is not Role.CARRY:
        kind, name, carried = str(slot.role), slot.name, None
    match kind:
        case "flat" | "shard" | "whole":
            given = _members(program, name)
        case "param":
            given = f"parameter {name!r}"
        case "buffer" | "constant":
            given = f"{kind} {name!r}"
        case "batch":
            given = f"batch tensor {name}"
        case _:
            given = ""  # a sum over micro-batches
    kept = carried is not None and kind == "buffer"
    return _of(program, node, given=given, carried=carried.name if kept and carried is not None else "")


def _operation(program: Program, stage: int, node: fx.Node, result: str) -> Watched:
    if node.target in (c10d.all_gather_into_tensor.default, gs.reload.default):
        slot = program.body.inputs.get(before_moves(node.all_input_nodes[0]))
        if slot is not None:
            return _of(program, node, given=_members(program, slot.name))
    if given := _parameter(program, node):
        return _of(program, node, given=given)
    # One result of an operator with several stands for the operator: the others may be infinite with good reason.
    operator: fx.Node = node.args[0] if is_getitem(node) else node  # type: ignore[assignment]
    reads = [resolve(before_moves(source)) for source in operator.all_input_nodes]
    stages = [info(source).stage for source in reads]
    if operator.target is gs.transfer.default:
        stages = [operator.args[1]]  # type: ignore[list-item]
    leaves = tree_leaves((operator.args, dict(operator.kwargs)))
    return _of(
        program,
        operator,
        reads=tuple(
            (stage if made_on is None else made_on, source.name)
            for made_on, source in zip(stages, reads, strict=True)
            if has_floats(source)
        ),
        infinite=any(isinstance(leaf, float) and math.isinf(leaf) for leaf in leaves),
        result=result,
    )


def _of(program: Program, node: fx.Node, **fields: Any) -> Watched:
    record = info(node)
    spelled = text.node_text(node, "body", program.body)
    return Watched(spelled, str(record.phase), record.module, source_line(program.sources, record), **fields)


def _parameter(program: Program, node: fx.Node) -> str:
    """What a view of a gathered bucket shows; "" for another node."""
    if node.target is not torch.ops.aten.as_strided.default:
        return ""
    flat = before_moves(resolve(node.all_input_nodes[0]))
    slot = program.body.inputs.get(flat)
    if slot is None and flat.target is c10d.all_gather_into_tensor.default:
        slot = program.body.inputs.get(before_moves(flat.all_input_nodes[0]))
    bucket = None if slot is None else program.buckets.get(slot.name.removeprefix("whole:"))
    if bucket is None:
        return ""
    return next((f"parameter {name!r}" for name, offset in bucket.members if offset == node.args[3]), "")


def _members(program: Program, name: str) -> str:
    """The parameters of a bucket."""
    bucket = program.buckets.get(name)
    members = [name] if bucket is None else [member for member, _ in bucket.members]
    shown = ", ".join(map(repr, members[:3])) + (", …" if len(members) > 3 else "")
    return f"parameter {shown}" if len(members) == 1 else f"one of the parameters {shown}"


def _results(program: Program) -> dict[fx.Node, str]:
    """The values that are the step's loss and gradients, one micro-batch's or summed: what they are called.

    Of a loss that is scaled the gradients are none: that they overflow is why a step is skipped, and no failure."""
    found: dict[fx.Node, str] = {}
    scaled = any(slot.role is Role.SCALER for slot in program.body.input_slots)
    kinds = ("loss",) if scaled else ("loss", "grad")
    for slot, node in program.body.outputs.items():
        kind, _, name = slot.name.partition(":")
        if slot.role is not Role.CARRY or kind not in kinds:
            continue
        bucket = program.buckets.get(name)
        found[node] = "the loss" if kind == "loss" else SUM if bucket else f"the gradient of parameter {name!r}"
        value = node.all_input_nodes[-1]
        while communicates(value):
            value = value.all_input_nodes[0]
        if bucket is None or value.target is not gs.pack.default:
            continue
        members = {offset: member for member, offset in bucket.members}
        for part, offset in zip(list_arg(value, 0), list_arg(value, 1), strict=True):
            if offset in members:
                found[part] = f"the gradient of parameter {members[offset]!r}"
    return found
