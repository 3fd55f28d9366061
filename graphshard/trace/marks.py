"""How nodes of the joint graph are marked with where they come from."""

from __future__ import annotations

from torch import fx

from graphshard.trace.errors import Line, describe

MODULE, LINE = "graphshard.module", "graphshard.line"
"""Keys of ``node.meta["custom"]`` in the joint graph: the module's path, and the user's (file, line)."""


def module_of(node: fx.Node) -> str:
    """The path of the module in whose call it was made."""
    path: str = node.meta.get("custom", {}).get(MODULE, "")
    return path


def line_of(node: fx.Node) -> Line | None:
    """The line that made it."""
    line: Line | None = node.meta.get("custom", {}).get(LINE)
    return line


def where(node: fx.Node) -> str:
    """That line for a message, or the module."""
    return describe(line_of(node), module_of(node))
