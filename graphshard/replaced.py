"""Where in a step each stored value is begun to be replaced: a step that fails before leaves it as it was."""

from __future__ import annotations

from graphshard.execution import ExecutionPlan, Op, Ref, result_refs


def replaced_at(plan: ExecutionPlan, stage: int, first: bool) -> dict[Ref, int]:
    """The position of the first instruction that may write to the value, in a step of ``stage``; by storage, as a
    segment may write in place, under another name."""
    storages = plan.stages[stage].storages
    bound: dict[Ref, Ref] = {}  # second names to the storage

    def root(ref: Ref) -> Ref:
        own = storages[ref.name].of(ref.microbatch) if ref.name in storages else ref
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
