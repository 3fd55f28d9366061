"""The number that the backward begins with: the gradient of a step's loss with respect to that of a micro-batch.

A step's loss is the mean over micro-batches and data-parallel ranks. Their share is taken there, as in
``(loss / N).backward()``: one number, where otherwise every gradient would be multiplied by it.
"""

from __future__ import annotations

import torch
from torch import fx

from graphshard.dataflow import downstream
from graphshard.program import Phase, Role, Section, info, val

aten = torch.ops.aten


def loss_gradient(body: Section) -> fx.Node | None:
    """The first number of the backward; None: there is none, or it is no constant."""
    backward = (node for node in body.nodes() if info(node).phase is not Phase.FORWARD)
    return next((node for node in backward if node.target is aten.full.default and node.args[0] == []), None)


def share_loss(body: Section, parts: int) -> bool:
    """Divide all gradients by ``parts``; whether that was done. In float16 small gradients might be lost by it."""
    one = loss_gradient(body)
    if one is None or val(one).dtype is torch.float16:
        return False
    # Each stage that reads it has one of its own.
    origin = info(one).origin
    every = [n for n in body.nodes() if n.target is one.target and n.args == one.args and info(n).origin == origin]
    carries = {slot: node for slot, node in body.outputs.items() if slot.role is Role.CARRY}
    if not {node for slot, node in carries.items() if slot.name.startswith("grad:")} <= set(downstream(every)):
        return False
    for node in every:
        node.args = ([], node.args[1] / parts)  # type: ignore[operator]
    return True
