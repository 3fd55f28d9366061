"""Moves the update of each bucket to where its gradient is final, so that what it transfers overlaps the last backward.

The epilogue keeps its order: bucket after bucket as gradients become final, the reloads of the next one ahead of an
update. That paces it: the state of one bucket arrives and that of the one before leaves while the backward of a bucket
runs. What needs all gradients (clipping, loss scaling) leaves everything where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from graphshard.execution import Instruction, Op, Ref, Storage, match_waits

_STARTS = (Op.GATHER, Op.REDUCE, Op.SEND, Op.RECV, Op.RELOAD)
Part = list[Instruction]


def update_early(body: Part, epilogues: Sequence[Part], storages: Mapping[str, Storage]) -> tuple[Part, list[Part]]:
    """The body until the first update begins, and its rest merged into each epilogue: they differ in what they reload.

    ``storages`` by the name of a value: an update may write where the body reads.
    """
    places = [_places(body, epilogue, storages) for epilogue in epilogues]
    begin = min(place for found in places for place in (*found, len(body)))
    merged = []
    for epilogue, found in zip(epilogues, places, strict=True):
        moved: dict[int, Part] = {}
        for place, ins in zip(found, epilogue, strict=True):
            moved.setdefault(place, []).append(ins)
        rest = [ins for at in range(begin, len(body)) for ins in (*moved.get(at, ()), body[at])]
        merged.append([*rest, *moved.get(len(body), ()), *moved.get(len(body) + 1, ())])
    return body[:begin], merged


def _places(body: Part, epilogue: Part, storages: Mapping[str, Storage]) -> list[int]:
    """How many instructions of the body each one of the epilogue comes behind; one more than there are: it is left
    where it is."""
    stays = len(body) + 1
    late: set[int] = set()
    while True:
        places = _needs(body, epilogue, storages, late)
        useless = _only_for_late(epilogue, places, storages, stays)
        if not useless:
            break
        late |= useless
    first = next((place for place, ins in zip(places, epilogue, strict=True) if ins.op is Op.OFFLOAD), stays)
    if first >= len(body):
        return [stays] * len(epilogue)
    # A reload needs nothing: the first ones begin with the action that makes the first gradient.
    action = body[first - 1].action
    floor = next((at for at, ins in enumerate(body) if ins.action == action and ins.op is Op.RUN), first)
    moving = [index for index, place in enumerate(places) if place < stays]
    begin = floor
    for index in moving:
        places[index] = floor = _behind_starts(body, max(places[index], floor))
    reloads: dict[Ref, int] = {}
    for index in moving:  # a reload comes with the update before the one that reads it
        if epilogue[index].op is Op.RUN:
            reloads = dict.fromkeys(epilogue[index].inputs, begin) | reloads
            begin = places[index]
    for index, following in reversed(list(pairwise(moving))):
        ins = epilogue[index]
        if ins.op is Op.RELOAD:
            places[index] = reloads.get(ins.outputs[0], places[index])
        elif ins.op is Op.WAIT:  # with what it is for
            places[index] = max(places[index], places[following])
    return places


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
