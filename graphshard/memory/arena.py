"""Where in one block of memory the values of a step lie: decided before the step, from when to when each is needed.

Values whose times do not overlap can lie in the same place, so that the block is hardly larger than the most that is
alive at once, in whatever order values come and go; and because it is the same in every step, the system is asked for
none of its pages twice. Not in it are values that outlive the step, and what torch's operators make for themselves.

What ranks of one machine gather is the same on each of them: it can lie in memory that they share, laid out likewise.
What they gather of what they store need not be copied there: each can keep its part in the midst of the others', where
all read it. What they reduce can lie where the others can read it: in a block of each rank's own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphshard.execution import ExecutionPlan, Instruction, Op, Ref
from graphshard.memory.replaced import kept_at
from graphshard.memory.spans import Span, items_before, memory_spans

ALIGNMENT = 64  # bytes, as of what torch allocates on a CPU


@dataclass(frozen=True)
class Gathered:
    """A place in the memory that the ranks along ``axis`` share: a byte offset, and the position of the instruction
    that reads last what lies there."""

    axis: str
    offset: int
    until: int


@dataclass(frozen=True)
class Resident:
    """What the ranks along ``axis`` gather, of which each stores its part, ``ref``, in the memory that they share; the
    position of the instruction that reads it last."""

    axis: str
    ref: Ref
    nbytes: int
    until: int


@dataclass(frozen=True)
class Given:
    """A place in the block of its own that a rank shows to the others along ``axis``: a byte offset."""

    axis: str
    offset: int


@dataclass(frozen=True)
class Layout:
    """Byte offsets of what a step of a rank makes: ``runs``, by the position of a RUN, those of the places of its
    segment, None for one that is not in the block; ``made``, by the position of a communication, that of its result.

    ``alive_bytes``: the most that is in use at once, which no layout can do without. ``gathered``, by the position of
    a GATHER: where its result lies in shared memory, of which there are ``shared_bytes`` by axis. ``given``, by the
    position of a RUN and its place: what others read, in a block of ``given_bytes`` by axis that each rank has.
    ``residents``, by the position of a GATHER: what lies in shared memory for good. ``replaced``, by axis: positions of
    instructions that write to parts of those, which the others must not read any more by then.
    """

    nbytes: int = 0
    alive_bytes: int = 0
    runs: dict[int, tuple[int | None, ...]] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    gathered: dict[int, Gathered] = field(default_factory=dict)
    shared_bytes: dict[str, int] = field(default_factory=dict)
    given: dict[tuple[int, int], Given] = field(default_factory=dict)
    given_bytes: dict[str, int] = field(default_factory=dict)
    residents: dict[int, Resident] = field(default_factory=dict)
    replaced: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def residents_along(self, axis: str) -> dict[Ref, int]:
        """The bytes of what lies in shared memory for good, by the part that a rank stores."""
        return {resident.ref: resident.nbytes for resident in self.residents.values() if resident.axis == axis}

    def shared_along(self, axis: str) -> str:
        """What the layouts of ranks that share memory along an axis have in common, as text: where each gathered value
        lies, and in which order they come and go. Positions of instructions depend on the shapes of a batch."""
        mine = [(at, p.until, str(p.offset)) for at, p in self.gathered.items() if p.axis == axis]
        mine += [(at, p.until, str(p.ref)) for at, p in self.residents.items() if p.axis == axis]
        events = [(at, 1, place) for at, _, place in mine] + [(until, 0, place) for _, until, place in mine]
        residents = {str(ref): nbytes for ref, nbytes in self.residents_along(axis).items()}
        return repr((self.shared_bytes[axis], residents, [event[1:] for event in sorted(events)]))


def lay_out(plan: ExecutionPlan, stage: int, first: bool = False, shared: Collection[str] = ()) -> Layout:
    """The layout for the ranks of ``stage`` of the first step, or of a later one. ``shared``: the axes along which
    ranks share memory."""
    instructions = plan.stages[stage].step(first)
    spans = memory_spans(plan, stage, first)
    begins = items_before(plan, stage, first)
    last = {span: bisect_right(begins, span.end) - 1 for span in spans}  # the instruction behind which it is not needed
    gathered: dict[int, Gathered] = {}
    given: dict[tuple[int, int], Given] = {}
    residents: dict[int, Resident] = {}
    shared_bytes, given_bytes, replaced = {}, {}, {}
    written = kept_at(plan, stage, first)
    for axis in shared:
        gathers = [span for span in spans if _gathers(instructions[span.position], axis)]
        # What nobody reads is still on its way when it is let go.
        gathers = [span for span in gathers if instructions[last[span]].op is not Op.WAIT]
        stored = _stored([(instructions[span.position].inputs[0], span, last[span]) for span in gathers], written, axis)
        residents |= stored
        if stored:
            replaced[axis] = _replaced(stored.values(), written)
        offsets, shared_bytes[axis] = _packed([span for span in gathers if span.position not in stored])
        gathered |= {span.position: Gathered(axis, offset, last[span]) for span, offset in offsets.items()}
        offsets, given_bytes[axis] = _packed([span for span in spans if span.given == axis and span.place is not None])
        given |= {(s.position, s.place): Given(axis, offset) for s, offset in offsets.items() if s.place is not None}
    there = gathered.keys() | residents.keys()
    spans = [s for s in spans if s.position not in there and (s.position, s.place) not in given]
    offsets, nbytes = _packed(spans)
    found = {(span.position, span.place): offset for span, offset in offsets.items()}
    segments = plan.stages[stage].segments
    runs = {
        at: tuple(found.get((at, place)) for place in range(len(segments[ins.name].places)))
        for at, ins in enumerate(instructions)
        if ins.op is Op.RUN
    }
    made = {at: offset for (at, place), offset in found.items() if place is None}
    return Layout(nbytes, _most(spans), runs, made, gathered, shared_bytes, given, given_bytes, residents, replaced)


def _stored(gathers: Sequence[tuple[Ref, Span, int]], written: Mapping[Ref, int], axis: str) -> dict[int, Resident]:
    """Which of the gathers along an axis, each with what it is of and the position that reads it last, are of what is
    stored and not written to before."""
    changing = {ref for ref, _, until in gathers if until >= written.get(ref, 0)}
    return {
        span.position: Resident(axis, ref, span.nbytes, until) for ref, span, until in gathers if ref not in changing
    }


def _replaced(residents: Collection[Resident], written: Mapping[Ref, int]) -> tuple[int, ...]:
    """Positions such that each resident has been read last before one of them, and that is not behind where its part is
    written to: the fewest. A part may be written to while others are yet to be gathered."""
    positions: list[int] = []
    for position, until in sorted((written[resident.ref], resident.until) for resident in residents):
        if not positions or until >= positions[-1]:
            positions.append(position)
    return tuple(positions)


def _packed(spans: Sequence[Span]) -> tuple[dict[Span, int], int]:
    """Offsets, and the bytes they take together."""
    offsets, nbytes = pack([(span.nbytes, span.begin, span.end) for span in spans])
    return dict(zip(spans, offsets, strict=True)), nbytes


def _gathers(ins: Instruction, axis: str) -> bool:
    return ins.op is Op.GATHER and ins.axis == axis


def aligned(nbytes: Any) -> Any:
    """Bytes, a number or an array of them, up to where the next value can begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pack(spans: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for (bytes, first time, last time) such that no two overlap in both, and the bytes they take together.

    The largest is placed first, each in the smallest gap that it fits, below or between those that are there at its
    time (greedy by size: Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020).
    """
    sizes, begins, ends = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    sizes = aligned(sizes)
    order = np.lexsort((begins, -sizes))
    sizes, begins, ends = sizes[order], begins[order], ends[order]
    offsets = np.zeros_like(sizes)
    for i, size in enumerate(sizes):
        there = np.flatnonzero((begins[:i] <= ends[i]) & (ends[:i] >= begins[i]))
        if not there.size:
            continue
        there = there[np.argsort(offsets[there], kind="stable")]
        tops = np.maximum.accumulate(offsets[there] + sizes[there])
        gaps = offsets[there] - np.concatenate(([0], tops[:-1]))
        fitting = np.flatnonzero(gaps >= size)
        if not fitting.size:
            offsets[i] = tops[-1]
        else:
            gap = fitting[np.argmin(gaps[fitting])]
            offsets[i] = offsets[there[gap]] - gaps[gap]
    result = np.empty_like(offsets)
    result[order] = offsets
    return result.tolist(), int((offsets + sizes).max(initial=0))


def _most(spans: Sequence[Span]) -> int:
    """The most bytes that are needed at once."""
    change = np.zeros(max((span.end for span in spans), default=0) + 2, dtype=np.int64)
    for span in spans:
        change[span.begin] += span.nbytes
        change[span.end + 1] -= span.nbytes
    return int(change.cumsum().max())
