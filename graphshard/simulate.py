"""What a plan holds in memory between instructions: they are run over sizes instead of tensors.

What lives only while a segment runs is left out, so that a rank takes more than this for a moment: a pointwise chain
over a large activation by a few times that activation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from graphshard.execution import ExecutionPlan, Op, Ref, read_refs


@dataclass(frozen=True)
class MemoryUse:
    """Live bytes of one rank's values; storages that several values share count once."""

    peak_bytes: int
    at_peak: dict[str, int]  # bytes by category at the peak
    peak_action: str  # the schedule's action in which it is reached
    peak_position: int  # the instruction of the step at which it is


def simulate_memory(plan: ExecutionPlan, stage: int, first: bool = False) -> MemoryUse:
    """The peak of one step of a rank of ``stage`` between instructions; ``first``: of the first step, which finds no
    optimizer state.

    What lives only while a segment runs, its handed-over inputs included, is not counted: executors don't measure it.
    """
    storages = plan.stages[stage].storages
    root_of: dict[Ref, Ref] = {}  # value to the storage it lives in
    users: Counter[Ref] = Counter()
    sizes: dict[Ref, tuple[int, str]] = {}
    live: Counter[str] = Counter()
    peak, at_peak, where, position = 0, dict[str, int](), "", 0

    def define(ref: Ref, root: Ref | None = None) -> None:
        forget(ref)
        storage = storages.get(ref.name)
        if root is None:
            if storage is None:
                return
            root = storage.of(ref.microbatch)
        if not users[root]:
            sizes[root] = (
                (storage.nbytes, storage.category) if storage is not None else sizes.get(root, (0, "workspace"))
            )
            live[sizes[root][1]] += sizes[root][0]
        users[root] += 1
        root_of[ref] = root

    def forget(ref: Ref) -> None:
        root = root_of.pop(ref, None)
        if root is None:
            return
        users[root] -= 1
        if not users[root]:
            live[sizes[root][1]] -= sizes[root][0]

    for ref in read_refs(plan, stage, first):
        define(ref)
    for at, ins in enumerate(plan.stages[stage].step(first)):
        if ins.op is Op.BIND:
            roots = [root_of.get(ref) for ref in ins.inputs]
            for ref, root in zip(ins.outputs, roots, strict=True):
                if root is not None:
                    define(ref, root)
        elif ins.op is not Op.WAIT:
            for ref in ins.last if ins.op is Op.RUN else ():
                forget(ref)
            for ref in ins.outputs:
                define(ref)
        total = sum(live.values())
        if total > peak:
            peak, at_peak, where, position = total, {k: n for k, n in live.items() if n}, ins.action, at
        for ref in ins.inputs if ins.op is Op.FREE else ins.last:
            forget(ref)
    return MemoryUse(peak, at_peak, where, position)
