"""Later phases read a buffer as it was before their micro-batch's forward updated it.

On a pipeline the forwards of later micro-batches replace such a value before the backward of this one reads it. So a
later phase reads a copy that its own forward makes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphshard.dataflow import storage_root
from graphshard.program import NodeInfo, Phase, Role, Section, info
from graphshard.rewrite import after, call, clone

aten = torch.ops.aten

_BATCH_NORM_BACKWARD = aten.native_batch_norm_backward.default
_RUNNING, _TRAIN = (3, 4), 7  # positions of its arguments: mean and variance, and whether it reads none of them


def late_reads(body: Section) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Each read, in a later phase, of what the forward replaces: (what is replaced, it or a view of it, the reader)."""
    replaced = set(replaced_carries(body))
    if not replaced:
        return
    shown = [node for node in body.nodes() if _is_forward(node) and storage_root(node) in replaced]
    for node in [*replaced, *shown]:
        for user in list(node.users):
            if user.op != "output" and not _is_forward(user):
                yield storage_root(node), node, user


def replaced_carries(body: Section) -> dict[fx.Node, fx.Node]:
    """Each carry that the forward replaces, and by what."""
    olds = {slot: node for node, slot in body.inputs.items() if slot.role is Role.CARRY}
    news = {slot: node for slot, node in body.outputs.items() if slot in olds and node is not olds[slot]}
    return {olds[slot]: node for slot, node in news.items() if _is_forward(node)}


def keep_for_later(body: Section, made_by: str = "") -> None:
    """Have later phases read copies, made by the pass of that name, of what the forward replaces."""
    copies = _Copies(body, made_by)
    for old, shown, reader in list(late_reads(body)):
        if _reads_no_statistics(reader):
            reader.args = tuple(None if i in _RUNNING and a is shown else a for i, a in enumerate(reader.args))
        else:
            reader.replace_input_with(shown, copies.of(old, shown, info(reader).stage))


class _Copies:
    """One of each value and stage that reads it."""

    def __init__(self, body: Section, made_by: str) -> None:
        self._graph, self._made_by, self._replaced = body.graph, made_by, replaced_carries(body)
        self._made: dict[tuple[fx.Node, int | None], fx.Node] = {}

    def of(self, old: fx.Node, shown: fx.Node, stage: int | None) -> fx.Node:
        """What stands for ``shown``, which is ``old`` or a view of it."""
        if (shown, stage) not in self._made:
            if shown is old:
                record = NodeInfo(Phase.FORWARD, info(old).module, stage=stage, made_by=self._made_by)
                # Where the forward reads it first, or replaces it, so that it is made on that stage.
                readers = [user for user in old.users if user.op != "output" and _is_forward(user)]
                with self._graph.inserting_before(min(readers, default=self._replaced[old])):
                    made = call(self._graph, aten.clone.default, (old,), record)
            else:
                with after(shown):
                    made = clone(shown, lambda n: self.of(old, n, stage), stage=stage, origin="", made_by=self._made_by)
            self._made[shown, stage] = made
        return self._made[shown, stage]


def _is_forward(node: fx.Node) -> bool:
    return node.op == "placeholder" or info(node).phase is Phase.FORWARD


def _reads_no_statistics(node: fx.Node) -> bool:
    """The derivative of a batch norm in training, which is given running statistics and does not look at them."""
    return node.target is _BATCH_NORM_BACKWARD and node.args[_TRAIN] is True
