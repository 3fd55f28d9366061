"""How those who run a plan meet: transfers in pairs, collectives in one order, and nobody waiting in a circle.

The channel model is described in the package, which calls these checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from graphshard.errors import PlanError
from graphshard.execution import Instruction, Op

_CONTEXT = 3  # instructions shown before and after a spot


@dataclass(frozen=True)
class Parties:
    """Lists of instructions that run against each other, and what messages call them."""

    lists: Sequence[tuple[Instruction, ...]]
    names: Sequence[str]


def of_stages(lists: Sequence[tuple[Instruction, ...]]) -> Parties:
    """One list per pipeline stage, in order."""
    return Parties(lists, [f"stage {stage}" for stage in range(len(lists))])


def reject(rule: str, parties: Parties, spots: Iterable[tuple[int, int]]) -> NoReturn:
    """Raise PlanError with the instructions around ``spots``: (party, position), the end being behind the last one."""
    lines = []
    for party, position in spots:
        instructions = parties.lists[party]
        lines.append(f"{parties.names[party]}:")
        for at in range(max(0, position - _CONTEXT), min(len(instructions), position + _CONTEXT + 1)):
            maker = f"  [{instructions[at].made_by}]" if at == position and instructions[at].made_by else ""
            lines.append(f"  {'>' if at == position else ' '} {at:4} {instructions[at]}{maker}".rstrip())
        if position >= len(instructions):
            lines.append(f"  > {len(instructions):4} end of the step")
    raise PlanError(rule, "\n".join(lines))


def check_transfers(pipeline: Parties) -> None:
    """On each directed pair of stages the k-th send and the k-th receive are about one value. One party per stage."""
    ends: dict[tuple[int, int], dict[Op, list[int]]] = {}
    for stage, instructions in enumerate(pipeline.lists):
        for position, ins in enumerate(instructions):
            if ins.op in (Op.SEND, Op.RECV):
                ends.setdefault(_pair(stage, ins), {Op.SEND: [], Op.RECV: []})[ins.op].append(position)
    for (source, target), both in sorted(ends.items()):
        sends, receives = both[Op.SEND], both[Op.RECV]
        sender, receiver = pipeline.names[source], pipeline.names[target]
        for k, (at_source, at_target) in enumerate(zip(sends, receives, strict=False)):
            send, receive = pipeline.lists[source][at_source], pipeline.lists[target][at_target]
            sent, received = send.inputs[0], receive.outputs[0]
            where = f"transfer {k} from {sender} to {receiver}"
            spots = [(source, at_source), (target, at_target)]
            if send.type != receive.type:
                reject(f"{where} is sent as {_full(send)} and received as {_full(receive)}", pipeline, spots)
            if sent.microbatch != received.microbatch:
                reject(f"{where} sends {sent} but receives {received}: two micro-batches", pipeline, spots)
            if send.name != receive.name:
                reject(f"{where} sends {send.name!r} but receives {receive.name!r}", pipeline, spots)
        if len(sends) > len(receives):
            rule = f"{receiver} never receives what {sender} sends"
            reject(rule, pipeline, [(source, sends[len(receives)]), (target, len(pipeline.lists[target]))])
        if len(receives) > len(sends):
            rule = f"{sender} never sends what {receiver} receives"
            reject(rule, pipeline, [(target, receives[len(sends)]), (source, len(pipeline.lists[source]))])


def _pair(stage: int, ins: Instruction) -> tuple[int, int]:
    assert ins.peer is not None
    return (stage, ins.peer) if ins.op is Op.SEND else (ins.peer, stage)


def _full(ins: Instruction) -> str:
    assert ins.type is not None
    return f"{ins.type} with strides {list(ins.type.stride)}"


def check_collectives(group: Parties, axis: str, over: str) -> None:
    """The members of a group along ``axis`` issue the same collectives about the same values, in one order. ``over``:
    what messages call the axis."""
    orders = [
        [at for at, ins in enumerate(instructions) if ins.op in (Op.GATHER, Op.REDUCE) and ins.axis == axis]
        for instructions in group.lists
    ]
    for member, positions in enumerate(orders[1:], 1):
        first, other = group.names[0], group.names[member]
        for k in range(max(len(positions), len(orders[0]))):
            here = positions[k] if k < len(positions) else len(group.lists[member])
            there = orders[0][k] if k < len(orders[0]) else len(group.lists[0])
            spots = [(0, there), (member, here)]
            if k >= len(positions) or k >= len(orders[0]):
                reject(f"collective {k} {over} is issued by only one of {first} and {other}", group, spots)
            if _signature(group.lists[member][here]) != _signature(group.lists[0][there]):
                reject(f"collective {k} {over} differs between {first} and {other}", group, spots)


def _signature(ins: Instruction) -> tuple[object, ...]:
    assert ins.type is not None
    return (ins.name, ins.type.shape, ins.type.dtype, ins.peer, ins.outputs[0])


Channel = tuple[object, ...]
Meets = Callable[[int, Instruction], tuple[Channel, tuple[int, ...]] | None]
"""For a party's instruction: the channel it communicates on and the parties that meet there; None for no meeting."""


def between_stages(count: int) -> Meets:
    """Meetings of representatives, one per stage. Data-parallel peers are alike, so that their collectives complete."""
    everyone = tuple(range(count))

    def meets(stage: int, ins: Instruction) -> tuple[Channel, tuple[int, ...]] | None:
        if ins.op in (Op.SEND, Op.RECV):
            pair = _pair(stage, ins)
            return ("transfers", *pair), pair
        if ins.op in (Op.GATHER, Op.REDUCE) and ins.axis == "pp":
            return ("collectives",), everyone
        return None

    return meets


@dataclass(frozen=True)
class _Meeting:
    """The k-th communication of a channel."""

    channel: Channel
    index: int


def check_progress(parties: Parties, waits: Sequence[dict[int, int]], meets: Meets) -> None:
    """Run the parties against each other; what cannot finish waits in a circle, or for one that never comes. Each
    meeting wakes its waiters once."""
    needed: dict[_Meeting, set[int]] = {}  # parties that have not issued their end yet
    joined: list[dict[int, _Meeting]] = [{} for _ in parties.lists]  # position of a communication to its meeting
    counts: dict[tuple[int, Channel], int] = {}
    for party, instructions in enumerate(parties.lists):
        for position, ins in enumerate(instructions):
            if (met := meets(party, ins)) is None:
                continue
            channel, members = met
            index = counts.get((party, channel), 0)
            counts[party, channel] = index + 1
            joined[party][position] = _Meeting(channel, index)
            if joined[party][position] not in needed:
                needed[joined[party][position]] = set(members)

    at = [0] * len(parties.lists)
    sleeping: dict[_Meeting, list[int]] = {}
    ready = list(range(len(parties.lists)))
    while ready:
        party = ready.pop()
        while at[party] < len(parties.lists[party]):
            position = at[party]
            meeting = joined[party].get(position)
            if meeting is not None:
                needed[meeting].discard(party)
                if not needed[meeting]:
                    ready += sleeping.pop(meeting, [])
            elif parties.lists[party][position].op is Op.WAIT:
                awaited = joined[party].get(waits[party][position])
                if awaited is not None and needed[awaited]:
                    sleeping.setdefault(awaited, []).append(party)
                    break
            at[party] += 1
    stuck = {party: meeting for meeting, sleepers in sleeping.items() for party in sleepers}
    if stuck:
        _fail_stuck(parties, at, stuck, needed)


def _fail_stuck(
    parties: Parties, at: Sequence[int], stuck: dict[int, _Meeting], needed: dict[_Meeting, set[int]]
) -> NoReturn:
    """Follow who waits for whom until one comes up again: that is the circle. Or one has ended and never comes."""
    chain = [min(stuck)]
    while (following := min(needed[stuck[chain[-1]]])) not in chain:
        if following not in stuck:
            spots = [(chain[-1], at[chain[-1]]), (following, len(parties.lists[following]))]
            waiting, ended = parties.names[chain[-1]], parties.names[following]
            reject(f"{waiting} waits for {ended}, which ends without it", parties, spots)
        chain.append(following)
    circle = chain[chain.index(following) :]
    links = zip(circle, circle[1:] + circle[:1], strict=True)
    story = ", ".join(f"{parties.names[a]} waits for {parties.names[b]}" for a, b in links)
    noun, _, _ = parties.names[0].partition(" ")
    reject(f"{noun}s wait in a circle: {story}", parties, [(party, at[party]) for party in circle])
