"""Where in a step each stored value is begun to be replaced: a step that fails before leaves it as it was."""

from __future__ import annotations

from graphshard.execution import ExecutionPlan, Op, Ref, read_refs, result_refs
from graphshard.program import Role


def replaced_at(plan: ExecutionPlan, stage: int, first: bool) -> dict[Ref, int]:
    """The position of the first instruction that may write to the value, in a step of ``stage``; by storage, as a
    segment may write in place, under another name."""
    bound: dict[Ref, Ref] = {}  # second names to the storage

    def root(ref: Ref) -> Ref:
        own = _storage(plan, stage, ref)
        return bound.get(ref) or bound.get(own, own)

    stored = {ref: root(ref) for ref in result_refs(plan, stage)}
    new = set(stored)
    for ins in reversed(plan.stages[stage].step(first)):
        if ins.op is Op.BIND:
            new |= {source for source, target in zip(ins.inputs, ins.outputs, strict=True) if target in new}
    written: dict[Ref, int] = {}
    for position, ins in enumerate(plan.stages[stage].step(first)):
        if ins.op is Op.BIND:  # the name stands for another value, whose storage is not written to
            bound |= {to: root(ref) for ref, to in zip(ins.inputs, ins.outputs, strict=True)}
            touched = set(ins.outputs)
        else:
            for ref in ins.outputs:
                bound.pop(ref, None)
            reduced = ins.last if ins.op is Op.REDUCE else ()  # what is handed over is reduced in place
            # What a segment leaves of a stored value beside the new one is a view of it.
            shown = [ref for ref in ins.outputs if ins.op is not Op.RUN or ref in new]
            touched = {*ins.outputs, *(name for ref in (*shown, *reduced) for name in (ref, root(ref)))}
        for name in touched:
            written.setdefault(name, position)
    never = len(plan.stages[stage].step(first))
    return {ref: min(written.get(ref, never), written.get(own, never)) for ref, own in stored.items()}


def kept_at(plan: ExecutionPlan, stage: int, first: bool) -> dict[Ref, int]:
    """Of the parts of parameters that a rank of ``stage`` stores, those that lie where they did when a training step
    ends, be it the first or a later one: the position of the first instruction that writes to them, behind the last one
    if none does."""
    shards = [ref for ref, (slot, _) in read_refs(plan, stage, first).items() if slot.role is Role.SHARD]
    shards = [ref for ref in shards if ref not in plan.stages[stage].homes]
    replaced = replaced_at(plan, stage, first)
    if not any(ref in replaced for ref in shards):  # an evaluation: where training leaves them nobody knows
        return {}
    moved = set[Ref]()
    for step in map(plan.stages[stage].step, (False, True)):
        bound = {to: ref for ins in step if ins.op is Op.BIND for ref, to in zip(ins.inputs, ins.outputs, strict=True)}
        moved |= {ref for ref in shards if _storage(plan, stage, bound.get(ref, ref)) != ref}
    return {ref: replaced.get(ref, len(plan.stages[stage].step(first))) for ref in shards if ref not in moved}


def _storage(plan: ExecutionPlan, stage: int, ref: Ref) -> Ref:
    storages = plan.stages[stage].storages
    return storages[ref.name].of(ref.microbatch) if ref.name in storages else ref
