"""Parameters that a plan's precision leaves in float32: the model reads their true values, as it says itself.

Under autocast a parameter is in float32, and what is read of it is rounded where an operator is lowered. Where none is,
since the model has turned autocast off or casts to float32 first, a value rounded beforehand would be another. One that
is read in both kinds of places is stored once, in the lower precision, and widened where float32 is asked for.
"""

from __future__ import annotations

import torch
from torch import fx

from graphshard.analysis import weight_views
from graphshard.autocast import island
from graphshard.program import Phase, Program, Role, info, val

gs = torch.ops.graphshard


def wide_parameters(program: Program, lower: torch.dtype) -> set[str]:
    """The names of such parameters. One that the forward does not read is none of them."""
    body = program.body
    views = weight_views(body)
    return {
        slot.name
        for node, slot in body.inputs.items()
        if slot.role is Role.PARAM and _readers(node) and _is_wide(node, views, lower, False)
    }


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads elements of ``node`` in the forward, not its type alone."""
    found = [user for user in node.users if user.op == "call_function" and info(user).phase is Phase.FORWARD]
    return [user for user in found if user.target is not gs.cast.default or user.args[0] is node]


def _is_wide(node: fx.Node, views: set[fx.Node], lower: torch.dtype, is_cast: bool) -> bool:
    """Whether every forward operation that reads ``node``, or a view of it, reads float32; ``is_cast``: the model casts
    it before."""
    for reader in _readers(node):
        if reader in views:
            narrows = val(reader).dtype is lower
            wide = not narrows and _is_wide(reader, views, lower, is_cast or reader.target is gs.cast.default)
        else:
            wide = info(reader).as_given or (is_cast and island(reader, lower) is not lower)
        if not wide:
            return False
    return True
