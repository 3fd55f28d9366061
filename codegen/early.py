"""Moves the update of each bucket to where its gradient is final, so that what it transfers overlaps the last backward.

The epilogue keeps its order: bucket after bucket as gradients become final, the reloads of the next one ahead of an
update. Where there is room, the state of one bucket arrives and that of the one before leaves while the backward of a
bucket runs; where there is not, updates come later (pacing.py). A bucket of which any value needs all gradients
(clipping, loss scaling) stays where it is, with what only such buckets read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graphshard.codegen.pacing import Pace, Turn, pace
from graphshard.execution import Instruction, Op, Ref, Storage, match_waits, owner_of

_STARTS = (Op.GATHER, Op.REDUCE, Op.SEND, Op.RECV, Op.RELOAD)
Part = list[Instruction]


@dataclass(frozen=True)
class _Places:
    """How many instructions of the body each one of the epilogue comes behind; one more than there are: it is left
    where it is. ``left``: the same of WAITs for what has been offloaded, which come ahead of what else comes there."""

    places: list[int]
    left: dict[int, Part] = field(default_factory=dict)


def update_early(
    body: Part, epilogues: Sequence[Part], storages: Mapping[str, Storage], room: Sequence[Sequence[int]] | None = None
) -> tuple[Part, list[Part]]:
    """The body until the first update begins, and its rest merged into each epilogue: they differ in what they reload.

    ``storages`` by the name of a value: an update may write where the body reads. ``room``, for each epilogue: the
    bytes that may be held in addition while each instruction of the body runs; None: any number.
    """
    rooms = [None] * len(epilogues) if room is None else room
    every = [_places(body, epilogue, storages, bytes_) for epilogue, bytes_ in zip(epilogues, rooms, strict=True)]
    begin = min(place for found in every for place in (*found.places, len(body)))
    merged = []
    for epilogue, found in zip(epilogues, every, strict=True):
        moved = {place: list(waits) for place, waits in found.left.items()}
        for place, ins in zip(found.places, epilogue, strict=True):
            moved.setdefault(place, []).append(ins)
        rest = [ins for at in range(begin, len(body)) for ins in (*moved.get(at, ()), body[at])]
        merged.append([*rest, *moved.get(len(body), ()), *moved.get(len(body) + 1, ())])
    return body[:begin], merged


def _places(body: Part, epilogue: Part, storages: Mapping[str, Storage], room: Sequence[int] | None) -> _Places:
    stays = len(body) + 1
    late = _of_all_gradients(body, epilogue, storages)
    while True:
        places = _needs(body, epilogue, storages, late)
        behind = _of_late_buckets(epilogue, places, stays) | _only_for_late(epilogue, places, storages, stays)
        if not behind:
            break
        late |= behind
    first = next((place for place, ins in zip(places, epilogue, strict=True) if ins.op is Op.OFFLOAD), stays)
    if first >= len(body):
        return _Places([stays] * len(epilogue))
    # A reload needs nothing: the first ones begin with the action that makes the first gradient.
    action = body[first - 1].action
    floor = begin = next((at for at, ins in enumerate(body) if ins.action == action and ins.op is Op.RUN), first)
    readers = _readers(epilogue, storages)
    moving = [index for index, place in enumerate(places) if place < stays]
    for index in (index for index in moving if index not in readers):
        places[index] = floor = _behind_starts(body, max(places[index], floor))
    runs = [index for index in moving if epilogue[index].op is Op.RUN]
    turns = _turns(body, epilogue, runs, places, storages)
    paces = pace(turns, begin, len(body), room)
    _follow(moving, readers, places, dict(zip(runs, paces, strict=True)), epilogue)
    if room is None:
        return _Places(places)
    return _Places(places, _departures(epilogue, runs, paces, len(body)))


def _turns(
    body: Part, epilogue: Part, runs: Sequence[int], places: Sequence[int], storages: Mapping[str, Storage]
) -> list[Turn]:
    """One for each segment that may come early."""
    reloaded = {ref for ins in epilogue if ins.op is Op.RELOAD for ref in ins.outputs}
    offloaded = {ref for ins in epilogue if ins.op is Op.OFFLOAD for ref in ins.inputs}
    made = {ref for ins in body for ref in _roots(ins.outputs, storages)}
    last = {root: at for at, ins in enumerate(epilogue) for root in _roots((*ins.inputs, *ins.outputs), storages)}
    turns = []
    for index in runs:
        inputs, outputs = epilogue[index].inputs, epilogue[index].outputs
        turns.append(
            Turn(
                ready=places[index],
                arriving_bytes=_nbytes(reloaded.intersection(inputs), storages),
                leaving_bytes=_nbytes(offloaded.intersection(outputs), storages),
                freed_bytes=sum(
                    _nbytes((ref,), storages)
                    for ref in inputs
                    for root in _roots((ref,), storages)
                    if root in made and last[root] == index
                ),
            )
        )
        reloaded -= set(inputs)
    return turns


def _nbytes(refs: Iterable[Ref], storages: Mapping[str, Storage]) -> int:
    return sum(storages[ref.name].nbytes for ref in refs if ref.name in storages)


def _readers(epilogue: Part, storages: Mapping[str, Storage]) -> dict[int, list[int]]:
    """Of each RELOAD and WAIT that brings something: what reads it."""
    found: dict[int, list[int]] = {}
    reading: dict[Ref, list[int]] = {}
    for index, ins in reversed(list(enumerate(epilogue))):
        if ins.op in (Op.RELOAD, Op.WAIT):
            brought = _roots(ins.outputs or ins.inputs, storages)
            if users := [user for root in brought for user in reading.get(root, ())]:
                found[index] = users
        else:
            for root in _roots(ins.inputs, storages):
                reading.setdefault(root, []).append(index)
    return found


def _follow(
    moving: Sequence[int],
    readers: Mapping[int, Sequence[int]],
    places: list[int],
    paces: Mapping[int, Pace],
    epilogue: Part,
) -> None:
    """Move ``places`` to where the segments are paced: in order, and with each what is reloaded and waited for, for
    what comes first of those that read it."""
    floor = 0
    for index in (index for index in moving if index not in readers):
        if index in paces:
            places[index] = paces[index].run
        places[index] = floor = max(places[index], floor)
    for index in (index for index in moving if index in readers):
        reader = min(readers[index], key=lambda user: (places[user], user))
        begins = epilogue[index].op is Op.RELOAD and reader in paces
        places[index] = max(places[index], paces[reader].begin if begins else places[reader])


def _departures(epilogue: Part, runs: Sequence[int], paces: Sequence[Pace], end: int) -> dict[int, Part]:
    """WAITs for what is offloaded, by their places in the body."""
    left = {ref: pace.left for index, pace in zip(runs, paces, strict=True) for ref in epilogue[index].outputs}
    waits: dict[int, Part] = {}
    for ins in epilogue:
        place = left.get(ins.inputs[0], end) if ins.op is Op.OFFLOAD else end
        if place < end:
            wait = Instruction(Op.WAIT, inputs=ins.outputs, action=ins.action, made_by=ins.made_by)
            waits.setdefault(place, []).append(wait)
    return waits


def _behind_starts(body: Part, place: int) -> int:
    """What the body starts there goes first: it overlaps what comes in between."""
    return next((at for at in range(place, len(body)) if body[at].op not in _STARTS), len(body))


def _needs(body: Part, epilogue: Part, storages: Mapping[str, Storage], late: set[int]) -> list[int]:
    """Behind what an instruction can come at the earliest: what makes or last reads what it touches."""
    step = body + epilogue
    waits = match_waits(step)
    read: dict[Ref, int] = {}
    written: dict[Ref, int] = {}
    places = []
    for position, ins in enumerate(step):
        start = step[waits[position]] if position in waits else ins  # until then it is read or written
        reads, writes = _roots(start.inputs, storages), _roots(start.outputs, storages)
        place = position + 1
        if position >= len(body):
            place = len(body) + 1 if position - len(body) in late or _between_stages(start) else 0
            if start is not ins and waits[position] < len(body):
                place = max(place, _behind_next_run(body, waits[position]))
            place = max([place, *(written.get(root, 0) for root in reads | writes)])
            place = max([place, *(read.get(root, 0) for root in writes)])
            if ins.device and place < len(body):  # what it reads is on its way to the host meanwhile
                place = _behind_next_run(body, place)
            places.append(place)
        read |= {root: max(place, read.get(root, 0)) for root in reads}
        written |= {root: max(place, written.get(root, 0)) for root in writes}
    return places


def _roots(refs: Sequence[Ref], storages: Mapping[str, Storage]) -> set[Ref]:
    return {storages[ref.name].of(ref.microbatch) if ref.name in storages else ref for ref in refs}


def _between_stages(ins: Instruction) -> bool:
    """Stages agree on the order of these at the end of a step only."""
    return ins.axis == "pp" or ins.peer is not None


def _behind_next_run(body: Part, start: int) -> int:
    """Where to wait for what the body starts at ``start``, so that it overlaps work."""
    return next((at + 1 for at in range(start, len(body)) if body[at].op is Op.RUN), len(body))


def _of_all_gradients(body: Part, epilogue: Part, storages: Mapping[str, Storage]) -> set[int]:
    """What needs every gradient that the updates read, of several."""
    sources: dict[Ref, frozenset[Ref]] = {}
    for ins in body:
        own = _roots(ins.outputs, storages)
        if ins.op is Op.REDUCE:  # a gradient and its sum over ranks are one
            own = {source for root in _roots(ins.inputs, storages) for source in sources.get(root, (root,))}
        sources |= dict.fromkeys(_roots(ins.outputs, storages), frozenset(own))
    needs: list[frozenset[Ref]] = []
    for ins in epilogue:
        reads = () if ins.op is Op.WAIT else _roots(ins.inputs, storages)
        needs.append(frozenset().union(*(sources.get(root, ()) for root in reads)))
        sources |= dict.fromkeys(_roots(ins.outputs, storages), needs[-1])
    updates = (need for ins, need in zip(epilogue, needs, strict=True) if ins.op is Op.OFFLOAD)
    gradients = frozenset[Ref]().union(*updates)
    computing = [index for index, ins in enumerate(epilogue) if ins.op is not Op.BIND]  # which names what there is
    return {index for index in computing if len(gradients) > 1 and needs[index] >= gradients}


def _of_late_buckets(epilogue: Part, places: list[int], stays: int) -> set[int]:
    """What moves of a bucket of which something stays: the rest of its update would hold what that reads."""
    owners = {index: owner_of(ins) for index, ins in enumerate(epilogue) if ins.op is Op.OFFLOAD}
    late = {owner for index, owner in owners.items() if places[index] >= stays}
    return {index for index, owner in owners.items() if owner in late and places[index] < stays}


def _only_for_late(epilogue: Part, places: list[int], storages: Mapping[str, Storage], stays: int) -> set[int]:
    """What moves although only what stays reads it: its results would lie about."""
    wanted: dict[bool, set[Ref]] = {False: set(), True: set()}  # by what moves: by what stays
    found = set()
    for index in reversed(range(len(epilogue))):
        ins, moves = epilogue[index], places[index] < stays
        made = _roots(ins.outputs or ins.inputs, storages)
        if moves and made & wanted[True] and not made & wanted[False]:
            found.add(index)
            moves = False
        if ins.op is not Op.WAIT:
            wanted[not moves] |= _roots(ins.inputs, storages)
    return found
