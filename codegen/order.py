"""Orders the instructions of a stage: communication starts early and is waited for late, values die at their last use.

Only here is the interleaving of micro-batches known: 1F1B runs F3, B1, F4, and the receive of F4 is posted before B1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from graphshard.codegen.distance import Clock, Move, reload_in_time, wait_in_time
from graphshard.codegen.early import update_early
from graphshard.codegen.sends import Ahead
from graphshard.execution import MOVES, Instruction, Op, Ref, Storage, match_waits, owner_of
from graphshard.program import Role

_PERSISTENT = tuple(f"{role}:" for role in Role if role not in (Role.CARRY, Role.BATCH, Role.RNG))
"""What names of values that outlive a step, or that the executor keeps, begin with."""

_ATTEMPTS = 4
"""How often updates are paced for one limit; a plan that still holds more does not take it."""

Part = list[Instruction]
Parts = tuple[Part, Part, Part, Part | None]
"""Prologue, body, epilogue and, if it differs, the first step's epilogue."""


@dataclass(frozen=True)
class Memory:
    """What is known of the memory of a stage: where values live, by name, and the bytes held at each instruction of a
    step that consists of ``Parts``, for each of its epilogues; and of the time that its work takes."""

    storages: Mapping[str, Storage]
    held: Callable[[Parts], list[list[int]]]
    clock: Clock


def order(
    prologue: list[Instruction],
    body: list[Instruction],
    epilogue: list[Instruction],
    first_epilogue: list[Instruction] | None,
    memory: Memory | None = None,
    ahead: Ahead | None = None,
) -> Parts:
    """The same instructions in the order they are issued in, with WAITs of sends, hand-overs and FREEs in place.

    With ``memory``, updates may come before the end of the body: its rest is then part of the epilogues. Copies start
    as early as they take, where that needs no more memory. ``ahead``: of which sends others need not wait (sends.py).
    """
    body, epilogue, first_epilogue = _reduce_early(body, epilogue, first_epilogue)
    actions = _by_action(body)
    _gather_ahead(actions)
    _reload_ahead(actions)
    _accumulate_late(actions)
    _post_receives_early(actions)
    body = _wait_for_sends([ins for action in actions for ins in action], ahead or {})
    ends = [_wait_for_sends(end, {}) for end in (epilogue, first_epilogue) if end is not None]
    parts = _finished(prologue, body, ends)
    if memory is None:
        return parts
    if any(ins.op is Op.OFFLOAD for end in ends for ins in end):
        parts = _updated_early(prologue, body, ends, parts, memory)
    return _copied_in_time(parts, memory)


def _finished(prologue: Part, body: Part, ends: list[Part]) -> Parts:
    """Everything in place that is put where values are used last."""
    before = _wait_for_offloads(prologue) + _wait_for_offloads(body)
    before, ends = _with_last_uses(before, [_wait_for_offloads(end) for end in ends])
    cut = _boundary(before)
    return before[:cut], before[cut:], ends[0], ends[1] if len(ends) > 1 else None


def _updated_early(prologue: Part, body: Part, ends: list[Part], late: Parts, memory: Memory) -> Parts:
    """Updates during the last backward, such that a step holds no more than with all of them at its end.

    Where that leaves most of them for the end, as when gradients take the place of activations one by one, it may hold
    the state of one bucket more: transfers would overlap nothing.
    """
    timelines = memory.held(late)
    peak_bytes = max(map(max, timelines))
    held = [_while_running(body, _step(late, end), line) for end, line in zip(late[2:], timelines, strict=False)]
    for limit_bytes in (peak_bytes, peak_bytes + _largest_bucket_bytes(ends, memory.storages)):
        aim_bytes = limit_bytes  # turns are paced by an estimate
        for _ in range(_ATTEMPTS):
            room = [[aim_bytes - taken for taken in line] for line in held]
            parts = _finished(prologue, *update_early(body, ends, memory.storages, room))
            excess = max(map(max, memory.held(parts))) - limit_bytes
            if excess <= 0:
                break
            aim_bytes -= excess
        if excess <= 0 and (limit_bytes > peak_bytes or _mostly_early(parts[2])):
            return parts
    return late


def _copied_in_time(parts: Parts, memory: Memory) -> Parts:
    """Copies as far apart from what waits for them as they take, in the memory that the step needs anyway."""
    if not any(ins.op in MOVES for part in parts for ins in part or ()):
        return parts
    peak_bytes = max(map(max, memory.held(parts)))
    for move in (reload_in_time, wait_in_time):
        parts = _apart(parts, memory, peak_bytes, move)
    return parts


def _apart(parts: Parts, memory: Memory, peak_bytes: int, move: Move) -> Parts:
    """First in what all steps share, then in each end: what starts earlier than that makes less of it shared."""
    prologue, body, end, first = parts
    ends = [part for part in (end, first) if part is not None]

    def room(parts: Parts) -> list[list[int]]:
        return [[peak_bytes - taken for taken in line[len(prologue) :]] for line in memory.held(parts)]

    body = move(body, 0, [min(now) for now in zip(*room(parts), strict=False)], memory.storages, memory.clock)
    steps = [
        move(body + part, len(body), spare, memory.storages, memory.clock)
        for part, spare in zip(ends, room((prologue, body, end, first)), strict=True)
    ]
    cut = next((at for at, now in enumerate(zip(body, *steps, strict=False)) if len(set(map(id, now))) > 1), len(body))
    return prologue, body[:cut], steps[0][cut:], steps[1][cut:] if len(steps) > 1 else None


def _step(parts: Parts, end: Part | None) -> Part:
    return parts[0] + parts[1] + (end or [])


def _while_running(body: Part, step: Part, held: Sequence[int]) -> list[int]:
    """What is ``held`` at each instruction of the body, and at those that come in between in ``step``."""
    result: list[int] = []
    taken = 0
    for ins, nbytes in zip(step, held, strict=True):
        if len(result) == len(body):
            break
        taken = max(taken, nbytes)
        if replace(ins, last=frozenset()) == body[len(result)]:
            result.append(taken)
            taken = 0
    return result


def _largest_bucket_bytes(ends: list[Part], storages: Mapping[str, Storage]) -> int:
    """What the update of one bucket offloads at most."""
    sizes: Counter[str] = Counter()
    for ins in ends[0]:
        if ins.op is Op.OFFLOAD:
            sizes[owner_of(ins)] += storages[ins.inputs[0].name].nbytes
    return max(sizes.values(), default=0)


def _mostly_early(end: Part) -> bool:
    """Whether more than half of the values that the updates offload leave while there is work beside it."""
    body = max((at for at, ins in enumerate(end) if ins.action != "epilogue"), default=-1)
    offloads = [at for at, ins in enumerate(end) if ins.op is Op.OFFLOAD]
    return 2 * sum(at < body for at in offloads) > len(offloads)


def _boundary(instructions: list[Instruction]) -> int:
    return next((i for i, ins in enumerate(instructions) if ins.action != "prologue"), len(instructions))


def _by_action(body: list[Instruction]) -> list[list[Instruction]]:
    actions: list[list[Instruction]] = []
    for ins in body:
        if not actions or actions[-1][-1].action != ins.action:
            actions.append([])
        actions[-1].append(ins)
    return actions


def _reduce_early(
    body: list[Instruction], epilogue: list[Instruction], first_epilogue: list[Instruction] | None
) -> tuple[list[Instruction], list[Instruction], list[Instruction] | None]:
    """Start reducing a gradient when the last micro-batch has added to it, while the rest of its backward runs.

    Both epilogues wait for the one reduction: what the first-step epilogue calls it is renamed.
    """
    written = {ref: index for index, ins in enumerate(body) if ins.op is Op.RUN for ref in ins.outputs}
    moved: dict[int, list[Instruction]] = {}
    renamed: dict[Ref, Ref] = {}
    kept: list[Instruction] = []
    for ins in epilogue:
        twin = ins if first_epilogue is None else next((t for t in first_epilogue if _same_reduction(ins, t)), None)
        if twin is None or ins.op is not Op.REDUCE or ins.axis == "pp" or ins.inputs[0] not in written:
            kept.append(ins)
            continue
        at = written[ins.inputs[0]]
        moved.setdefault(at, []).append(replace(ins, action=body[at].action))
        renamed[twin.outputs[0]] = ins.outputs[0]
    if first_epilogue is not None:
        rest = [t for t in first_epilogue if not (t.op is Op.REDUCE and t.outputs[0] in renamed)]
        first_epilogue = [_renamed(ins, renamed) for ins in rest]
    body = [after for index, ins in enumerate(body) for after in (ins, *moved.get(index, ()))]
    return body, kept, first_epilogue


def _same_reduction(a: Instruction, b: Instruction) -> bool:
    return a.op is b.op is Op.REDUCE and (a.name, a.inputs, a.axis) == (b.name, b.inputs, b.axis)


def _renamed(ins: Instruction, names: dict[Ref, Ref]) -> Instruction:
    inputs, outputs = (tuple(names.get(ref, ref) for ref in refs) for refs in (ins.inputs, ins.outputs))
    return replace(ins, inputs=inputs, outputs=outputs)


def _gather_ahead(actions: list[list[Instruction]]) -> None:
    """Start the first gather of an action while the last bucket of the action before it computes."""
    for current, following in pairwise(actions):
        first = next((ins for ins in following if ins.op is Op.GATHER), None)
        if first is None:
            continue
        gathered = {ins.outputs[0] for ins in current if ins.op is Op.GATHER}
        waits = [i for i, ins in enumerate(current) if ins.op is Op.WAIT and ins.inputs[0] in gathered]
        moved = [first]
        following.remove(first)
        reload = next((ins for ins in following if ins.op is Op.RELOAD and ins.outputs == first.inputs), None)
        if reload is not None:  # it starts one bucket earlier still
            arrived = next(ins for ins in following if ins.op is Op.WAIT and ins.inputs == first.inputs)
            moved = [arrived, first]
            following.remove(reload)
            following.remove(arrived)
        at = waits[-1] + 1 if waits else 0
        current[at:at] = moved
        if reload is not None:
            current.insert(waits[-2] + 1 if len(waits) > 1 else 0, reload)


def _reload_ahead(actions: list[list[Instruction]]) -> None:
    """Start what an action reloads first before the last segment of the action before it."""
    for current, following in pairwise(actions):
        until = next((i for i, ins in enumerate(following) if ins.op is Op.WAIT), len(following))
        early = [ins for ins in following[:until] if ins.op is Op.RELOAD]
        runs = [i for i, ins in enumerate(current) if ins.op is Op.RUN]
        handles = {ref for ins in early for ref in ins.inputs}
        offloads = [i + 1 for i, ins in enumerate(current) if handles.intersection(ins.outputs)]
        at = max([*offloads, *runs[-1:]], default=0)
        current[at:at] = early
        following[:] = [ins for ins in following if ins not in early]


def _accumulate_late(actions: list[list[Instruction]]) -> None:
    """The last reduce-scatter of an action is waited for in the next one, behind its first segment."""
    for current, following in pairwise(actions):
        if len(current) < 2 or current[-2].op is not Op.WAIT or current[-1].op is not Op.RUN:
            continue
        wait, run = current[-2:]
        reduced = {ins.outputs[0] for ins in current if ins.op is Op.REDUCE}
        others = set(run.inputs) | set(run.outputs)
        behind = next((i for i, ins in enumerate(following) if ins.op is Op.RUN), None)
        if wait.inputs[0] not in reduced or wait.inputs[0] not in run.inputs or behind is None:
            continue
        if others & {ref for ins in following[: behind + 1] for ref in (*ins.inputs, *ins.outputs)}:
            continue
        following[behind + 1 : behind + 1] = [wait, run]
        del current[-2:]


def _post_receives_early(actions: list[list[Instruction]]) -> None:
    """Post the receives of an action before the action ahead of it runs: the transfer hides behind that."""
    receives = [[ins for ins in action if ins.op is Op.RECV] for action in actions]
    for index, action in enumerate(actions):
        posted = receives[index] if index == 0 else []
        posted = posted + (receives[index + 1] if index + 1 < len(actions) else [])
        action[:] = posted + [ins for ins in action if ins.op is not Op.RECV]


def _wait_for_sends(instructions: list[Instruction], ahead: Ahead) -> list[Instruction]:
    """Before something is sent, wait for what was sent there before, but for what the last actions sent that are
    ``ahead``; and for the last ones at the end."""
    outstanding: dict[int, list[Instruction]] = {}
    senders: dict[int, list[str]] = {}
    result: list[Instruction] = []
    for ins in instructions:
        if ins.op is Op.SEND:
            assert ins.peer is not None
            before, actions = outstanding.get(ins.peer, []), senders.setdefault(ins.peer, [])
            if ins.action not in actions:
                actions.append(ins.action)
            late = actions[max(len(actions) - ahead.get((ins.action, ins.peer), 0), 0) :]
            result += [_wait_for(send, ins.action) for send in before if send.action not in late]
            outstanding[ins.peer] = [*(send for send in before if send.action in late), ins]
        result.append(ins)
    end = instructions[-1].action if instructions else ""
    return result + [_wait_for(send, end) for sends in outstanding.values() for send in sends]


def _wait_for(send: Instruction, action: str) -> Instruction:
    return Instruction(Op.WAIT, inputs=send.inputs, peer=send.peer, action=action, made_by=send.made_by)


def _wait_for_offloads(instructions: list[Instruction]) -> list[Instruction]:
    """Of two buckets, or two activations, values are on their way out at a time: what they took is free after that.

    What is reloaded must have left before.
    """
    outstanding: list[Instruction] = []
    awaited: set[tuple[Ref, ...]] = set()
    result: list[Instruction] = []
    for ins in instructions:
        if ins.op is Op.WAIT:
            outstanding = [other for other in outstanding if other.outputs != ins.inputs]
            if ins.inputs in awaited:  # here it comes too late
                continue
        own = owner_of(ins) if ins.op in MOVES else ""
        late = dict.fromkeys(owner_of(other) for other in outstanding)
        excess = [owner for owner in late if owner != own][:-1] if own else []
        done = [
            o for o in outstanding if owner_of(o) in excess or (ins.op is not Op.WAIT and o.outputs[0] in ins.inputs)
        ]
        for other in done:
            result.append(Instruction(Op.WAIT, inputs=other.outputs, action=ins.action, made_by=other.made_by))
            outstanding.remove(other)
            awaited.add(other.outputs)
        if ins.op is Op.OFFLOAD:
            outstanding.append(ins)
        result.append(ins)
    return result + [
        Instruction(Op.WAIT, inputs=other.outputs, action=result[-1].action, made_by=other.made_by)
        for other in outstanding
    ]


def _with_last_uses(
    before: list[Instruction], ends: list[list[Instruction]]
) -> tuple[list[Instruction], list[list[Instruction]]]:
    """Hand over every value at its last use, and free those that nothing reads.

    A step is ``before`` and one of the ``ends``: what any of them reads lives until then.
    """
    last = [_last_uses(before + end) for end in ends]
    late = {ref for uses in last for ref, index in uses.items() if index >= len(before)}
    dying = {ref: index for ref, index in last[0].items() if ref not in late}
    return _freed(before, dying), [
        _freed(end, {ref: index - len(before) for ref, index in uses.items() if index >= len(before)})
        for end, uses in zip(ends, last, strict=True)
    ]


def _last_uses(instructions: list[Instruction]) -> dict[Ref, int]:
    """Where values are read last that do not outlive the step."""
    last: dict[Ref, int] = {}
    for index, ins in enumerate(instructions):
        if not (ins.op is Op.WAIT and ins.peer is not None):  # a send's WAIT names what was sent, but does not read it
            last |= dict.fromkeys((*ins.inputs, *ins.outputs), index)
    for wait, start in match_waits(instructions).items():
        for ref in instructions[start].inputs:
            # Somebody else reads it while it is on its way; and what is offloaded is read until then.
            if start < last[ref] < wait or (instructions[start].op is Op.OFFLOAD and last[ref] < wait):
                last[ref] = wait
    return {ref: index for ref, index in last.items() if not ref.name.startswith(_PERSISTENT)}


def _freed(instructions: list[Instruction], last: Mapping[Ref, int]) -> list[Instruction]:
    dying: dict[int, list[Ref]] = {}
    for ref, index in last.items():
        dying.setdefault(index, []).append(ref)
    result: list[Instruction] = []
    for index, ins in enumerate(instructions):
        refs = dying.get(index, [])
        if ins.op not in (Op.WAIT, Op.FREE):
            handed = frozenset(ref for ref in refs if ref in ins.inputs and ref not in ins.outputs)
            ins = replace(ins, last=handed)
            refs = [ref for ref in refs if ref not in handed]
        result.append(ins)
        if refs:
            result.append(Instruction(Op.FREE, inputs=tuple(refs), action=ins.action))
    return result
