"""Compute again in the backward what memory-policy tagged, by copies of operations right before their first reader.

A copy reads kept values, other copies, parameters and the batch, and of a buffer that the forward updates what it was
(carried.py). Copies of reads of a parameter count as reads of the backward, so that ``zero`` gathers it there again.
Random operators draw by a key (random_ops.py) and repeat themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphshard.analysis import weight_views
from graphshard.carried import keep_for_later
from graphshard.pipeline import Context
from graphshard.program import Level, MemoryTag, Phase, Program, info
from graphshard.rewrite import clone


@dataclass(frozen=True)
class Recompute:
    """Duplicate tagged forward operations into the backward, once each, as far as the backward needs them."""

    name: ClassVar[str] = "recompute"
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is Level.SHARDED:
            return program
        # Reads of parameters come along untagged: no view or cast of a parameter is kept for the backward.
        again = {node for node in program.body.nodes() if info(node).tag is MemoryTag.RECOMPUTE}
        again |= {node for node in weight_views(program.body) if info(node).phase is Phase.FORWARD}
        copies: dict[fx.Node, fx.Node] = {}
        for reader in list(program.body.nodes()):
            if info(reader).phase is Phase.FORWARD:
                continue
            for source in _needed(reader, again):
                if source not in copies:
                    with reader.graph.inserting_before(reader):
                        copies[source] = _repeat(source, copies)
            for source in reader.all_input_nodes:
                if source in again:
                    reader.replace_input_with(source, copies[source])
        keep_for_later(program.body, self.name)
        return program


def _needed(reader: fx.Node, again: set[fx.Node]) -> list[fx.Node]:
    """What of ``again`` is between ``reader`` and values that are kept, in order."""
    found: set[fx.Node] = set()
    pending = [reader]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in again and source not in found:
                found.add(source)
                pending.append(source)
    return sorted(found)


def _repeat(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    # Copies may be read by weight actions: the backward comes before those on every stage.
    return clone(node, lambda source: copies.get(source, source), phase=Phase.BACKWARD, tag=None, made_by="recompute")
