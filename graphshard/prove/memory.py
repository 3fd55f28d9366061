"""Proves what a plan says of memory: how much a rank holds at most, and that gathered parameters go when they can.

Sizes are those of storages, so that a view keeps all of what it views; what a segment takes while it runs is its own
account (execution.Workspace), which must at least cover what it leaves. A gathered parameter is released where it is
read last, by whatever name: work that comes in between would pay for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from graphshard.execution import (
    ExecutionPlan,
    Instruction,
    Op,
    Ref,
    StagePlan,
    Storage,
    Workspace,
    made_type,
    match_waits,
)
from graphshard.memory.simulate import simulate_memory
from graphshard.prove.channels import Parties, reject

_WORK = (Op.RUN, Op.GATHER, Op.RECV, Op.RELOAD)  # what takes memory of its own


def check_memory(plan: ExecutionPlan, stage: int, first: bool, name: str) -> None:
    """Check one step of a rank of ``stage``. ``name``: what messages call who runs it.

    Raises:
        PlanError: the broken rule, and the instructions around the spot.
    """
    instructions = plan.stages[stage].step(first)
    parties = Parties([instructions], [name])
    for position, ins in enumerate(instructions):
        wrong = _leaves_more(plan.stages[stage], ins) if ins.op is Op.RUN else _does_not_hold(plan, stage, ins)
        if wrong is not None:
            reject(wrong, parties, [(0, position)])
    _check_releases(plan.stages[stage].storages, parties)
    if plan.peak_bytes:
        use = simulate_memory(plan, stage, first)
        if use.peak_bytes > plan.peak_bytes[stage]:
            rule = f"{name} holds {use.peak_bytes} bytes, where the plan states {plan.peak_bytes[stage]} at most"
            reject(rule, parties, [(0, use.peak_position)])


def _does_not_hold(plan: ExecutionPlan, stage: int, ins: Instruction) -> str | None:
    """What is communicated fits the storage that is accounted for it."""
    if ins.type is None or not ins.outputs:
        return None
    storage = plan.stages[stage].storages.get(ins.outputs[0].name)
    needed = made_type(ins, ins.type, plan.mesh).nbytes
    if storage is None or storage.nbytes >= needed:
        return None
    return f"{ins.outputs[0]} takes {needed} bytes, and {storage.nbytes} are accounted for it"


def _leaves_more(stage: StagePlan, ins: Instruction) -> str | None:
    """What a segment leaves is part of what it holds, unless it lies in the storage of an input."""
    account = stage.segments[ins.name].workspace
    if account == Workspace():  # none is given
        return None
    if len(account.released) != len(ins.inputs):
        return f"segment {ins.name} reads {len(ins.inputs)} values, and its account has {len(account.released)}"
    kept = account.held[-1]
    inputs = {_storage(stage.storages, ref) for ref in ins.inputs}
    for ref, interval in zip(ins.inputs, account.released, strict=True):
        if interval == len(account.held) and ref.name in stage.storages:
            kept += stage.storages[ref.name].nbytes  # an output may have taken it over
    made = {
        _storage(stage.storages, ref): stage.storages[ref.name].nbytes
        for ref in ins.outputs
        if ref.name in stage.storages
    }
    left = sum(size for root, size in made.items() if root not in inputs)
    if left <= kept:
        return None
    return f"segment {ins.name} leaves {left} bytes, and {kept} are accounted for it"


def _storage(storages: Mapping[str, Storage], ref: Ref) -> Ref | None:
    storage = storages.get(ref.name)
    return None if storage is None else storage.of(ref.microbatch)


def _check_releases(storages: Mapping[str, Storage], parties: Parties) -> None:
    (instructions,) = parties.lists
    work = [0, *accumulate(ins.op in _WORK for ins in instructions)]  # how much of it there is before each position
    root_of: dict[Ref, Ref] = {}  # of names for gathered parameters: the storage
    names: Counter[Ref] = Counter()
    last_read: dict[Ref, int] = {}

    def forget(ref: Ref, position: int) -> None:
        root = root_of.pop(ref, None)
        if root is None:
            return
        names[root] -= 1
        read = last_read.get(root)
        if not names[root] and read is not None and work[position] > work[read + 1]:
            reject(f"{ref} is released later than where it is read last", parties, [(0, read), (0, position)])

    waits = match_waits(instructions)
    gathered: set[Ref] = set()
    for position, ins in enumerate(instructions):
        if position in waits and instructions[waits[position]].op is Op.OFFLOAD:
            for ref in instructions[waits[position]].inputs:
                if ref in root_of:  # until then it is read
                    last_read[root_of[ref]] = position
        if ins.op not in (Op.FREE, Op.WAIT):
            for ref in ins.inputs:
                if ref in root_of:
                    last_read[root_of[ref]] = position
        for ref in ins.last if ins.op is Op.RUN else ():
            forget(ref, position)
        for index, ref in enumerate(ins.outputs if ins.op is not Op.WAIT else ()):
            root = _storage(storages, ref) if ins.op is not Op.BIND else root_of.get(ins.inputs[index])
            forget(ref, position)
            if ins.op is Op.GATHER and root is not None:
                gathered.add(root)
                last_read[root] = position
            if root is not None and root in gathered:
                root_of[ref] = root
                names[root] += 1
        for ref in ins.inputs if ins.op is Op.FREE else ():
            forget(ref, position)
