"""Where values are between steps, and between forward and backward: on the device, or offloaded to a home.

A slot's home is read off the graphs: they offload what they write there and reload what they read. All graphs of a
plan agree, because passes decide by the slot's role and size alone; verify.py checks it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphshard.communication import MOVES
from graphshard.program import HOST, Program, Section, Slot, info

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard


def before_moves(node: fx.Node) -> fx.Node:
    """The value that ``node`` is, before it was offloaded and reloaded."""
    while node.target in MOVES or _waits_for_reload(node):
        node = node.all_input_nodes[0]
    return node


def _waits_for_reload(node: fx.Node) -> bool:
    return node.target is c10d.wait_tensor.default and node.all_input_nodes[0].target is gs.reload.default


def stored_slot(section: Section, node: fx.Node) -> Slot | None:
    """The slot whose value ``node`` is, reloaded if need be."""
    return section.inputs.get(before_moves(node))


def replaced_slots(section: Section) -> dict[fx.Node, Slot]:
    """Each value that the section leaves in a slot, as it is before it is offloaded."""
    return {before_moves(node): slot for slot, node in section.outputs.items()}


def home_of(node: fx.Node) -> str:
    """Where ``node`` is, of an offloaded value, a placeholder for one, or what the CPU made; "" for what is on the
    device."""
    if on_host(node):
        return "cpu"
    if node.target is gs.offload.default:
        return str(node.args[1])
    if node.op == "placeholder":
        if any(map(on_host, node.users)):
            return "cpu"
        return next((str(user.args[1]) for user in node.users if user.target is gs.reload.default), "")
    return ""


def on_host(node: fx.Node) -> bool:
    """Whether the CPU computes ``node``, in host memory."""
    return node.op == "call_function" and info(node).device == HOST


def homes(program: Program) -> dict[Slot, str]:
    """The slots that are offloaded."""
    ports = (port for section in program.sections().values() for port in _ports(section))
    return {slot: home for slot, node in ports if (home := home_of(node))}


def _ports(section: Section) -> Iterator[tuple[Slot, fx.Node]]:
    yield from section.input_slots.items()
    yield from section.outputs.items()
