"""Which results of a region take the place of a value that nobody reads after it."""

from __future__ import annotations

import torch
from torch import fx

from graphshard.communication import communicates
from graphshard.dataflow import is_getitem, is_view
from graphshard.homes import replaced_slots, stored_slot
from graphshard.program import Phase, Role, Section, info, val
from graphshard.region import is_region, results_of

_STORES = (Role.FLAT, Role.SHARD, Role.MASTER, Role.STATE, Role.CARRY)


def dying(region: fx.Node, section: Section) -> dict[int, fx.Node]:
    """Operands, by position, whose storage is free once the region has run."""
    return {
        position: source
        for position, source in enumerate(region.all_input_nodes)
        if _owns_storage(source, section, region) and all(_over(u, region) for u in source.users)
    }


def _over(user: fx.Node, region: fx.Node) -> bool:
    """Whether ``user`` is the region, or has run before it and keeps nothing of what it read. In an update, order is
    code generation's to choose."""
    if user is region:
        return True
    if user.op != "call_function" or is_view(user) or is_getitem(user) or communicates(user):
        return False
    before, now = info(user).phase, info(region).phase
    return (before is Phase.FORWARD and now is not before) or (before is now is not Phase.UPDATE and user < region)


def overwritten(region: fx.Node, section: Section) -> dict[int, int]:
    """Positions of results to those of the operand whose storage they take: the old value of their slot, else one that
    dies with the region."""
    free, results = dying(region, section), results_of(region)
    slots = {slot: at for at, source in free.items() if (slot := stored_slot(section, source)) is not None}
    written = replaced_slots(section)
    found = {i: slots[written[node]] for i, node in results.items() if written.get(node) in slots}
    found = {index: at for index, at in found.items() if fits(results[index], free[at])}
    stored = {at for slot, at in slots.items() if slot.role is not Role.CARRY}
    left = [at for at in free if at not in found.values() and at not in stored]
    for index, node in results.items():
        old = next((at for at in left if fits(node, free[at])), None)
        if index not in found and old is not None:
            found[index] = old
            left.remove(old)
    return found


def fits(result: fx.Node, old: fx.Node) -> bool:
    """Whether ``result`` can lie where ``old`` does."""
    new, value = val(result), val(old)
    same = new.dtype == value.dtype and new.numel() == value.numel()
    return bool(same and new.is_contiguous() and value.is_contiguous())


def _owns_storage(node: fx.Node, section: Section, reader: fx.Node) -> bool:
    """A slot's value, reloaded or not, or what an operator made: not a view, nor what other ranks may read."""
    slot = stored_slot(section, node)
    if slot is not None:
        # What the prologue begins carries with may be one tensor for several.
        return slot.role in _STORES and (slot.role is not Role.CARRY or info(reader).phase is Phase.UPDATE)
    if is_getitem(node):
        return is_region(node.all_input_nodes[0])
    made = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    return is_region(node) or (made and not is_view(node))
