"""Operators and their arguments as Python source."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphshard.dataflow import arguments, is_getitem


def spell(value: Any, name: Callable[[fx.Node], str]) -> str:
    """``value`` as generated code writes it; ``name`` gives the variable of a node."""
    if isinstance(value, fx.Node):
        return name(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(spell(item, name) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def arguments_of(node: fx.Node, name: Callable[[fx.Node], str], change: Callable[[str, Any], Any] | None = None) -> str:
    """What ``node`` gives its operator; ``change`` gives another value for an argument, by its name."""
    given = [(key, value if change is None else change(key, value)) for key, value in arguments(node).items()]
    words = [spell(value, name) for _, value in given[: len(node.args)]]
    words += [f"{key}={spell(value, name)}" for key, value in given[len(node.args) :] if key != "pin_memory"]
    return ", ".join(words + (["device=device"] if _leaves_device_open(node) else []))


def call(node: fx.Node, name: Callable[[fx.Node], str], change: Callable[[str, Any], Any] | None = None) -> str:
    """``node`` as an expression: a call of its operator, with ``change`` as for :func:`arguments_of`, or a pick."""
    if is_getitem(node):
        return f"{name(node.all_input_nodes[0])}[{node.args[1]}]"
    return f"torch.ops.{node.target}({arguments_of(node, name, change)})"


@functools.cache
def out_variant(target: Any) -> tuple[str, str] | None:
    """The overload that writes the one result of ``target`` to a tensor that it is given, and what that argument is
    called; None if there is none, or only one that makes the result and copies it, which torch derives by itself."""
    if not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) != 1:
        return None
    given = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        other = getattr(target.overloadpacket, name)
        outs = [argument for argument in other._schema.arguments if argument.is_out]
        rest = [(argument.name, str(argument.type)) for argument in other._schema.arguments if not argument.is_out]
        if rest != given or len(outs) != 1:
            continue
        if other.has_kernel_for_dispatch_key("CPU") or other is torch.ops.aten.stack.out:  # written by hand, as cat's
            return str(other), outs[0].name
    return None


def _leaves_device_open(node: fx.Node) -> bool:
    """Whether ``node`` makes a tensor from numbers and does not say where; torch would make it on the CPU."""
    takes_device = any(argument.name == "device" for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return takes_device and "device" not in node.kwargs and not node.all_input_nodes
