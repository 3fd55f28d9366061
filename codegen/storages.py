"""Which memory the values of a graph live in, and what it is for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx

from graphshard.dataflow import storage_root
from graphshard.execution import OFFLOADED
from graphshard.homes import before_moves, home_of
from graphshard.program import Phase, Role, Section, info

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

_CARRIED = {
    "grad": "gradients",
    "whole": "gathered parameters",
    "buffer": "parameters",
}  # by the first word of a carry's name
_STORED = {
    Role.PARAM: "parameters",
    Role.FLAT: "parameters",
    Role.SHARD: "parameters",
    Role.BUFFER: "parameters",
    Role.CONSTANT: "parameters",
    Role.MASTER: "optimizer state",
    Role.STATE: "optimizer state",
    Role.SCALER: "optimizer state",
    Role.BATCH: "batch",
    Role.RNG: "batch",
    Role.LR: "batch",
}


def saved_roots(nodes: Collection[fx.Node], reused: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Storages that the forward makes and the backward reads, for ``nodes`` of one stage."""
    mine = set(nodes)
    readers = (Phase.BACKWARD, Phase.WEIGHT)
    return {
        storage_root(node, reused)
        for node in nodes
        if info(node).phase is Phase.FORWARD and any(u in mine and info(u).phase in readers for u in node.users)
    }


def category(root: fx.Node, section: Section, saved: Collection[fx.Node]) -> str:
    """What the storage that ``root`` makes is for: one of execution.CATEGORIES, or where it is kept instead of the
    device."""
    if home := home_of(root):
        return OFFLOADED + home
    root = before_moves(root)
    slot = section.inputs.get(root)
    if slot is None and root in section.outputs.values():
        slot = next(s for s, n in section.outputs.items() if n is root)
    if slot is not None and slot.role is Role.CARRY:
        return _CARRIED.get(slot.name.partition(":")[0], "workspace")
    if slot is not None and slot.role in _STORED:
        return _STORED[slot.role]
    if root.target is c10d.all_gather_into_tensor.default:
        return "gathered parameters"
    if root.target in (gs.pack.default, c10d.reduce_scatter_tensor.default, c10d.all_reduce.default):
        return "gradients"
    if root in saved:
        return "saved activations"
    return "transfers" if root.target is gs.transfer.default else "workspace"
