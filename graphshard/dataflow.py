"""Questions about a graph's structure: what depends on what, and which operators are views or pointwise."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

import graphshard.ops  # noqa: F401  defines the graphshard operators

aten = torch.ops.aten
gs = torch.ops.graphshard

_POOLED = (gs.sq_norm.default, gs.nonfinite.default)

_POINTWISE_UNTAGGED = {
    aten.clone.default,
    aten.copy.default,
    aten._to_copy.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.hardswish.default,
    aten.hardswish_backward.default,
}

_UNDECLARED_VIEWS = (aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default)
"""Views that hide it from autograd: their schemas say nothing of it."""


COMPLEX_PARTS = (aten.view_as_real.default, aten.view_as_complex.default)
"""Views of complex elements as two real ones each, and back."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the same element of the inputs alone (scalars broadcast)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target in _POINTWISE_UNTAGGED


def is_pooled(node: fx.Node) -> bool:
    """Whether the node is a sum over all of its inputs' elements: that of shards, or of the parameters of a stage, is
    part of it, and parts are added."""
    return node.target in _POOLED


def is_view(node: fx.Node) -> bool:
    """Whether the result shares storage with an input."""
    return isinstance(node.target, torch._ops.OpOverload) and _shows(node.target)


@functools.cache
def _shows(target: torch._ops.OpOverload) -> bool:
    infos = (argument.alias_info for argument in target._schema.arguments)
    return target in _UNDECLARED_VIEWS or any(info is not None and not info.is_write for info in infos)


def is_getitem(node: fx.Node) -> bool:
    """Whether the node picks one result of an operator with several."""
    return node.target is operator.getitem


def owns_memory(node: fx.Node) -> bool:
    """Whether the value is an operation's own result, not an input or a view."""
    producer: Any = node.args[0] if is_getitem(node) else node
    return producer.op == "call_function" and not is_view(producer)


def resolve(node: fx.Node) -> fx.Node:
    """A wait gives the collective's own buffer."""
    return node.args[0] if node.target is torch.ops._c10d_functional.wait_tensor.default else node  # type: ignore[return-value]


def storage_source(node: fx.Node) -> fx.Node | None:
    """The node whose storage the value lives in: what a view, or one of several views, is of, and what a wait waits
    for; None: the value has storage of its own."""
    if is_getitem(node):
        source = node.all_input_nodes[0]
        return source.all_input_nodes[0] if is_view(source) else None
    if is_view(node) or node.target is torch.ops._c10d_functional.wait_tensor.default:
        return node.all_input_nodes[0]
    return None


def storage_root(node: fx.Node, reused: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
    """The node whose storage ``node`` shares, through views, waits and results written in place (``reused``)."""
    known = reused or {}
    while (source := known.get(node) or storage_source(node)) is not None:
        node = source
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments given, by the names that the operator has for them."""
    target = node.target
    names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    positional = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(node.args)}
    return positional | node.kwargs


def has_floats(node: fx.Node) -> bool:
    """Whether the value is one tensor that can hold NaN or infinity."""
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def downstream(
    nodes: Iterable[fx.Node], stop: Callable[[fx.Node], bool] | None = None, include_stop: bool = False
) -> list[fx.Node]:
    """Operations that depend on any of ``nodes``, in graph order; the search does not go through a ``stop`` node."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        for user in pending.pop().users:
            if user.op != "call_function" or user in found:
                continue
            if stop is not None and stop(user):
                if include_stop:
                    found.add(user)
                continue
            found.add(user)
            pending.append(user)
    return sorted(found)


def upstream(nodes: Iterable[fx.Node], stop: Callable[[fx.Node], bool] | None = None) -> set[fx.Node]:
    """``nodes`` and what they depend on, placeholders included; the search does not go through a ``stop`` node."""
    found = set(nodes)
    pending = list(found)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and not (stop is not None and stop(source)):
                found.add(source)
                pending.append(source)
    return found
