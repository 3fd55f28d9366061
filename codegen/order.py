"""Orders the instructions of a stage: communication starts early and is waited for late, values die at their last use.

Only here is the interleaving of micro-batches known: 1F1B runs F3, B1, F4, and the receive of F4 can be posted before B1.
"""

from __future__ import annotations

from dataclasses import replace

from graphshard.execution import Instruction, Op, Ref, match_waits

_PERSISTENT = ("shard:", "flat:", "param:", "buffer:", "state:", "constant:", "lr:", "loss:", "output:")


def order(
    prologue: list[Instruction],
    body: list[Instruction],
    epilogue: list[Instruction],
    first_epilogue: list[Instruction] | None,
) -> tuple[list[Instruction], list[Instruction], list[Instruction], list[Instruction] | None]:
    """The same instructions in the order they are issued in, with WAITs of sends, hand-overs and FREEs in place."""
    body = _post_receives_early(body)
    body = _wait_for_sends(body)
    epilogue = _wait_for_sends(epilogue)
    first_epilogue = None if first_epilogue is None else _wait_for_sends(first_epilogue)
    # Both epilogues read what the body leaves: a carry lives until the last read in either.
    carried = {ref for part in (epilogue, first_epilogue or []) for ins in part for ref in ins.inputs}
    prologue_and_body = _with_last_uses(prologue + body, carried)
    cut = _boundary(prologue_and_body)
    return (
        prologue_and_body[:cut],
        prologue_and_body[cut:],
        _with_last_uses(epilogue, set()),
        None if first_epilogue is None else _with_last_uses(first_epilogue, set()),
    )


def _boundary(instructions: list[Instruction]) -> int:
    return next((i for i, ins in enumerate(instructions) if ins.action != "prologue"), len(instructions))


def _post_receives_early(body: list[Instruction]) -> list[Instruction]:
    """Post the receives of an action before the action ahead of it runs: the transfer hides behind that."""
    actions: list[list[Instruction]] = []
    for ins in body:
        if not actions or actions[-1][0].action != ins.action:
            actions.append([])
        actions[-1].append(ins)
    result: list[Instruction] = []
    posted = [ins for ins in actions[0] if ins.op is Op.RECV] if actions else []
    result += posted
    for index, action in enumerate(actions):
        if index + 1 < len(actions):
            result += [ins for ins in actions[index + 1] if ins.op is Op.RECV]
        result += [ins for ins in action if ins.op is not Op.RECV]
    return result


def _wait_for_sends(instructions: list[Instruction]) -> list[Instruction]:
    """A channel carries one message at a time: wait for the one before, and for the last ones at the end."""
    outstanding: dict[int | None, Instruction] = {}
    result: list[Instruction] = []
    for ins in instructions:
        if ins.op is Op.SEND:
            if (before := outstanding.get(ins.peer)) is not None:
                result.append(_wait_for(before, ins.action))
            outstanding[ins.peer] = ins
        result.append(ins)
    end = instructions[-1].action if instructions else ""
    return result + [_wait_for(send, end) for send in outstanding.values()]


def _wait_for(send: Instruction, action: str) -> Instruction:
    return Instruction(Op.WAIT, inputs=send.inputs, peer=send.peer, action=action, made_by=send.made_by)


def _with_last_uses(instructions: list[Instruction], carried: set[Ref]) -> list[Instruction]:
    """Hand over every value at its last use, and free those that nothing reads."""
    last: dict[Ref, int] = {}
    for index, ins in enumerate(instructions):
        if not (ins.op is Op.WAIT and ins.peer is not None):  # a send's WAIT names what was sent, but does not read it
            last |= dict.fromkeys((*ins.inputs, *ins.outputs), index)
    for wait, start in match_waits(instructions).items():
        for ref in instructions[start].inputs:
            if start < last[ref] < wait:  # somebody else reads it while it is on its way
                last[ref] = wait
    dying: dict[int, list[Ref]] = {}
    for ref, index in last.items():
        if ref not in carried and not ref.name.startswith(_PERSISTENT):
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
