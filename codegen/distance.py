"""How far ahead of its use a copy between the device and where values are kept starts: by what costs say it takes.

A copy is hidden if the computing between its start and its WAIT takes at least as long. In each direction one is made
at a time, in the order of their starts, beside what is computed. What other rules leave too close together is moved
apart, as far as the memory allows that the plan needs anyway: a RELOAD starts earlier, and an OFFLOAD is waited for
later, so that it has started early enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from graphshard.execution import Instruction, Op, Ref, Storage, match_waits

Part = list[Instruction]


@dataclass(frozen=True)
class Clock:
    """What takes time in a step, in FLOPs of the device (analysis.py): a segment, by name, and a move."""

    segments: Mapping[str, float]
    move: Callable[[Instruction], float]


Move = Callable[[Part, int, Sequence[int], Mapping[str, Storage], Clock], Part]


def reload_in_time(step: Part, begin: int, room: Sequence[int], storages: Mapping[str, Storage], clock: Clock) -> Part:
    """The RELOADs at ``begin`` and behind it, each as much earlier as its copy takes; none ahead of one before it.

    ``room``: the bytes that may be held in addition while each instruction of ``step`` runs.
    """
    spare, times = list(room), _times(step, clock)
    started_at = match_waits(step)
    wait_of = {started: wait for wait, started in started_at.items()}
    # What the CPU makes is waited for before its copy starts: earlier, it would hold up what is computed meanwhile.
    made = {ref for ins in step if ins.device for ref in ins.outputs}
    starts = [at for at, ins in enumerate(step) if ins.op is Op.RELOAD and at in wait_of and ins.inputs[0] not in made]
    wanted: dict[int, float] = {}
    latest = float("inf")  # when the copy that comes next starts
    for at in reversed(starts):
        latest = wanted[at] = min(latest, times[wait_of[at]]) - clock.move(step[at])
    places: dict[int, int] = {}
    first = 0  # where the one before starts
    for at in starts:
        size = _nbytes(step[at].outputs, storages)
        place = reached = at
        while begin <= at and times[place] > wanted[at] and reached > first:
            reached -= 1
            read = step[started_at[reached]].inputs if reached in started_at else ()  # by a copy, until then
            if step[at].last.intersection(read) or not _may_pass(step[at], step[reached]) or spare[reached] < size:
                break
            if times[reached] < times[place]:
                place = reached
        for between in range(place, at):
            spare[between] -= size
        places[at] = first = place
    return _moved(step, places)


def wait_in_time(step: Part, begin: int, room: Sequence[int], storages: Mapping[str, Storage], clock: Clock) -> Part:
    """The WAITs at ``begin`` and behind it for what is offloaded, each as much later as its copy takes.

    ``room`` as for :func:`reload_in_time`.
    """
    spare, times = list(room), _times(step, clock)
    wait_of = {started: wait for wait, started in match_waits(step).items()}
    places: dict[int, int] = {}
    done = 0.0  # when the copy that started before has been made
    for at, ins in enumerate(step):
        if ins.op is not Op.OFFLOAD or at not in wait_of:
            continue
        done = max(done, times[at]) + clock.move(ins)
        wait = wait_of[at]
        behind = wait + 1 + _frees(step[wait + 1 : wait + 2], ins)
        size = _nbytes(ins.inputs, storages)
        place = reached = behind
        while begin <= wait and times[place] < done and reached < len(step):
            if not _may_follow(ins, step[reached]) or spare[reached] < size:
                break
            reached += 1
            if times[reached] > times[place]:
                place = reached
        for between in range(behind, place):
            spare[between] -= size
        if place > behind:
            places |= dict.fromkeys(range(wait, behind), place)
    return _moved(step, places)


def _times(step: Part, clock: Clock) -> list[float]:
    """What has been computed before each instruction, and at the end."""
    return list(accumulate((clock.segments[i.name] if i.op is Op.RUN else 0.0 for i in step), initial=0.0))


def _nbytes(refs: Sequence[Ref], storages: Mapping[str, Storage]) -> int:
    return sum(storages[ref.name].nbytes for ref in refs if ref.name in storages)


def _may_pass(reload: Instruction, other: Instruction) -> bool:
    """Whether ``reload`` can start ahead of ``other``."""
    source, target = reload.inputs[0], reload.outputs[0]
    if source in other.outputs or target in (*other.inputs, *other.outputs):
        return False
    return source not in other.inputs or other.op is Op.RELOAD


def _may_follow(offload: Instruction, other: Instruction) -> bool:
    """Whether ``offload`` can be waited for behind ``other``."""
    return not {*offload.inputs, *offload.outputs}.intersection((*other.inputs, *other.outputs))


def _frees(following: Part, offload: Instruction) -> bool:
    return any(ins.op is Op.FREE and set(ins.inputs) <= set(offload.inputs) for ins in following)


def _moved(step: Part, places: Mapping[int, int]) -> Part:
    """Each instruction at the place that it is given: ahead of the one that was there."""
    order = sorted(range(len(step)), key=lambda at: (places.get(at, at), at not in places, at))
    return [step[at] for at in order]
