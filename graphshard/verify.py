"""Legality of programs: what may exist at each level. The driver calls :func:`verify` before and after every pass."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx

from graphshard.carried import late_reads
from graphshard.communication import MOVES, communicates
from graphshard.errors import IllegalProgram
from graphshard.homes import home_of, homes, on_host
from graphshard.plan_options import PLACES
from graphshard.postconditions import require
from graphshard.program import HOST, Level, Phase, Program, Role, Section, Slot, info, val
from graphshard.region import Region
from graphshard.text.spelling import TypeText, type_of

_NAMESPACES = {
    Level.CAPTURED: {"aten", "prims", "graphshard"},
    Level.STAGED: {"aten", "prims", "graphshard"},
    Level.SHARDED: {"aten", "prims", "graphshard", "_c10d_functional"},
}
_CROSS_STAGE = {"graphshard::transfer", "graphshard::stage_sum", "graphshard::stage_broadcast"}
_SHARDED_ONLY = {"graphshard::local_shard", "graphshard::offload", "graphshard::reload"}
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_RELOAD = torch.ops.graphshard.reload.default
_BODY_ORDER = {Phase.FORWARD: 0, Phase.BACKWARD: 1, Phase.WEIGHT: 1}


def verify(program: Program, after: str = "") -> None:
    """Check every rule of the program's level, and what the passes have established (postconditions.py).

    Raises:
        IllegalProgram: names the rule, the graph and the node; ``after`` is the pass that ran last.
    """
    suffix = f" after pass {after!r}" if after else ""
    check_rules(program, suffix)
    require(program, suffix)


def check_rules(program: Program, suffix: str = "") -> None:
    """Check every rule of the program's level alone; ``suffix`` says when, for the message. Raises IllegalProgram."""
    for name, section in program.sections().items():
        where = f"graph {name}{suffix}"
        _check_structure(section, where)
        for node in section.nodes():
            _check_operator(node, program.level, where)
            if program.level is not Level.CAPTURED and program.stages > 1:
                _check_stage(node, program.stages, where)
            if name == "body":
                _check_phase_order(node, where)
    _check_types(program, suffix)
    _check_carries(program, suffix)
    _check_parameters(program, suffix)
    if program.level is Level.SHARDED:
        for name, section in program.sections().items():
            _check_waits(section, f"graph {name}{suffix}")
            _check_moves(section, f"graph {name}{suffix}")
        _check_homes(program, suffix)


def _fail(rule: str, node: fx.Node | str, where: str) -> None:
    target = "" if isinstance(node, str) else "a region" if isinstance(node.target, Region) else node.target
    text = node if isinstance(node, str) else f"%{node.name} = {target}"
    raise IllegalProgram(rule, f"{text}, {where}")


def _check_structure(section: Section, where: str) -> None:
    seen: set[fx.Node] = set()
    operations_begun = False
    for node in section.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                _fail(f"%{source.name} is used before it is defined", node, where)
        seen.add(node)
        if node.op == "placeholder":
            if operations_begun:
                _fail("a placeholder comes after an operation", node, where)
            if node not in section.inputs:
                _fail("a placeholder has no slot in the signature", node, where)
        elif node.op == "call_function":
            operations_begun = True
        elif node.op != "output":
            _fail(f"node kind {node.op!r} is not part of the IR", node, where)
        if node.op != "output" and ("val" not in node.meta or "info" not in node.meta):
            _fail("a node has no type or no NodeInfo", node, where)
    for slot, count in Counter(section.inputs.values()).items():
        if count > 1:
            _fail(f"slot {slot} is read by {count} placeholders; one is allowed", str(slot), where)
    for slot, count in Counter(section.output_slots).items():
        if count > 1:
            _fail(f"slot {slot} is written {count} times; once is allowed", str(slot), where)
    if len(section.output_slots) != len(section.output_node.args[0]):  # type: ignore[arg-type]
        _fail("the signature and the output node differ in length", "return", where)


def _check_operator(node: fx.Node, level: Level, where: str) -> None:
    if node.target is operator.getitem:
        return
    if isinstance(node.target, Region):
        _check_region(node, node.target, level, where)
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        _fail("only ATen, functional collective and graphshard operators are part of the IR", node, where)
        return
    if node.target.namespace not in _NAMESPACES[level]:
        _fail(f"operators of namespace {node.target.namespace!r} do not exist at level {level}", node, where)
    name = node.target._schema.name
    if (name in _CROSS_STAGE and level is Level.CAPTURED) or (name in _SHARDED_ONLY and level is not Level.SHARDED):
        _fail(f"{name} does not exist at level {level}", node, where)
    if node.target._schema.is_mutable:
        _fail("graphs are functional; this operator writes to its arguments", node, where)


def _check_region(node: fx.Node, region: Region, level: Level, where: str) -> None:
    """A region computes, on one rank, in one phase and stage, new tensors of the types it says."""
    place = info(node)
    for inner, outer in zip(region.inputs, node.args, strict=True):
        if not isinstance(outer, fx.Node) or type_of(val(inner)) != type_of(val(outer)):
            _fail(f"the region is given {outer} for %{inner.name} of another type", node, where)
    for inner in region.operations:
        within = f"region %{node.name}, {where}"
        if isinstance(inner.target, Region) or communicates(inner):
            _fail("a region computes on one rank, with operators alone", inner, within)
        _check_operator(inner, level, within)
        if (info(inner).phase, info(inner).stage) != (place.phase, place.stage):
            _fail(f"an operation is not of the region's phase {place.phase} and stage {place.stage}", inner, within)
        if info(inner).device != place.device:
            _fail(f"an operation is not of the region's device {place.device or 'of the rank'}", inner, within)
    if any(not isinstance(val(output), torch.Tensor) for output in region.outputs):
        _fail("a region returns tensors", node, where)


def _check_stage(node: fx.Node, stages: int, where: str) -> None:
    stage = info(node).stage
    if stage is not None and not 0 <= stage < stages:
        _fail(f"stage {stage} is outside 0..{stages - 1}", node, where)
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _CROSS_STAGE:
        return
    for source in node.all_input_nodes:
        other = info(source).stage
        if other is not None and other != stage:
            rule = f"a value crosses stages without a transfer: %{source.name} of stage {other} read on stage {stage}"
            _fail(rule, node, where)


def _check_phase_order(node: fx.Node, where: str) -> None:
    for source in node.all_input_nodes:
        if source.op == "placeholder":
            continue
        if _BODY_ORDER.get(info(source).phase, 1) > _BODY_ORDER.get(info(node).phase, 1):
            _fail(f"a forward operation reads %{source.name} of phase {info(source).phase}", node, where)
        if info(source).phase is Phase.WEIGHT and info(node).phase is Phase.BACKWARD:
            _fail(f"an operation of phase backward reads %{source.name} of phase weight", node, where)


def _check_types(program: Program, suffix: str) -> None:
    """Every graph reads and writes a slot as the same type; without that one storage could not serve them all."""
    known: dict[Slot, tuple[TypeText, str]] = {}
    for name, section in program.sections().items():
        ports = [*section.input_slots.items(), *section.outputs.items()]
        for slot, node in ports:
            value = node.meta["val"]
            if slot.role is Role.OUTPUT or not isinstance(value, torch.Tensor):
                continue
            kind = TypeText(value.dtype, tuple(value.shape))
            expected, where = known.setdefault(slot, (kind, name))
            if kind != expected:
                _fail(f"{slot} is {expected} in graph {where} and {kind} here", node, f"graph {name}{suffix}")


def _check_waits(section: Section, where: str) -> None:
    """What a collective or a reload brings is there when it has been waited for, and not before."""
    for node in section.nodes():
        if not isinstance(node.target, torch._ops.OpOverload) or node.target is _WAIT:
            continue
        kind = {"_c10d_functional": "collective", "graphshard": "reload"}.get(node.target.namespace)
        if kind is None or (kind == "reload" and node.target is not _RELOAD):
            continue
        for user in node.users:
            if user.target is not _WAIT:
                _fail(f"%{user.name} reads the {kind} %{node.name} without waiting for it", node, where)


def _check_moves(section: Section, where: str) -> None:
    """What is offloaded is reloaded from where it is, and nothing else reads it but the CPU, which reads that alone."""
    for node in section.nodes():
        if info(node).device not in ("", HOST):
            _fail(f"{info(node).device!r} is no device; there is {HOST}", node, where)
        for source in node.all_input_nodes if on_host(node) else ():
            if home_of(source) != "cpu":
                there = home_of(source) or "the device"
                _fail(f"an operation in host memory reads %{source.name}, which is on {there}", node, where)
        if node.target in MOVES and node.args[1] not in PLACES:
            _fail(f"{node.args[1]!r} is no place to keep a value; there are {', '.join(PLACES)}", node, where)
    for node in section.graph.nodes:
        home = home_of(node) if node.op != "output" else ""
        for user in node.users:
            if home and user.op != "output" and user.target is not _RELOAD and not (on_host(user) and home == "cpu"):
                _fail(f"%{user.name} reads %{node.name}, which is offloaded to {home}", node, where)
            if user.target is _RELOAD and home != user.args[1]:
                there = f"is in {home}" if home else "is not offloaded"
                _fail(f"%{user.name} reloads %{node.name} from {user.args[1]}, but it {there}", node, where)


def _check_homes(program: Program, suffix: str) -> None:
    """All graphs find a slot where the others leave it."""
    known = homes(program)
    for name, section in program.sections().items():
        for slot, node in (*section.input_slots.items(), *section.outputs.items()):
            read = any(user.op != "output" for user in node.users) or node.op != "placeholder"
            if slot in known and read and home_of(node) != known[slot]:
                there = home_of(node) or "the device"
                rule = f"{slot} is kept in {known[slot]} by another graph, and here on {there}"
                _fail(rule, node, f"graph {name}{suffix}")


def _check_carries(program: Program, suffix: str) -> None:
    def carries(slots: object) -> set[object]:
        return {slot for slot in slots if slot.role is Role.CARRY}  # type: ignore[attr-defined]

    given = carries(program.prologue.output_slots)
    read = carries(program.body.inputs.values())
    written = carries(program.body.output_slots)
    for slot in sorted(map(str, read - given)):
        _fail(f"{slot} is read by the body but not initialised by the prologue", slot, f"graph body{suffix}")
    for slot in sorted(map(str, written - read)):
        _fail(f"{slot} is returned by the body but not read by it", slot, f"graph body{suffix}")
    for target, node in program.body.outputs.items():
        if target.role is Role.CARRY and node.op == "placeholder" and program.body.inputs[node] != target:
            _fail(f"{target} becomes another slot's value; that needs a copy", node, f"graph body{suffix}")
    for old, _, reader in late_reads(program.body):
        rule = f"{program.body.inputs[old]} is replaced by the forward and read by a later phase; that needs a copy"
        _fail(rule, reader, f"graph body{suffix}")
    for section in program.updates():
        for slot in sorted(map(str, carries(section.inputs.values()) - (given | written))):
            _fail(f"{slot} is read by the epilogue but nothing produces it", slot, f"graph epilogue{suffix}")


def _check_parameters(program: Program, suffix: str) -> None:
    members = {name for bucket in program.buckets.values() for name, _ in bucket.members}
    for name, section in program.sections().items():
        for slot in section.inputs.values():
            where = f"graph {name}{suffix}"
            if slot.role is Role.PARAM and slot.name not in program.params:
                _fail(f"{slot} is not in the table of parameters", str(slot), where)
            if slot.role in (Role.FLAT, Role.SHARD) and slot.name not in program.buckets:
                _fail(f"{slot} is not in the table of buckets", str(slot), where)
            if slot.role in (Role.FLAT, Role.SHARD) and program.level is not Level.SHARDED:
                _fail(f"{slot} exists before parameters are sharded", str(slot), where)
    for member in sorted(members - set(program.params)):
        _fail(f"bucket member {member!r} is not in the table of parameters", member, suffix.strip() or "buckets")
