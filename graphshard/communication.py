"""Which nodes of a graph communicate, over which mesh axis, and how many bytes a rank sends for them."""

from __future__ import annotations

import torch
from torch import fx

from graphshard.analysis import nbytes
from graphshard.program import val

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

MEETINGS = (gs.stage_sum.default, gs.stage_broadcast.default)
"""Operators that every stage takes part in."""

MOVES = (gs.offload.default, gs.reload.default)
"""Operators that move a value of one rank between its device and where it is kept meanwhile. They are started and
waited for like communication, but nothing is sent."""

COLLECTIVES = (
    c10d.all_gather_into_tensor.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_reduce.default,
    c10d.broadcast.default,
)
"""Operators that start what a wait ends, over a data-parallel axis."""


def communicates(node: fx.Node) -> bool:
    """Whether the node sends or moves something, or waits for what is sent."""
    return bool(communication_axis(node)) or node.target in MOVES or node.target is c10d.wait_tensor.default


def arrives(node: fx.Node) -> bool:
    """Whether no segment computes the node: an input of the graph, or what communication brings."""
    return node.op == "placeholder" or bool(communication_axis(node)) or node.target in MOVES


def communication_axis(node: fx.Node) -> str:
    """The mesh axis that a node sends over; "" for what sends nothing."""
    if node.target is gs.transfer.default or node.target in MEETINGS:
        return "pp"
    return str(node.args[-1]) if node.target in COLLECTIVES else ""


def sender(transfer: fx.Node) -> int:
    """The stage that a transfer reads from."""
    stage: int = transfer.args[1]  # type: ignore[assignment]
    return stage


def sent_bytes(node: fx.Node, size: int) -> int:
    """Bytes that a rank of a group of ``size`` sends for a node that communicates, with the least traffic there is: in
    an all-gather and a reduce-scatter (n-1)/n of the whole value, in an all-reduce both, in a broadcast, from rank to
    rank, all of it."""
    given = nbytes(val(node.all_input_nodes[0]))
    if node.target in (gs.transfer.default, c10d.broadcast.default):
        return given
    if node.target is c10d.all_gather_into_tensor.default:
        return (size - 1) * given
    if node.target is c10d.reduce_scatter_tensor.default:
        return (size - 1) * given // size
    return 2 * (size - 1) * given // size
