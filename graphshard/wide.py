"""Parameters that a plan's precision leaves in float32: the model reads their true values.

Under autocast a parameter is in float32, and what is read of it is rounded where an operator is lowered. One that is
rounded beforehand gives something else in two kinds of places:

- where the model has turned autocast off or casts to float32 first. A parameter that is read elsewhere, too, is stored
  once, in the lower precision, and widened there;
- in operators that do more than to move or scale single values, as a matrix exponential, a decomposition or a Fourier
  transform does (``autocast.EXACTING``, and what is on none of its lists): of what they make of rounded values nothing
  may be right. They also count where they read what is computed of parameters, as long as autocast has lowered nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from graphshard.analysis import is_complex, weight_views
from graphshard.autocast import EXACTING, island, operator_name
from graphshard.dataflow import is_getitem, is_pointwise, is_view
from graphshard.program import Phase, Program, Role, Section, info, tensors, val

gs = torch.ops.graphshard

_MOVES = frozenset([
    "amax", "amin", "argmax", "argmin", "argsort", "as_strided_scatter", "cast", "cat", "clone", "constant_pad_nd",
    "copy", "diag_embed", "diagonal_scatter", "embedding", "_embedding_bag", "_embedding_bag_forward_only", "flip",
    "gather", "index", "index_add", "index_put", "index_select", "masked_select", "max", "max_pool2d_with_indices",
    "min", "repeat", "repeat_interleave", "roll", "scatter", "scatter_add", "select_scatter", "slice_scatter",
    "sort", "stack", "_to_copy", "topk", "tril", "triu", "unfold", "_unsafe_index",
])  # fmt: skip
"""Operators that move, choose or add up values: rounded before or after makes no difference that is worth a byte."""


def wide_parameters(program: Program, lower: torch.dtype) -> set[str]:
    """The names of such parameters. One that the forward does not read is none of them."""
    body = program.body
    views, exact = weight_views(body), _read_exactly(body, lower)
    return {
        slot.name
        for node, slot in body.inputs.items()
        if slot.role is Role.PARAM and _readers(node) and (node in exact or _is_wide(node, views, lower, False))
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
            narrows = any(value.dtype is lower for value in tensors(val(reader)))
            wide = not narrows and _is_wide(reader, views, lower, is_cast or reader.target is gs.cast.default)
        else:
            wide = info(reader).as_given or (is_cast and island(reader, lower) is not lower)
        if not wide:
            return False
    return True


def _read_exactly(body: Section, lower: torch.dtype) -> set[fx.Node]:
    """The parameters that exacting operators read, or read what is computed of, in float32 under autocast."""
    made_of = {  # by value that is in float32 whatever is lowered elsewhere: the parameters in it
        node: {node} if slot.role is Role.PARAM else set[fx.Node]()
        for node, slot in body.inputs.items()
        if slot.role in (Role.PARAM, Role.BUFFER, Role.BATCH)
    }
    found: set[fx.Node] = set()
    for node in body.nodes():
        sources = node.all_input_nodes
        if info(node).phase is not Phase.FORWARD or not all(source in made_of for source in sources):
            continue
        read = {param for source in sources for param in made_of[source]}
        if _is_exacting(node, lower):
            found |= read
        if island(node, lower) is not lower:
            made_of[node] = read
    return found


def _is_exacting(node: fx.Node, lower: torch.dtype) -> bool:
    if is_complex(node):
        return True
    name = operator_name(node)
    if is_getitem(node) or is_view(node) or is_pointwise(node) or name in _MOVES:
        return False
    return name in EXACTING or island(node, lower) is None
