"""Proves that an update, which may come before the end of the last backward, replaces nothing that is still read there.

It may write a parameter in place, under another name: what counts is storages.
"""

from __future__ import annotations

from graphshard.execution import ExecutionPlan, Op, Ref, match_waits, result_refs
from graphshard.prove.channels import Parties, reject

UPDATE = "epilogue"
"""The action of instructions that are not of the prologue or of a micro-batch."""


def check_update(plan: ExecutionPlan, stage: int, first: bool, name: str) -> None:
    """Check one step of a rank of ``stage``. ``name``: what messages call who runs it.

    Raises:
        PlanError: the work of a micro-batch reads what the update has begun to replace.
    """
    instructions = plan.stages[stage].step(first)
    storages, waits = plan.stages[stage].storages, match_waits(instructions)
    bound: dict[Ref, Ref] = {}  # second names to the storage

    def root(ref: Ref) -> Ref:
        return bound.get(ref) or (storages[ref.name].of(ref.microbatch) if ref.name in storages else ref)

    stored = {root(ref) for ref in result_refs(plan, stage)}
    replaced: dict[Ref, int] = {}
    for position, ins in enumerate(instructions):
        start = instructions[waits[position]] if position in waits else ins  # until then it is read
        if start.action != UPDATE and ins.op is not Op.FREE:
            for ref in start.inputs:
                if root(ref) in replaced:
                    rule = f"{ref} is read by {start.action} although the update has begun to replace it"
                    reject(rule, Parties([instructions], [name]), [(0, replaced[root(ref)]), (0, position)])
        elif ins.action == UPDATE and ins.op in (Op.RUN, Op.OFFLOAD, Op.BIND):
            written = (root(ref) for ref in ins.outputs)
            replaced |= {ref: position for ref in written if ref in stored and ref not in replaced}
        if ins.op is Op.BIND:
            bound |= {to: root(ref) for ref, to in zip(ins.inputs, ins.outputs, strict=True)}
