"""What a plan holds in memory, instruction by instruction: it is run over sizes instead of tensors.

Counted by storage: what values of a rank live in, what a segment makes while it runs (:class:`Workspace`), and the
buffers of a communication from its start to its WAIT. Left out is what an operator or a communication library takes
for itself, and what is not on the device: see offloaded.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from graphshard.execution import (
    OFFLOADED,
    ExecutionPlan,
    Instruction,
    Op,
    Ref,
    Segment,
    match_waits,
    read_refs,
    result_refs,
)
from graphshard.program import Role

_IN_PLACE = ("all_reduce", "broadcast")  # a source that is handed over becomes the result


@dataclass(frozen=True)
class MemoryUse:
    """Live bytes of one rank's values; storages that several values share count once. What is offloaded has categories
    of its own, which the peak leaves out."""

    peak_bytes: int
    at_peak: dict[str, int]  # bytes by category at the peak
    peak_action: str  # the schedule's action in which it is reached
    peak_position: int  # the instruction of the step at which it is


def simulate_memory(plan: ExecutionPlan, stage: int, first: bool = False) -> MemoryUse:
    """The peak of one step of a rank of ``stage``; ``first``: of the first step, which finds no optimizer state."""
    peak, at_peak, where = -1, dict[str, int](), 0
    for position, held in enumerate(simulated(plan, stage, first)):
        total = sum(held.values())
        if total > peak:
            peak, at_peak, where = total, {name: n for name, n in held.items() if n}, position
    instructions = plan.stages[stage].step(first)
    return MemoryUse(max(peak, 0), at_peak, instructions[where].action if instructions else "", where)


def simulated(plan: ExecutionPlan, stage: int, first: bool = False) -> Iterator[dict[str, int]]:
    """For each instruction of a step of a rank of ``stage``, bytes by category when it holds most."""
    memory = _Memory(plan, stage, first)
    instructions = plan.stages[stage].step(first)
    waits = match_waits(instructions)
    awaited = set(waits.values())
    segments = plan.stages[stage].segments
    in_flight: dict[int, list[Ref]] = {}  # storages that a communication reads or writes, by its position
    for position, ins in enumerate(instructions):
        if ins.op is Op.RUN:
            yield memory.run(ins, segments[ins.name])
            continue
        if ins.op not in (Op.BIND, Op.FREE, Op.WAIT):
            in_flight[position] = memory.start(ins, position in awaited)
        yield memory.now()
        match ins.op:
            case Op.FREE:
                memory.forget(ins.inputs)
            case Op.WAIT:
                memory.release(in_flight.pop(waits.get(position, -1), ()))
            case Op.BIND:
                memory.bind(ins)
        memory.forget(ins.last)


class _Memory:
    """The values of one rank, and the storages they live in."""

    def __init__(self, plan: ExecutionPlan, stage: int, first: bool) -> None:
        self._storages = plan.stages[stage].storages
        self._root_of: dict[Ref, Ref] = {}  # value to the storage it lives in
        self._users: Counter[Ref] = Counter()
        self._sizes: dict[Ref, tuple[int, str]] = {}
        self._live: dict[str, int] = {}
        results = result_refs(plan, stage)
        for ref, (slot, _) in read_refs(plan, stage, first).items():
            self._define(ref)
            replaced = ref in results or slot.role in (Role.BATCH, Role.RNG, Role.LR)
            if not replaced and ref in self._root_of:
                self._users[self._root_of[ref]] += 1  # the store keeps it, whatever the step does

    def now(self) -> dict[str, int]:
        """Bytes by category."""
        return dict(self._live)

    def run(self, ins: Instruction, segment: Segment) -> dict[str, int]:
        """Run a segment; bytes by category at its peak."""
        before = dict(self._live)
        held, released = segment.workspace.held, segment.workspace.released
        ends: dict[Ref, int] = {}  # storages that the segment reads to the interval they are needed in
        for ref, interval in zip(ins.inputs, released, strict=bool(released)):
            root = self._root_of.get(ref)
            if root is not None:
                ends[root] = max(ends.get(root, 0), interval)
        shown = {ref: self._shown(ref) for ref in ins.outputs}
        self.forget(ins.last)
        going: dict[int, list[Ref]] = {}
        for root, interval in ends.items():
            if interval < len(held) and not self._users[root]:
                going.setdefault(interval, []).append(root)
        peak, at_peak, gone = held[0], 0, 0
        for interval in range(1, len(held)):
            gone += sum(self._sizes[root][0] for root in going.get(interval - 1, ()))
            if held[interval] - gone > peak:
                peak, at_peak = held[interval] - gone, interval
        for interval in range(at_peak):
            for root in going.get(interval, ()):
                size, category = self._sizes[root]
                before[category] -= size
        before["workspace"] = before.get("workspace", 0) + held[at_peak]
        for ref in ins.outputs:
            self._define(ref, shown[ref])
        return before

    def _shown(self, ref: Ref) -> Ref | None:
        """The storage that a view of a value lives in where that value has been given another one, by a BIND."""
        own = self._own(ref)
        return self._root_of.get(own) if own is not None and own != ref else None

    def _own(self, ref: Ref) -> Ref | None:
        """The storage that the plan gives a value; None: it is not on the device."""
        storage = self._storages.get(ref.name)
        if storage is None or storage.category.startswith(OFFLOADED):
            return None
        return storage.of(ref.microbatch)

    def bind(self, ins: Instruction) -> None:
        """Give values second names."""
        roots = [self._root_of.get(ref) for ref in ins.inputs]
        for ref, root in zip(ins.outputs, roots, strict=True):
            if root is not None:
                self._define(ref, root)

    def start(self, ins: Instruction, awaited: bool) -> list[Ref]:
        """Start a communication; the storages to hold until its WAIT, none if nobody waits."""
        source = self._root_of.get(ins.inputs[0]) if ins.inputs else None
        in_place = ins.name in _IN_PLACE and source is not None and ins.inputs[0] in ins.last
        for ref in ins.outputs:
            self._define(ref, source if in_place else None)
        touched = [source] if source is not None else []
        touched += [self._root_of[ref] for ref in ins.outputs if ref in self._root_of]
        if not awaited:
            return []
        for root in touched:
            self._users[root] += 1
        return touched

    def forget(self, refs: Collection[Ref]) -> None:
        """Values lose their names."""
        for ref in refs:
            root = self._root_of.pop(ref, None)
            if root is not None:
                self.release((root,))

    def release(self, roots: Collection[Ref]) -> None:
        """Storages lose one user each."""
        for root in roots:
            self._users[root] -= 1
            if not self._users[root]:
                size, category = self._sizes[root]
                self._live[category] -= size

    def _define(self, ref: Ref, root: Ref | None = None) -> None:
        """``ref`` is made: in storage of its own, or in that of ``root``."""
        own = self._own(ref)
        root = root or own
        if root is None:
            self.forget((ref,))
            return
        self._users[root] += 1  # before the old value goes: it may be the same storage
        old = self._root_of.pop(ref, None)
        if self._users[root] == 1:
            if root == own:
                storage = self._storages[ref.name]
                self._sizes[root] = storage.nbytes, storage.category
            size, category = self._sizes[root]
            self._live[category] = self._live.get(category, 0) + size
        self._root_of[ref] = root
        if old is not None:
            self.release((old,))
