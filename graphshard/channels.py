"""How the stages of a plan meet: transfers in pairs, collectives in one order, and nobody waiting in a circle.

The channel model is described in prove.py, which calls these checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from graphshard.errors import PlanError
from graphshard.execution import Instruction, Op

_CONTEXT = 3  # instructions shown before and after a spot


def reject(
    rule: str,
    lists: Sequence[Sequence[Instruction]] | Mapping[int, Sequence[Instruction]],
    spots: Iterable[tuple[int, int]],
) -> NoReturn:
    """Raise PlanError with the instructions around ``spots``: (stage, position), the end being behind the last one."""
    lines = []
    for stage, position in spots:
        instructions = lists[stage]
        lines.append(f"stage {stage}:")
        for at in range(max(0, position - _CONTEXT), min(len(instructions), position + _CONTEXT + 1)):
            lines.append(f"  {'>' if at == position else ' '} {at:4} {instructions[at]}".rstrip())
        if position >= len(instructions):
            lines.append(f"  > {len(instructions):4} end of the step")
    raise PlanError(rule, "\n".join(lines))


def _channel(stage: int, ins: Instruction) -> tuple[int, int]:
    assert ins.peer is not None
    return (stage, ins.peer) if ins.op is Op.SEND else (ins.peer, stage)


def check_transfers(lists: Sequence[tuple[Instruction, ...]]) -> None:
    """On each directed pair of stages the k-th send and the k-th receive are about one value."""
    ends: dict[tuple[int, int], dict[Op, list[int]]] = {}
    for stage, instructions in enumerate(lists):
        for position, ins in enumerate(instructions):
            if ins.op in (Op.SEND, Op.RECV):
                ends.setdefault(_channel(stage, ins), {Op.SEND: [], Op.RECV: []})[ins.op].append(position)
    for (source, target), both in sorted(ends.items()):
        sends, receives = both[Op.SEND], both[Op.RECV]
        for k, (at_source, at_target) in enumerate(zip(sends, receives, strict=False)):
            send, receive = lists[source][at_source], lists[target][at_target]
            sent, received = send.inputs[0], receive.outputs[0]
            where = f"transfer {k} from stage {source} to stage {target}"
            spots = [(source, at_source), (target, at_target)]
            if send.type != receive.type:
                reject(f"{where} is sent as {_full(send)} and received as {_full(receive)}", lists, spots)
            if sent.microbatch != received.microbatch:
                reject(f"{where} sends {sent} but receives {received}: two micro-batches", lists, spots)
            if send.name != receive.name:
                reject(f"{where} sends {send.name!r} but receives {receive.name!r}", lists, spots)
        if len(sends) > len(receives):
            rule = f"stage {target} never receives what stage {source} sends"
            reject(rule, lists, [(source, sends[len(receives)]), (target, len(lists[target]))])
        if len(receives) > len(sends):
            rule = f"stage {source} never sends what stage {target} receives"
            reject(rule, lists, [(target, receives[len(sends)]), (source, len(lists[source]))])


def _full(ins: Instruction) -> str:
    assert ins.type is not None
    return f"{ins.type} with strides {list(ins.type.stride)}"


def check_collectives(lists: Sequence[tuple[Instruction, ...]]) -> None:
    """All stages issue the same collectives over the stage axis; over other axes a group shares one list anyway."""
    orders = [
        [at for at, ins in enumerate(instructions) if ins.op in (Op.GATHER, Op.REDUCE) and ins.axis == "pp"]
        for instructions in lists
    ]
    for stage, positions in enumerate(orders[1:], 1):
        for k in range(max(len(positions), len(orders[0]))):
            here = positions[k] if k < len(positions) else len(lists[stage])
            there = orders[0][k] if k < len(orders[0]) else len(lists[0])
            spots = [(0, there), (stage, here)]
            if k >= len(positions) or k >= len(orders[0]):
                reject(f"collective {k} over the stages is issued by only one of stages 0 and {stage}", lists, spots)
            ours, theirs = lists[stage][here], lists[0][there]
            if _signature(ours) != _signature(theirs):
                reject(f"collective {k} over the stages differs between stages 0 and {stage}", lists, spots)


def _signature(ins: Instruction) -> tuple[object, ...]:
    assert ins.type is not None
    return (ins.name, ins.type.shape, ins.type.dtype, ins.peer)


@dataclass(frozen=True)
class _Meeting:
    """The k-th communication of a channel, and which stages must have issued their end for it to be complete."""

    channel: tuple[int, ...]
    index: int


def check_progress(lists: Sequence[tuple[Instruction, ...]], waits: Sequence[dict[int, int]]) -> None:
    """Run the stages against each other; what cannot finish waits in a circle. Each meeting wakes its waiters once."""
    everyone = tuple(range(len(lists)))
    needed: dict[_Meeting, set[int]] = {}  # stages that have not issued their end yet
    joined: list[dict[int, _Meeting]] = [{} for _ in lists]  # per stage: position of a communication to its meeting
    counts: dict[tuple[int, tuple[int, ...]], int] = {}
    for stage, instructions in enumerate(lists):
        for position, ins in enumerate(instructions):
            across = ins.op in (Op.GATHER, Op.REDUCE) and ins.axis == "pp"
            if ins.op not in (Op.SEND, Op.RECV) and not across:
                continue
            channel = everyone if across else _channel(stage, ins)
            channel = (int(across), *channel)
            index = counts.get((stage, channel), 0)
            counts[stage, channel] = index + 1
            joined[stage][position] = _Meeting(channel, index)
            needed.setdefault(joined[stage][position], set()).add(stage)

    at = [0] * len(lists)
    sleeping: dict[_Meeting, list[int]] = {}
    ready = list(everyone)
    while ready:
        stage = ready.pop()
        while at[stage] < len(lists[stage]):
            position = at[stage]
            meeting = joined[stage].get(position)
            if meeting is not None:
                needed[meeting].discard(stage)
                if not needed[meeting]:
                    ready += sleeping.pop(meeting, [])
            elif lists[stage][position].op is Op.WAIT:
                awaited = joined[stage].get(waits[stage][position])
                if awaited is not None and needed[awaited]:
                    sleeping.setdefault(awaited, []).append(stage)
                    break
            at[stage] += 1
    stuck = {stage: meeting for meeting, stages in sleeping.items() for stage in stages}
    if stuck:
        _fail_stuck(lists, at, stuck, needed)


def _fail_stuck(
    lists: Sequence[tuple[Instruction, ...]],
    at: Sequence[int],
    stuck: dict[int, _Meeting],
    needed: dict[_Meeting, set[int]],
) -> None:
    """Follow who waits for whom until a stage comes up again: that is the circle."""
    chain = [min(stuck)]
    while (following := min(needed[stuck[chain[-1]]])) not in chain:
        chain.append(following)
    circle = chain[chain.index(following) :]
    story = ", ".join(f"stage {a} waits for stage {b}" for a, b in zip(circle, circle[1:] + circle[:1], strict=True))
    reject(f"stages wait in a circle: {story}", lists, [(stage, at[stage]) for stage in circle])
