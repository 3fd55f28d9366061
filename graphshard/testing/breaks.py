"""Ways to break a program at one node, each a mistake that passes make.

A break changes the program it is given and says what it did, or returns None, the program unchanged, where it does not
apply. What comes out need not be legal: mutation.py verifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphshard.program import MemoryTag, Phase, Program, Role, Section, info, set_info
from graphshard.rewrite import after, arg, call, list_arg, retype, retype_from, set_outputs

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

_GATHER, _SCATTER = c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default
_REDUCE, _WAIT = c10d.all_reduce.default, c10d.wait_tensor.default
_STARTS = (_GATHER, _SCATTER, _REDUCE)


@dataclass(frozen=True)
class Break:
    """One kind of mistake.

    ``same_meaning``: it costs memory or time, or needs an executor to show, and no result of the reference differs.
    """

    name: str
    apply: Callable[[Program, Section, fx.Node], str | None]
    same_meaning: bool = False


def _drop_collective(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target is gs.stage_sum.default and len(parts := list_arg(node, 0)) > 1:
        _set_arg(node, 0, parts[:-1])
        return f"sums over the stages without %{parts[-1].name}"
    if node.target is not _WAIT or (start := arg(node, 0)).target not in _STARTS:
        return None
    source = arg(start, 0)
    with after(node):
        if start.target is _GATHER:
            alone = call(node.graph, aten.repeat.default, (source, [start.args[1]]), info(node))
        elif start.target is _SCATTER:
            alone = call(node.graph, gs.local_shard.default, (source, start.args[2], start.args[3]), info(node))
        else:
            alone = source
    _redirect(node, alone)
    return f"%{start.name} is dropped: every rank goes on with its own value"


def _reduce_twice(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target is not _WAIT or (start := arg(node, 0)).target is not _REDUCE:
        return None
    with after(node):
        again = call(node.graph, _REDUCE, (node, *start.args[1:]), info(start))
    with after(again):
        waited = call(node.graph, _WAIT, (again,), info(node))
    _redirect(node, waited, but=again)
    return f"%{start.name} is reduced a second time"


def _swap_collectives(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target not in _STARTS:
        return None
    for other in _behind(node):
        alike = other.target is node.target and other.args[1:] == node.args[1:] and _exchangeable(node, other)
        if alike and arg(node, 0) is not arg(other, 0) and _exchangeable(arg(node, 0), arg(other, 0)):
            one, two = arg(node, 0), arg(other, 0)
            _set_arg(node, 0, two)
            _set_arg(other, 0, one)
            return f"%{node.name} and %{other.name} take each other's value"
    return None


def _shift_slice(program: Program, section: Section, node: fx.Node) -> str | None:
    """One element along, or back where there is none."""
    if node.target is aten.slice.Tensor and len(node.args) >= 4:
        dim, start, end = _numbers(node.args[1:4])
        size = arg(node, 0).meta["val"].shape[dim]
        by = 1 if end < size else -1
        if start + by < 0:
            return None
        _set_arg(node, 2, start + by)
        _set_arg(node, 3, end + by)
        return f"%{node.name} begins at {start + by} instead of {start}"
    if node.target is not aten.as_strided.default:
        return None
    offset = _numbers(node.args[3:])[0] if len(node.args) > 3 else 0
    last = offset + sum((size - 1) * step for size, step in zip(list_arg(node, 1), list_arg(node, 2), strict=True))
    if last + 1 < arg(node, 0).meta["val"].numel():
        node.args = (*node.args[:3], offset + 1)
    elif offset > 0:
        node.args = (*node.args[:3], offset - 1)
    else:
        return None
    return f"%{node.name} begins at {node.args[3]} instead of {offset}"


def _swap_offsets(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target is not gs.pack.default:
        return None
    parts = list_arg(node, 0)
    for i, one in enumerate(parts):
        for j in range(i + 1, len(parts)):
            if one is not parts[j] and _exchangeable(one, parts[j]):
                parts[i], parts[j] = parts[j], one
                _set_arg(node, 0, parts)
                return f"%{node.name} has %{one.name} and %{parts[i].name} in each other's place"
    return None


def _swap_members(program: Program, section: Section, node: fx.Node) -> str | None:
    slot = section.inputs.get(node)
    if section is not program.body or slot is None or slot.role not in (Role.FLAT, Role.SHARD):
        return None
    bucket = program.buckets[slot.name]
    members = list(bucket.members)
    for i, (one, at) in enumerate(members):
        for j, (other, at_other) in enumerate(members[i + 1 :], i + 1):
            if program.params[one].shape == program.params[other].shape:
                members[i], members[j] = (other, at), (one, at_other)
                program.buckets[slot.name] = replace(bucket, members=tuple(members))
                return f"bucket {slot.name!r} has {one!r} and {other!r} in each other's place"
    return None


def _scale(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        factor = node.args[1]
        if isinstance(factor, float | int) and factor:
            _set_arg(node, 1, factor * 2)
            return f"%{node.name} scales by {factor * 2} instead of {factor}"
    return None


def _drop_term(program: Program, section: Section, node: fx.Node) -> str | None:
    """A carry, or what is added to it."""
    if node.target is not aten.add.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for old, new in ((arg(node, 0), arg(node, 1)), (arg(node, 1), arg(node, 0))):
        slot = section.inputs.get(old)
        if slot is not None and slot.role is Role.CARRY and _exchangeable(node, new):
            _redirect(node, new)
            return f"{slot} is not added to: what the micro-batches before gave is lost"
    return None


def _drop_update(program: Program, section: Section, node: fx.Node) -> str | None:
    reads = section.input_slots
    for slot, value in section.outputs.items():
        if value is node and slot in reads and value is not reads[slot]:
            set_outputs(section, section.outputs | {slot: reads[slot]})
            return f"{slot} is not updated"
    return None


def _swap_outputs(program: Program, section: Section, node: fx.Node) -> str | None:
    """What ``node`` is written to, and the next slot that could take it."""
    outputs = section.outputs
    written = list(outputs)
    for at, one in enumerate(written):
        for other in written[at + 1 :] if outputs[one] is node else ():
            value = outputs[other]
            if (one.role, one.stage) == (other.role, other.stage) and value is not node and _exchangeable(node, value):
                set_outputs(section, outputs | {one: value, other: node})
                return f"{one} and {other} are written each other's value"
    return None


def _read_another(program: Program, section: Section, node: fx.Node) -> str | None:
    """The first argument that something else could take the place of, which is not a collective in flight."""
    if node.op != "call_function" or node.target is _WAIT:
        return None
    earlier = list(_before(node))
    for source in node.all_input_nodes:
        for other in earlier:
            if other not in node.all_input_nodes and other.target not in _STARTS and _exchangeable(source, other):
                node.replace_input_with(source, other)
                _typed(node)
                return f"%{node.name} reads %{other.name} instead of %{source.name}"
    return None


def _keep_gathered(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target is not _GATHER or info(node).phase is not Phase.FORWARD or info(node).tag is MemoryTag.SAVE:
        return None
    for again in _behind(node):
        if again.target is _GATHER and again.args == node.args and info(again).phase is not Phase.FORWARD:
            (first,), (second,) = list(node.users), list(again.users)
            set_info(node, tag=MemoryTag.SAVE)
            _redirect(second, first)
            return f"%{node.name} is kept until the backward: %{again.name} is gone"
    return None


def _wait_at_once(program: Program, section: Section, node: fx.Node) -> str | None:
    if node.target is not _WAIT or (start := arg(node, 0)).next is node:
        return None
    start.append(node)
    return f"%{start.name} is waited for where it starts"


BREAKS = (
    Break("drop-collective", _drop_collective),
    Break("reduce-twice", _reduce_twice),
    Break("swap-collectives", _swap_collectives),
    Break("shift-slice", _shift_slice),
    Break("swap-offsets", _swap_offsets),
    Break("swap-members", _swap_members),
    Break("scale", _scale),
    Break("drop-term", _drop_term),
    Break("drop-update", _drop_update),
    Break("swap-outputs", _swap_outputs),
    Break("read-another", _read_another),
    Break("keep-gathered", _keep_gathered, same_meaning=True),
    Break("wait-at-once", _wait_at_once, same_meaning=True),
)
"""Every kind of mistake that :func:`graphshard.testing.mutants` makes."""


def _numbers(arguments: Any) -> list[int]:
    return [int(argument) for argument in arguments]


def _set_arg(node: fx.Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])
    _typed(node)


def _typed(node: fx.Node) -> None:
    retype([node])
    retype_from([node])


def _redirect(old: fx.Node, new: fx.Node, but: fx.Node | None = None) -> None:
    """Who reads ``old`` reads ``new``, except for ``but`` and ``new`` itself; ``old`` stays where it is read."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (new, but))
    if not old.users:
        for node in (old, *old.all_input_nodes):
            if not node.users and node.op == "call_function":
                node.graph.erase_node(node)
    retype_from([new])


def _exchangeable(one: fx.Node, other: fx.Node) -> bool:
    """One could stand where the other does: the same shape, dtype and stage."""
    a, b = one.meta["val"], other.meta["val"]
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return (a.shape, a.dtype, info(one).stage) == (b.shape, b.dtype, info(other).stage)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op == "call_function":
        node = node.next
        yield node


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """What comes before ``node``, the nearest first."""
    while (node := node.prev).op != "root":
        yield node
