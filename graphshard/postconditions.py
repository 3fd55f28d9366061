"""What passes leave behind: predicates on the graphs. verify.py asks for all of them.

The one thing taken from a pass is its word for ``save``, that a value is kept on purpose. Most hold from a level on,
whoever brought the program there; what only one pass establishes holds once it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphshard.analysis import weight_views_cross
from graphshard.communication import communication_axis
from graphshard.dataflow import is_view, storage_root
from graphshard.errors import IllegalProgram
from graphshard.program import Level, MemoryTag, Phase, Program, Role, Section, Slot, info, val

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

Violation = tuple[str, str]
"""What is wrong, and where."""


@dataclass(frozen=True)
class Postcondition:
    """``what`` holds; ``check`` gives where it does not."""

    what: str
    check: Callable[[Program], Iterator[Violation]]


def of(program: Program) -> list[Postcondition]:
    """What must hold of ``program``: by its level, and by the passes it has been through."""
    reached = list(Level)[: list(Level).index(program.level) + 1]
    established = [item for level in reached for item in AT.get(level, ())]
    return established + [item for record in program.history for item in AFTER.get(record.name, ())]


def require(program: Program, suffix: str = "") -> None:
    """Check them all; ``suffix`` says when, for the message.

    Raises:
        IllegalProgram: the rule, and the node, parameter or bucket that breaks it.
    """
    for item in dict.fromkeys(of(program)):
        for wrong, where in item.check(program):
            raise IllegalProgram(wrong, f"{where}{suffix}")


def _no_weight_view_crosses(program: Program) -> Iterator[Violation]:
    for node in weight_views_cross(program):
        yield "a view of a parameter is kept from forward to backward", f"%{node.name} = {node.target}, graph body"


def _gathered_is_released(program: Program) -> Iterator[Violation]:
    """Unless the gather is tagged ``save``, nothing of it, views included, is read in another phase than its own."""
    for node in program.body.nodes():
        if node.target is not c10d.all_gather_into_tensor.default:
            continue
        if info(node).tag is MemoryTag.SAVE or info(node).phase is not Phase.FORWARD:
            continue
        for reader in _readers(node):
            if info(reader).phase is not Phase.FORWARD:
                wrong = (
                    f"gathered parameter %{node.name} is kept from forward to backward, where %{reader.name} reads it"
                )
                if all(record.name != "normalize" for record in program.history):
                    wrong += "; run normalize before zero, which makes a view of a parameter for each phase"
                yield wrong, f"%{node.name} = {node.target}, graph body"


def _readers(gather: fx.Node) -> set[fx.Node]:
    """Operations that read the gathered buffer, through waits and views as well."""
    found: set[fx.Node] = set()
    stack = [gather]
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or user in found:
                continue
            found.add(user)
            if user.target is c10d.wait_tensor.default or is_view(user):
                stack.append(user)
    return found


def _reduced_once(program: Program) -> Iterator[Violation]:
    """On every path from a micro-batch's gradient to what it updates there is one reduction over each data-parallel
    axis, and paths come from every stage that has a gradient of the parameter.

    A path is followed through tensors with dims: a scalar that depends on gradients, as the global norm does, is
    reduced on its own.
    """
    axes = [axis for axis in ("dp", "shard") if program.mesh.size(axis) > 1]
    made = _flow(program.body, {})
    outputs = {slot: made.get(node) for slot, node in program.body.outputs.items() if _is_gradient(slot)}
    for name, section in program.sections().items():
        if name not in ("epilogue", "first_epilogue"):
            continue
        given = {
            n: _from_stage(paths, slot.stage) for n, slot in section.inputs.items() if (paths := outputs.get(slot))
        }
        update = _flow(section, given)
        for slot, node in section.outputs.items():
            if slot.role not in (Role.PARAM, Role.FLAT, Role.SHARD, Role.MASTER) or node not in update:
                continue
            where = f"%{node.name} = {node.target}, graph {name}"
            for axis in axes:
                counts = {dict(path.reductions).get(axis, 0) for path in update[node]}
                if counts != {1}:
                    times = " or ".join(("never", "once", "more than once")[count] for count in sorted(counts))
                    yield f"the gradient of {slot} is reduced {times} over {axis}, instead of once", where
            members = _members(program, slot)
            contributing = {s.stage for s in outputs if members & _members(program, s)}
            missing = contributing - {path.stage for path in update[node]}
            if missing:
                yield f"the gradient of {slot} leaves out that of stage {min(missing)}", where


@dataclass(frozen=True)
class _Path:
    """How a gradient got where it is: from a stage, through so many reductions over each axis (2: more than one)."""

    stage: int = 0
    reductions: frozenset[tuple[str, int]] = frozenset()

    def reduced(self, axis: str) -> _Path:
        counts = dict(self.reductions)
        return replace(self, reductions=frozenset((counts | {axis: min(counts.get(axis, 0) + 1, 2)}).items()))


_Paths = frozenset[_Path]
_REDUCTIONS = (c10d.reduce_scatter_tensor.default, c10d.all_reduce.default)


def _from_stage(paths: _Paths, stage: int) -> _Paths:
    return frozenset(replace(path, stage=stage) for path in paths)


def _flow(section: Section, given: Mapping[fx.Node, _Paths]) -> dict[fx.Node, _Paths]:
    """The paths by which gradients reach each node; of what is none, nothing. What the backward makes is one."""
    found = dict(given)
    for node in section.nodes():
        sources = [found[source] for source in node.all_input_nodes if source in found]
        if not (sources or info(node).phase in (Phase.BACKWARD, Phase.WEIGHT)) or _is_scalar(node):
            continue
        paths = frozenset[_Path]().union(*sources) or frozenset([_Path()])
        if node.target in _REDUCTIONS:
            axis: Any = node.args[-1]
            paths = frozenset(path.reduced(axis) for path in paths)
        found[node] = paths
    return found


def _is_scalar(node: fx.Node) -> bool:
    value = val(node)
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _is_gradient(slot: Slot) -> bool:
    return slot.role is Role.CARRY and slot.name.startswith("grad:")


def _members(program: Program, slot: Slot) -> set[str]:
    """The parameters that ``slot`` stores, or holds the gradients of."""
    name = slot.name.removeprefix("grad:") if slot.role is Role.CARRY else slot.name
    return {member for member, _ in program.buckets[name].members} if name in program.buckets else {name}


def _buckets_fit(program: Program) -> Iterator[Violation]:
    for bucket in program.buckets.values():
        where = f"bucket {bucket.name!r}"
        if bucket.numel % bucket.parts:
            yield f"{bucket.numel} elements do not make {bucket.parts} equal shards", where
        ends = [(name, at, at + program.params[name].numel) for name, at in bucket.members]
        for (name, _, end), (other, begin, _) in pairwise(sorted(ends, key=lambda member: member[1])):
            if begin < end:
                yield f"{other!r} begins at element {begin}, before {name!r} ends at {end}", where
        last = max(ends, key=lambda member: member[2], default=None)
        if last is not None and last[2] > bucket.numel:
            yield f"{last[0]!r} ends at element {last[2]}, beyond the bucket's {bucket.numel}", where


def _nothing_is_communicated_again(program: Program) -> Iterator[Violation]:
    """Of what the backward computes again, nothing is sent or reduced again: parameters alone are gathered anew."""
    first = {(info(n).origin, n.target) for n in program.body.nodes() if info(n).phase is Phase.FORWARD}
    for node in program.body.nodes():
        if not communication_axis(node) or node.target is c10d.all_gather_into_tensor.default:
            continue
        record = info(node)
        again = record.phase is not Phase.FORWARD and record.origin and (record.origin, node.target) in first
        if again or record.tag is MemoryTag.RECOMPUTE:
            yield "a communication is part of what is recomputed", f"%{node.name} = {node.target}, graph body"


def _tagged_is_offloaded(program: Program) -> Iterator[Violation]:
    """Of a storage that is tagged to be offloaded, no value or view is read by the backward. What a step is given, such
    as its batch, is not the body's to move."""
    for node in program.body.nodes():
        if (
            info(node).tag not in (MemoryTag.OFFLOAD, MemoryTag.OFFLOAD_TO_FILE)
            or info(node).phase is not Phase.FORWARD
        ):
            continue
        if storage_root(node).op == "placeholder":
            continue
        for reader in _readers(node):
            if info(reader).phase is not Phase.FORWARD and reader.target is not gs.transfer.default:
                wrong = f"%{node.name} is to be offloaded, and kept on the device for %{reader.name}, which reads it"
                yield wrong, f"%{node.name} = {node.target}, graph body"


AT: Mapping[Level, tuple[Postcondition, ...]] = {
    Level.STAGED: (Postcondition("no communication is part of what is recomputed", _nothing_is_communicated_again),),
    Level.SHARDED: (
        Postcondition("a gathered parameter is released after its last use in a phase", _gathered_is_released),
        Postcondition("every gradient is reduced exactly once", _reduced_once),
        Postcondition("members of a bucket do not overlap, and shards are equal", _buckets_fit),
    ),
}
"""From a level on. That no value crosses stages without a transfer is a rule for single nodes, see verify.py."""

AFTER: Mapping[str, tuple[Postcondition, ...]] = {
    "normalize": (Postcondition("no view of a parameter crosses from forward to backward", _no_weight_view_crosses),),
    "offload": (Postcondition("what is to be offloaded is not kept for the backward", _tagged_is_offloaded),),
}
"""Once a pass has run."""
