"""Arguments of operators as Python source."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx


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


def arguments_of(node: fx.Node, name: Callable[[fx.Node], str]) -> list[str]:
    """What ``node`` gives its operator."""
    words = [spell(value, name) for value in node.args]
    words += [f"{key}={spell(value, name)}" for key, value in node.kwargs.items() if key != "pin_memory"]
    return words + (["device=device"] if _leaves_device_open(node) else [])


def _leaves_device_open(node: fx.Node) -> bool:
    """Whether ``node`` makes a tensor from numbers and does not say where; torch would make it on the CPU."""
    takes_device = any(argument.name == "device" for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return takes_device and "device" not in node.kwargs and not node.all_input_nodes
