"""Which forward operations belong together: the blocks of a model, between which activations are kept.

A block is what a repeated module does: the path up to its first index, ``h.3`` of ``h.3.attn.proj``, if there are
modules inside it. Operations elsewhere belong to the module that holds theirs. A run of n blocks that are single layers
is joined into about √n blocks, as in Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

from torch import fx

from graphshard.analysis import weight_views
from graphshard.dataflow import is_getitem, is_view
from graphshard.program import Phase, Program, info


def block_path(path: str) -> str:
    """The path up to its first index; "" if it has none."""
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: index + 1]) if index is not None else ""


def blocks(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Each of the operations ``nodes``, which are in order, to the number of its block; numbers are in order too."""
    holder: dict[fx.Node, str] = {}
    paths: dict[str, set[str]] = {}
    for node in nodes:
        path = info(node).module
        holder[node] = block_path(path) or path.rpartition(".")[0] or path
        paths.setdefault(holder[node], set()).add(path)
    number: dict[str, int] = {}
    count = 0
    for single, run in groupby(paths, key=lambda name: paths[name] <= {name}):
        names = list(run)
        size = math.ceil(len(names) / math.ceil(math.sqrt(len(names)))) if single else 1
        number |= {name: count + index // size for index, name in enumerate(names)}
        count = max(number.values()) + 1
    return {node: number[name] for node, name in holder.items()}


def forward_of(program: Program, stage: int | None) -> list[fx.Node]:
    """The forward operations of a stage, in order."""
    found = (node for node in program.body.nodes() if info(node).phase is Phase.FORWARD)
    return [node for node in found if info(node).stage == stage]


def stages_of(program: Program) -> list[int | None]:
    """What ``info(node).stage`` is of the stages' operations."""
    found = {info(node).stage for node in program.body.nodes() if info(node).phase is Phase.FORWARD}
    return sorted(found, key=lambda stage: -1 if stage is None else stage)


def shows_another(node: fx.Node) -> bool:
    """Whether the value lives in the storage of another one."""
    return is_view(node) or (is_getitem(node) and is_view(node.all_input_nodes[0]))


def root(node: fx.Node) -> fx.Node:
    """The value whose storage ``node`` shows."""
    while node.op == "call_function" and shows_another(node):
        node = node.all_input_nodes[0]
    return node


def boundaries(program: Program, block_of: dict[fx.Node, int]) -> set[fx.Node]:
    """Values that one block makes and another reads in the forward, with those whose storage they show."""
    free = weight_views(program.body)
    found: set[fx.Node] = set()
    for node, block in block_of.items():
        if node in free:
            continue
        if any(block_of.get(user, block) != block for user in node.users):
            found |= {node, root(node)}
    return found
