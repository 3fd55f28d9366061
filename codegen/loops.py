"""Strip-mining: chains of pointwise operators over long flat vectors run block by block.

What lies between two operators stays in cache: an optimizer's update reads and writes each state once, in place where
the old value is dead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphshard.dataflow import is_pointwise
from graphshard.homes import replaced_slots, stored_slot
from graphshard.program import Role, Section, Slot, val

BLOCK = 65536
"""Elements per block: a dozen live temporaries of float32 fit a core's second-level cache."""


@dataclass(eq=False)
class Loop:
    """Pointwise nodes over vectors of ``numel`` elements, in order."""

    numel: int
    nodes: list[fx.Node] = field(default_factory=list)

    def inputs(self) -> list[fx.Node]:
        """The vectors that come from outside."""
        inside = set(self.nodes)
        found = dict.fromkeys(
            s for n in self.nodes for s in n.all_input_nodes if s not in inside and _is_vector(s, self.numel)
        )
        return list(found)

    def outputs(self, returned: set[fx.Node]) -> list[fx.Node]:
        """The nodes that anything outside reads."""
        inside = set(self.nodes)
        return [n for n in self.nodes if n in returned or any(user not in inside for user in n.users)]


def find_loops(nodes: list[fx.Node]) -> list[fx.Node | Loop]:
    """``nodes``, in order, with each run of long pointwise ones as a Loop. Scalars between them are computed ahead."""
    result: list[fx.Node | Loop] = []
    current: Loop | None = None
    for node in nodes:
        numel = _vector_length(node)
        if numel and is_pointwise(node):
            if current is None or current.numel != numel:
                current = Loop(numel)
                result.append(current)
            current.nodes.append(node)
        elif current is not None and _independent(node, current):
            result.insert(result.index(current), node)
        else:
            current = None
            result.append(node)
    return [part for item in result for part in (_components(item) if isinstance(item, Loop) else [item])]


def _components(loop: Loop) -> list[fx.Node | Loop]:
    """Chains that share no vector, a loop each: more than one would only compete for the cache."""
    owner: dict[fx.Node, int] = {}
    groups: dict[int, list[fx.Node]] = {}
    for index, node in enumerate(loop.nodes):
        related = [n for n in (node, *node.all_input_nodes) if _is_vector(n, loop.numel)]
        joined = sorted({owner[n] for n in related if n in owner})
        target = joined[0] if joined else index
        for other in joined[1:]:
            groups[target] += groups.pop(other)
            owner.update({n: target for n, g in owner.items() if g == other})
        groups.setdefault(target, []).append(node)
        owner.update(dict.fromkeys(related, target))
    parts = [Loop(loop.numel, sorted(nodes)) for nodes in groups.values()]
    return [part.nodes[0] if len(part.nodes) == 1 else part for part in parts]


def _vector_length(node: fx.Node) -> int:
    value = val(node)
    if isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() > BLOCK and value.is_contiguous():
        return value.numel()
    return 0


def _is_vector(node: fx.Node, numel: int) -> bool:
    value = val(node)
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() == numel


def _independent(node: fx.Node, loop: Loop) -> bool:
    """A scalar computation that reads nothing of the loop may go before it."""
    value = val(node)
    scalar = isinstance(value, torch.Tensor) and value.numel() == 1 and is_pointwise(node)
    return scalar and not set(node.all_input_nodes) & set(loop.nodes)


def overwritten(loop: Loop, section: Section, returned: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Outputs of the loop to the input whose storage they take: the old value of their slot, else one that dies."""
    inside = set(loop.nodes)
    dying = [
        n
        for n in loop.inputs()
        if all(user in inside for user in n.users) and n not in returned and _owns_storage(n, section)
    ]
    slots: dict[Slot, fx.Node] = {slot: n for n in dying if (slot := stored_slot(section, n)) is not None}
    written = replaced_slots(section)
    outputs = loop.outputs(returned)
    result = {n: slots[written[n]] for n in outputs if n in written and written[n] in slots}
    free = [n for n in dying if n not in result.values() and section.inputs.get(n, _CARRY).role is Role.CARRY]
    for node in outputs:
        old = next((n for n in free if val(n).dtype == val(node).dtype), None)
        if node not in result and old is not None:
            result[node] = old
            free.remove(old)
    return {node: old for node, old in result.items() if val(node).dtype == val(old).dtype}


_CARRY = Slot(Role.CARRY, "")


def _owns_storage(node: fx.Node, section: Section) -> bool:
    """A slot's value, or what a collective or a reload left: not a view of something else."""
    if node in section.inputs:
        return section.inputs[node].role in (Role.FLAT, Role.SHARD, Role.MASTER, Role.STATE, Role.CARRY)
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def write_loop(
    loop: Loop,
    in_place: dict[fx.Node, fx.Node],
    returned: set[fx.Node],
    expression: Callable[[Any], str],
    call: Callable[[fx.Node], str],
) -> list[str]:
    """Lines of code that run ``loop`` block by block and leave its outputs under their names; ``in_place``:
    :func:`overwritten`."""
    outputs = loop.outputs(returned)
    lines = [
        f"{node.name} = torch.empty({loop.numel}, dtype={val(node).dtype}, device=device)"
        for node in outputs
        if node not in in_place
    ]
    lines += [f"{node.name} = {expression(old)}" for node, old in in_place.items()]
    lines.append(f"for at in range(0, {loop.numel}, {BLOCK}):")
    lines += [f"    {expression(n)}_b = {expression(n)}[at : at + {BLOCK}]" for n in loop.inputs()]
    for node, dead in _blocks(loop, outputs):
        lines.append(f"    {node.name}_b = {call(node)}")
        if dead:
            lines.append(f"    del {', '.join(f'{expression(n)}_b' for n in dead)}")
    lines += [f"    {node.name}[at : at + {BLOCK}] = {node.name}_b" for node in outputs]
    lines += [f"    del {node.name}_b" for node in outputs]
    return lines


def block_bytes(loop: Loop, returned: set[fx.Node]) -> int:
    """The most that the blocks of ``loop``'s own nodes take."""
    inside = set(loop.nodes)
    live = peak = 0
    for node, dead in _blocks(loop, loop.outputs(returned)):
        live += BLOCK * val(node).dtype.itemsize
        peak = max(peak, live)
        live -= sum(BLOCK * val(n).dtype.itemsize for n in dead if n in inside)
    return peak


def _blocks(loop: Loop, outputs: list[fx.Node]) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Each node of ``loop`` with the vectors whose block nothing reads after it, inputs included."""
    vectors = {*loop.inputs(), *loop.nodes}
    last = {source: node for node in loop.nodes for source in (*node.all_input_nodes, node) if source in vectors}
    dead: dict[fx.Node, list[fx.Node]] = {}
    for vector, node in last.items():
        if vector not in outputs:
            dead.setdefault(node, []).append(vector)
    return [(node, dead.get(node, [])) for node in loop.nodes]
