"""Proves an execution plan before anything runs it: every value is there when it is read, no rank waits for ever.

The channel model: starting a communication never blocks. Each directed pair of stages is a FIFO without capacity: the
k-th send from s to t completes when the k-th receive at t from s is issued, and the other way round. A collective
completes when all ranks of its group have issued it. WAIT blocks until then.

One rank per stage stands for all its data-parallel peers. They run the same list, transfers join ranks of equal
data-parallel coordinates, and a data-parallel group lies within one stage. So if the representatives finish, all ranks
do when peers move in lockstep: a data-parallel collective is then issued by all its members at once. And a rank that
can go on stays able to whatever the others do, so that if one order of moves finishes, every order does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from graphshard.execution import (
    MOVES,
    ExecutionPlan,
    Instruction,
    Op,
    Ref,
    Segment,
    TensorType,
    made_type,
    match_waits,
    read_refs,
    result_refs,
    slot_ref,
    variants,
)
from graphshard.mesh import AXES
from graphshard.plan_options import PLACES
from graphshard.program import HOST, Role
from graphshard.prove.channels import (
    Parties,
    between_stages,
    check_collectives,
    check_progress,
    check_transfers,
    of_stages,
    reject,
)
from graphshard.prove.memory import check_memory
from graphshard.prove.update import check_update

_COMMUNICATION = (Op.GATHER, Op.REDUCE, Op.SEND, Op.RECV, *MOVES)


def prove(plan: ExecutionPlan) -> None:
    """Check the plan of every rank, for the first step and for the later ones, in time linear in the instructions.

    Raises:
        PlanError: the broken rule, and for each stage involved the instructions around the spot.
    """
    for first in variants(plan):
        lists = [stage.step(first) for stage in plan.stages]
        waits = [match_waits(instructions) for instructions in lists]
        for stage, instructions in enumerate(lists):
            _Values(plan, stage, first, f"stage {stage}", instructions, waits[stage]).check()
        pipeline = of_stages(lists)
        check_transfers(pipeline)
        check_collectives(pipeline, "pp", "over the stages")
        check_progress(pipeline, waits, between_stages(len(lists)))
        for stage, name in enumerate(pipeline.names):
            check_memory(plan, stage, first, name)
            check_update(plan, stage, first, name)


def check_values(plan: ExecutionPlan, stage: int, first: bool, name: str) -> None:
    """Every value of ``stage`` is there when it is read, and gone or a result at the end. ``name``: what messages call
    who runs it.

    Raises:
        PlanError: the broken rule.
    """
    instructions = plan.stages[stage].step(first)
    _Values(plan, stage, first, name, instructions, match_waits(instructions)).check()


def dense(kind: TensorType) -> bool:
    """Whether the elements fill a span of memory, each once: what can be sent as one run of bytes."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(kind.shape, kind.stride, strict=True) if n != 1):
        if stride != expected and kind.numel:
            return False
        expected *= size
    return True


@dataclass
class _Values:
    """The life of every value on one stage: defined, in flight, used, gone."""

    plan: ExecutionPlan
    stage: int
    first: bool
    name: str
    instructions: tuple[Instruction, ...]
    waits: dict[int, int]
    types: dict[Ref, TensorType | None] = field(default_factory=dict)  # live values; None: type unknown
    gone: dict[Ref, str] = field(default_factory=dict)
    arriving: set[Ref] = field(default_factory=set)  # made by a communication that is not complete
    busy: dict[Ref, int] = field(default_factory=dict)  # read by how many communications that are not complete
    away: dict[Ref, str] = field(default_factory=dict)  # what is not on the device, and where it is

    @property
    def _segments(self) -> Mapping[str, Segment]:
        return self.plan.stages[self.stage].segments

    def check(self) -> None:
        reads = read_refs(self.plan, self.stage, self.first)
        self.types = {ref: kind for ref, (_, kind) in reads.items()}
        self.away = {ref: home for ref, home in self.plan.stages[self.stage].homes.items() if ref in reads}
        for position, ins in enumerate(self.instructions):
            self._instruction(position, ins)
        self._end(set(reads))

    def _fail(self, rule: str, position: int) -> NoReturn:
        reject(rule, Parties([self.instructions], [self.name]), [(0, position)])

    def _instruction(self, position: int, ins: Instruction) -> None:
        if ins.op in _COMMUNICATION:
            self._well_formed(position, ins)
        if ins.op is Op.WAIT:
            self._wait(position, ins)
            return
        if ins.op is Op.FREE:
            for ref in ins.inputs:
                self._release(position, ref, f"freed at {position}")
            return
        for ref in ins.inputs:
            self._read(position, ref)
            self._at_home(position, ins, ref)
        if ins.op is Op.RUN:
            self._runs(position, ins)
        if ins.op in (Op.GATHER, Op.REDUCE, Op.SEND, *MOVES):
            for ref in ins.inputs:
                self._same_type(position, ref, ins.type)
        sources = [(self.types[ref], self.away.get(ref, "")) for ref in ins.inputs]
        for ref in ins.last:
            if ref not in ins.inputs:
                self._fail(f"{ref} is handed over by an instruction that does not read it", position)
            self._release(position, ref, f"handed over at {position}")
        if ins.op in (Op.GATHER, Op.REDUCE, Op.SEND, *MOVES):
            for ref in ins.inputs:
                if ref not in ins.last:
                    self.busy[ref] = self.busy.get(ref, 0) + 1
        if ins.op is Op.BIND and len(ins.inputs) != len(ins.outputs):
            self._fail(f"BIND gives {len(ins.inputs)} values {len(ins.outputs)} names", position)
        for index, ref in enumerate(ins.outputs):
            here = "cpu" if ins.device == HOST else ""
            kind, home = sources[index] if ins.op is Op.BIND else (self._made(ins, index), here)
            self._define(position, ins, ref, kind, ins.name if ins.op is Op.OFFLOAD else home)
        if ins.op in (Op.GATHER, Op.REDUCE, Op.RECV, *MOVES):
            self.arriving.update(ins.outputs)

    def _well_formed(self, position: int, ins: Instruction) -> None:
        expected = {Op.SEND: (1, 0), Op.RECV: (0, 1)}.get(ins.op, (1, 1))
        given = (len(ins.inputs), len(ins.outputs))
        if given != expected and not (ins.name == "broadcast" and given == (0, 1)):
            self._fail(f"{ins.op} has {given[0]} inputs and {given[1]} outputs instead of {expected}", position)
        if ins.type is None:
            self._fail(f"{ins.op} does not say what type it transfers", position)
        if ins.op in (Op.SEND, Op.RECV):
            if ins.peer is None or not 0 <= ins.peer < len(self.plan.stages) or ins.peer == self.stage:
                self._fail(f"{ins.op} names stage {ins.peer}, which is not another stage of the plan", position)
            if not dense(ins.type):
                self._fail(f"{ins.op} transfers strides {ins.type.stride}, which leave holes in memory", position)
            return
        if ins.op in MOVES:
            if ins.name not in PLACES:
                self._fail(f"{ins.op} names {ins.name!r}, which is no place; it can be {', '.join(PLACES)}", position)
            return
        if ins.axis not in AXES:
            self._fail(f"{ins.op} is over axis {ins.axis!r}; axes are {', '.join(AXES)}", position)
        size = self.plan.mesh.size(ins.axis)
        names = ("all_gather",) if ins.op is Op.GATHER else ("reduce_scatter", "all_reduce", "broadcast")
        if ins.name not in names:
            self._fail(f"{ins.op} is called {ins.name!r}; it can be {', '.join(names)}", position)
        if ins.name == "reduce_scatter" and (not ins.type.shape or ins.type.shape[0] % size):
            self._fail(f"{ins.type} cannot be scattered evenly over {size} ranks", position)
        if ins.name == "all_gather" and not ins.type.shape:
            self._fail("a scalar cannot be gathered along a dim", position)
        if ins.name == "broadcast" and (ins.peer is None or not 0 <= ins.peer < size):
            self._fail(f"a broadcast over {size} ranks cannot come from {ins.peer}", position)

    def _runs(self, position: int, ins: Instruction) -> None:
        """The segment is there, and takes and gives as many values as the instruction, of their types."""
        segment = self._segments.get(ins.name)
        if segment is None:
            self._fail(f"segment {ins.name!r} is not part of the plan", position)
        for what, refs, names in (("reads", ins.inputs, segment.inputs), ("makes", ins.outputs, segment.outputs)):
            if len(refs) != len(names):
                self._fail(f"segment {ins.name!r} {what} {len(names)} values, not {len(refs)}", position)
        for ref, expected in zip(ins.inputs, segment.input_types, strict=False):
            known = self.types[ref]
            if known is not None and (known.shape, known.dtype) != (expected.shape, expected.dtype):
                self._fail(f"{ref} is {known}, but segment {ins.name!r} takes {expected}", position)

    def _made(self, ins: Instruction, index: int) -> TensorType | None:
        """The type of an output; None if a segment does not declare it."""
        if ins.op is Op.RUN:
            types = self._segments[ins.name].output_types
            return types[index] if types else None
        return None if ins.type is None else made_type(ins, ins.type, self.plan.mesh)

    def _same_type(self, position: int, ref: Ref, given: TensorType | None) -> None:
        known = self.types.get(ref)
        if known is None or given is None:
            return
        if (known.shape, known.dtype) != (given.shape, given.dtype):
            self._fail(f"{ref} is {known} but is communicated as {given}", position)

    def _read(self, position: int, ref: Ref) -> None:
        if ref not in self.types:
            gone = self.gone.get(ref)
            self._fail(f"{ref} is used " + (f"after it was {gone}" if gone else "before it is defined"), position)
        if ref in self.arriving:
            self._fail(f"{ref} is read before the WAIT for it", position)

    def _at_home(self, position: int, ins: Instruction, ref: Ref) -> None:
        """What is offloaded can be reloaded from where it is, and given another name; nothing else reads it but a
        RUN of the host, which reads that alone."""
        home = self.away.get(ref, "")
        if ins.device == HOST:
            if home != "cpu":
                self._fail(f"{ref} is read by the CPU, but it is {f'in {home}' if home else 'on the device'}", position)
            return
        if home and ins.op not in (Op.RELOAD, Op.BIND):
            self._fail(f"{ref} is read while it is offloaded to {home}", position)
        if ins.op is Op.RELOAD and home != ins.name:
            self._fail(
                f"{ref} is reloaded from {ins.name}, but it is {f'in {home}' if home else 'not offloaded'}", position
            )

    def _release(self, position: int, ref: Ref, how: str) -> None:
        if ref not in self.types:
            gone = self.gone.get(ref)
            self._fail(f"{ref} is freed " + (f"although it was {gone}" if gone else "but not defined"), position)
        self._not_in_flight(position, ref, "freed")
        del self.types[ref]
        self.away.pop(ref, None)
        self.gone[ref] = how

    def _not_in_flight(self, position: int, ref: Ref, what: str) -> None:
        if ref in self.arriving:
            self._fail(f"{ref} is {what} before the WAIT for it", position)
        if self.busy.get(ref):
            self._fail(f"{ref} is {what} before the WAIT for the communication that reads it", position)

    def _define(self, position: int, ins: Instruction, ref: Ref, kind: TensorType | None, home: str) -> None:
        if ins.outputs.count(ref) > 1:
            self._fail(f"{ref} is defined twice by one instruction", position)
        if ref in self.types:
            # An accumulator is updated by the segment that reads it, BIND moves a name, and an OFFLOAD, or the CPU,
            # replaces what is stored where it is kept; else a value would be lost.
            replaces = (ins.op is Op.OFFLOAD or ins.device == HOST) and self.away.get(ref) == home
            if ins.op is not Op.BIND and ref not in ins.inputs and not replaces:
                self._fail(f"{ref} is defined again while it is still there", position)
            self._not_in_flight(position, ref, "overwritten")
        self.types[ref] = kind
        self.away.pop(ref, None)
        if home:
            self.away[ref] = home

    def _wait(self, position: int, ins: Instruction) -> None:
        if len(ins.inputs) != 1:
            self._fail(f"WAIT is for one value, not {len(ins.inputs)}", position)
        started = self.waits.get(position)
        if started is None:
            self._fail(f"WAIT for {ins.inputs[0]}, for which no communication is outstanding", position)
        source = self.instructions[started]
        self.arriving.difference_update(source.outputs)
        for ref in source.inputs:
            if ref not in source.last:
                self.busy[ref] -= 1

    def _end(self, persistent: set[Ref]) -> None:
        complete = set(self.waits.values())
        for position, ins in enumerate(self.instructions):
            if ins.op in _COMMUNICATION and position not in complete:
                self._fail(f"no WAIT completes this {ins.op}", position)
        end = len(self.instructions)
        results = result_refs(self.plan, self.stage)
        for ref, slot in results.items():
            if ref not in self.types:
                self._fail(f"result {slot} is not defined at the end, as {ref}", end)
            stored, found = self.plan.stages[self.stage].homes.get(ref, ""), self.away.get(ref, "")
            if found != stored:
                there, here = (f"in {home}" if home else "on the device" for home in (stored, found))
                self._fail(f"result {slot} is kept {there}, and left {here}", end)
            kind = self.types[ref]
            expected = self.plan.results[self.stage][slot]
            if kind is not None and (kind.shape, kind.dtype) != (expected.shape, expected.dtype):
                self._fail(f"result {slot} is {kind} instead of {expected}", end)
        for slot in self.plan.reads[self.stage]:
            if slot.role is Role.STATE and self.first:
                persistent.add(slot_ref(slot))
        for ref in self.types:
            if ref not in results and ref not in persistent:
                self._fail(f"{ref} is neither freed nor a result", self._definition(ref))

    def _definition(self, ref: Ref) -> int:
        return max(at for at, ins in enumerate(self.instructions) if ref in ins.outputs)
