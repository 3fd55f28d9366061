"""From when to when a step needs each piece of memory that it asks for: that of segments' places, and of what
communication makes.

Followed by storage through the plan: an output may live in the memory of an input, and communication reads and writes
until its WAIT. simulate.py counts bytes by category; here it is what code may write over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from graphshard.execution import ExecutionPlan, Instruction, Op, Ref, Segment, made_type, match_waits

_IN_PLACE = ("all_reduce", "broadcast")  # a source that is handed over becomes the result


@dataclass(frozen=True)
class Span:
    """Memory that the instruction at ``position`` asks for: for a ``place`` of its segment, None: for its result.

    It is needed from item ``begin`` to item ``end``, both included, in items of code since the step began. ``given``:
    the axis along which a reduce-scatter reads it.
    """

    nbytes: int
    begin: int
    end: int
    position: int
    place: int | None = None
    given: str = ""


@dataclass(eq=False)
class _Block:
    nbytes: int
    begin: int
    position: int
    place: int | None = None
    given: str = ""
    users: int = 0  # names, and communications under way
    end: int | None = None  # known while there are no users
    endless: bool = False


def memory_spans(plan: ExecutionPlan, stage: int, first: bool = False) -> list[Span]:
    """The spans of one step of a rank of ``stage``; ``first``: of the first step, which finds no optimizer state. What
    the step leaves has none."""
    walk = _Walk(plan, stage, first)
    walk.run()
    return [
        Span(block.nbytes, block.begin, block.end, block.position, block.place, block.given)
        for block in walk.blocks
        if block.nbytes and not block.users and block.end is not None and not block.endless
    ]


def items_before(plan: ExecutionPlan, stage: int, first: bool = False) -> list[int]:
    """How many items of code are before each instruction of a step, and at last how many there are."""
    segments = plan.stages[stage].segments
    lengths = (segments[ins.name].items if ins.op is Op.RUN else 1 for ins in plan.stages[stage].step(first))
    return [0, *accumulate(lengths)]


class _Walk:
    def __init__(self, plan: ExecutionPlan, stage: int, first: bool) -> None:
        self.blocks: list[_Block] = []
        self._mesh, self._segments = plan.mesh, plan.stages[stage].segments
        self._instructions = plan.stages[stage].step(first)
        self._begins = items_before(plan, stage, first)
        self._waits = match_waits(self._instructions)
        self._block_of: dict[Ref, _Block] = {}
        self._now = 0  # the last item of the instruction

    def run(self) -> None:
        awaited = set(self._waits.values())
        under_way: dict[int, list[_Block]] = {}
        for position, ins in enumerate(self._instructions):
            self._now = self._begins[position + 1] - 1
            match ins.op:
                case Op.RUN:
                    self._run(position, ins, self._segments[ins.name])
                case Op.WAIT:
                    self._release(under_way.pop(self._waits.get(position, -1), ()))
                case Op.FREE:
                    self._forget(ins.inputs)
                case Op.BIND:
                    found = [self._block_of.get(ref) for ref in ins.inputs]
                    for ref, block in zip(ins.outputs, found, strict=True):
                        self._define(ref, block)
                    self._forget(ins.last)
                case _:
                    touched = self._start(position, ins)
                    if position in awaited:
                        under_way[position] = touched
                    else:  # until when it is used nobody knows
                        for block in touched:
                            block.endless = True
                    self._forget(ins.last)

    def _run(self, position: int, ins: Instruction, segment: Segment) -> None:
        begin = self._begins[position]
        read = [self._block_of.get(ref) for ref in ins.inputs]
        self._forget(ins.last)
        ends: dict[_Block, int] = {}
        for block, item in zip(read, segment.ends, strict=bool(segment.ends)):
            if block is not None and not block.users:
                ends[block] = block.end = max(ends.get(block, 0), begin + item)
        living: dict[int, _Block] = {}
        for number, place in enumerate(segment.places):
            block = self._new(place.type.storage_bytes, begin + place.born, position, number)
            block.end = begin + place.died
            living |= dict.fromkeys(place.outputs, block)
        for output, index in segment.aliases:
            if (found := read[index]) is not None:
                living[output] = found
        for output, ref in enumerate(ins.outputs):
            self._define(ref, living.get(output))

    def _start(self, position: int, ins: Instruction) -> list[_Block]:
        """Start a communication; what it reads and writes."""
        source = self._block_of.get(ins.inputs[0]) if ins.inputs else None
        result: _Block | None = None
        if source is not None and ins.name == "reduce_scatter":
            source.given = ins.axis
        if ins.name in _IN_PLACE and ins.last:
            result = source
        elif ins.op in (Op.GATHER, Op.REDUCE, Op.RECV) and ins.type is not None:
            kind = made_type(ins, ins.type, self._mesh)
            nbytes = kind.nbytes if ins.axis else kind.storage_bytes  # a collective's result is contiguous
            result = self._new(nbytes, self._begins[position], position)
        touched = [block for block in (source, result) if block is not None]
        for block in touched:
            block.users += 1
        for ref in ins.outputs:
            self._define(ref, result)
        return touched

    def _new(self, nbytes: int, begin: int, position: int, place: int | None = None) -> _Block:
        self.blocks.append(_Block(nbytes, begin, position, place))
        return self.blocks[-1]

    def _define(self, ref: Ref, block: _Block | None) -> None:
        if block is not None:
            block.users += 1  # before the old value goes: it may be in the same block
        self._forget((ref,))
        if block is not None:
            self._block_of[ref] = block

    def _forget(self, refs: Iterable[Ref]) -> None:
        self._release(block for ref in refs if (block := self._block_of.pop(ref, None)) is not None)

    def _release(self, blocks: Iterable[_Block]) -> None:
        for block in blocks:
            block.users -= 1
            if not block.users:
                block.end = self._now
