"""Gradients are summed up over micro-batches in the carry itself, whichever segment makes a part of them.

A product that is added to what is there is rounded once, with it. Were it rounded before that wherever a move or a
collective lies between it and its pack, plans would train differently in their last bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphshard.program import Section, Slot, val
from graphshard.rewrite import list_arg

aten = torch.ops.aten
gs = torch.ops.graphshard


@dataclass
class Sums:
    """What a section accumulates into carries that start at zero.

    ``slots``: the ``add(carry, value)`` nodes that update their carry in place. ``ahead``: by a part of what such a
    node adds, the carry that it is written into before the segment of that node runs. ``begun``: carries that hold
    parts of this micro-batch when the next segment to be emitted runs.
    """

    slots: dict[fx.Node, Slot] = field(default_factory=dict)
    ahead: dict[fx.Node, fx.Node] = field(default_factory=dict)
    begun: set[fx.Node] = field(default_factory=set)

    def begins(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The carries that a segment of ``nodes`` writes parts into, for the segments behind it."""
        return list(dict.fromkeys(self.ahead[node] for node in nodes if node in self.ahead))


def sums_of(section: Section, accumulators: Collection[Slot], runs: Sequence[Sequence[fx.Node]], on_gpu: bool) -> Sums:
    """The sums of ``section``, whose segments are ``runs``, in the order in which they run."""
    slots = _updates(section, accumulators)
    at = {node: index for index, nodes in enumerate(runs) for node in nodes}
    ahead: dict[fx.Node, fx.Node] = {}
    for node in filter(at.__contains__, slots):  # of one stage, as the segments are
        carry, value = node.all_input_nodes
        if value.target is not gs.pack.default or len(value.users) > 1 or at.get(value) != at[node]:
            continue
        early = [part for part in list_arg(value, 0) if at.get(part, at[node]) < at[node]]
        ahead |= dict.fromkeys((part for part in early if placeable(part, on_gpu)), carry)
    return Sums(slots, ahead)


def _updates(section: Section, accumulators: Collection[Slot]) -> dict[fx.Node, Slot]:
    found: dict[fx.Node, Slot] = {}
    for slot in accumulators:
        carry, node = section.input_slots.get(slot), section.outputs.get(slot)
        if node is None or node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
            continue
        if node.all_input_nodes[0] is carry and len(carry.users) == 1:
            found[node] = slot
    return found


def placeable(part: fx.Node, on_gpu: bool) -> bool:
    """Whether a part of a pack can be written, or added, straight into the pack's buffer, which is all it is for: a
    product, and where no GPU computes an embedding's gradient."""
    makes = part.target is aten.mm.default or (adds_rows(part) and not on_gpu)
    return makes and len(part.users) == 1


def adds_rows(node: fx.Node) -> bool:
    """Whether the node adds the rows of its operand up in rows of its result. Low precision rounds a sum once."""
    if node.target is not aten.embedding_dense_backward.default or node.args[4]:
        return False
    return val(node).dtype in (torch.float32, torch.float64) and len(val(node).shape) == 2
