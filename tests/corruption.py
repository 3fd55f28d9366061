"""Ways to break an execution plan, each certain to break it: what no verifier may let through.

A corruption takes the instructions of one stage and a source of choices, and changes the list, or says that there is no
place for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from graphshard.execution import MOVES, Instruction, Op, Ref, TensorType, match_waits

Body = list[Instruction]
Corruption = Callable[[Body, random.Random], bool]
"""Changes the list in place; False: it has no place for this."""

COLLECTIVE = (Op.GATHER, Op.REDUCE)


def _some(body: Body, choose: random.Random, wanted: Callable[[Instruction], bool]) -> int | None:
    found = [at for at, ins in enumerate(body) if wanted(ins)]
    return choose.choice(found) if found else None


def _wait_of(body: Body, started: int) -> int | None:
    """The WAIT that completes the communication at ``started``."""

    return next((wait for wait, begun in match_waits(body).items() if begun == started), None)


def _drop(op: Op) -> Corruption:
    def drop(body: Body, choose: random.Random) -> bool:
        at = _some(body, choose, lambda ins: ins.op is op)
        if at is None:
            return False
        wait = _wait_of(body, at)
        # What a dropped send would have kept busy is freed where it was; a receive's value is simply missing.
        for index in sorted({at, at if wait is None else wait}, reverse=True):
            del body[index]
        return True

    return drop


def _double(op: Op) -> Corruption:
    def double(body: Body, choose: random.Random) -> bool:
        at = _some(body, choose, lambda ins: ins.op is op)
        if at is None:
            return False
        again = body[at]
        if op is Op.RECV:
            again = replace(again, outputs=(Ref("again", again.outputs[0].microbatch),))
            more = [again, replace(body[at], op=Op.WAIT, inputs=again.outputs, outputs=(), type=None)]
            more.append(Instruction(Op.FREE, inputs=again.outputs))
        else:
            more = [again, replace(again, op=Op.WAIT, last=frozenset(), type=None)]
        body[at:at] = more
        return True

    return double


def _swap(wanted: Callable[[Instruction], object]) -> Corruption:
    """Exchange two neighbours among the instructions with equal keys; None is no key."""

    def swap(body: Body, choose: random.Random) -> bool:
        channels: dict[object, list[int]] = {}
        for at, ins in enumerate(body):
            if (key := wanted(ins)) is not None:
                channels.setdefault(key, []).append(at)
        pairs = [pair for places in channels.values() for pair in pairwise(places)]
        if not pairs:
            return False
        a, b = choose.choice(pairs)
        body[a], body[b] = body[b], body[a]
        return True

    return swap


def _change(wanted: Callable[[Instruction], bool], how: Callable[[Instruction], Instruction | None]) -> Corruption:
    def change(body: Body, choose: random.Random) -> bool:
        at = _some(body, choose, wanted)
        changed = None if at is None else how(body[at])
        if at is None or changed is None:
            return False
        body[at] = changed
        return True

    return change


def _resized(ins: Instruction) -> Instruction | None:
    assert ins.type is not None
    if not ins.type.shape or not ins.type.numel:
        return None
    shape = (ins.type.shape[0] * 2, *ins.type.shape[1:])
    return replace(ins, type=TensorType(shape, ins.type.dtype, ins.type.stride))


def _retyped(ins: Instruction) -> Instruction:
    assert ins.type is not None
    dtype = torch.float16 if ins.type.dtype is not torch.float16 else torch.float32
    return replace(ins, type=replace(ins.type, dtype=dtype))


def _other_peer(stages: int) -> Callable[[Instruction], Instruction | None]:
    def change(ins: Instruction) -> Instruction | None:
        assert ins.peer is not None
        return replace(ins, peer=(ins.peer + 1) % stages)

    return change


def _other_microbatch(ins: Instruction) -> Instruction:
    def shifted(refs: Sequence[Ref]) -> tuple[Ref, ...]:
        return tuple(Ref(ref.name, (ref.microbatch or 0) + 1) for ref in refs)

    return replace(
        ins, inputs=shifted(ins.inputs), outputs=shifted(ins.outputs), last=frozenset(shifted(tuple(ins.last)))
    )


def _other_place(ins: Instruction) -> Instruction:
    return replace(ins, name="cpu" if ins.name == "nvme" else "nvme")


def _drop_wait_of_move(body: Body, choose: random.Random) -> bool:
    at = _some(body, choose, lambda ins: ins.op in MOVES)
    wait = None if at is None else _wait_of(body, at)
    if wait is None:
        return False
    del body[wait]
    return True


def _free_early(body: Body, choose: random.Random) -> bool:
    """A value is forgotten right before its last use."""
    at = _some(body, choose, lambda ins: ins.op is Op.RUN and bool(ins.last))
    if at is None:
        return False
    ref = choose.choice(sorted(body[at].last))
    body[at] = replace(body[at], last=body[at].last - {ref})
    body.insert(at, Instruction(Op.FREE, inputs=(ref,)))
    return True


def _never_free(body: Body, choose: random.Random) -> bool:
    """An intermediate value stays; what is stored or comes from outside may."""
    made = {ref for ins in body for ref in ins.outputs if ":" not in ref.name}

    def goes(ins: Instruction) -> list[Ref]:
        refs = ins.inputs if ins.op is Op.FREE else ins.last if ins.op is Op.RUN else ()
        return sorted(ref for ref in refs if ref in made and ref not in ins.outputs)

    at = _some(body, choose, lambda ins: bool(goes(ins)))
    if at is None:
        return False
    ins, ref = body[at], choose.choice(goes(body[at]))
    if ins.op is Op.FREE:
        body[at] = replace(ins, inputs=tuple(r for r in ins.inputs if r != ref))
    else:
        body[at] = replace(ins, last=ins.last - {ref})
    return True


def _release_late(body: Body, choose: random.Random) -> bool:
    """A gathered parameter stays for one more segment than it is read by."""
    gathered = {ref for ins in body if ins.op is Op.GATHER for ref in ins.outputs}
    runs = [at for at, ins in enumerate(body) if ins.op is Op.RUN]
    at = _some(body, choose, lambda ins: ins.op is Op.RUN and bool(ins.last & gathered))
    if at is None or at == runs[-1]:
        return False
    ref = choose.choice(sorted(body[at].last & gathered))
    body[at] = replace(body[at], last=body[at].last - {ref})
    body.insert(next(run for run in runs if run > at) + 1, Instruction(Op.FREE, inputs=(ref,)))
    return True


def _circle(body: Body, choose: random.Random) -> bool:
    """Wait for a micro-batch's gradient before sending what it is the gradient of."""
    places = []
    for at, ins in enumerate(body):
        if ins.op is not Op.SEND or not ins.action.startswith("F"):
            continue
        for back in range(at + 1, len(body)):
            other = body[back]
            if other.op is Op.RECV and other.peer == ins.peer and other.action.startswith("B"):
                if other.outputs[0].microbatch == ins.inputs[0].microbatch:
                    places.append((at, back))
                break
    if not places:
        return False
    at, back = choose.choice(places)
    wait = _wait_of(body, back)
    assert wait is not None
    moved = [body[back], body[wait]]
    del body[wait], body[back]
    body[at:at] = moved
    return True


def _drop_wait(body: Body, choose: random.Random) -> bool:
    at = _some(body, choose, lambda ins: ins.op is Op.WAIT)
    if at is None:
        return False
    del body[at]
    return True


def _drop_collective(body: Body, choose: random.Random) -> bool:
    """One member stays away, and goes on with its own value under the name of what all would have made."""
    at = _some(body, choose, lambda ins: ins.op in COLLECTIVE and bool(ins.inputs))
    if at is None:
        return False
    wait = _wait_of(body, at)
    assert wait is not None
    ins = body[at]
    del body[wait]
    body[at] = Instruction(Op.BIND, inputs=ins.inputs, outputs=ins.outputs, action=ins.action)
    if ins.last:
        body.insert(at + 1, Instruction(Op.FREE, inputs=tuple(ins.last), action=ins.action))
    return True


def kinds(stages: int) -> dict[str, Corruption]:
    """Every kind by name. Those about collectives break one rank's plan; on all ranks alike some would be a valid
    other program."""
    transfers = (Op.SEND, Op.RECV)
    return {
        "a send is dropped": _drop(Op.SEND),
        "a receive is dropped": _drop(Op.RECV),
        "a send is doubled": _double(Op.SEND),
        "a receive is doubled": _double(Op.RECV),
        "a reload is dropped": _drop(Op.RELOAD),
        "a move has another place": _change(lambda ins: ins.op in MOVES, _other_place),
        "a move has another dtype": _change(lambda ins: ins.op in MOVES, _retyped),
        "a move is not waited for": _drop_wait_of_move,
        "two sends are swapped": _swap(lambda ins: ("to", ins.peer) if ins.op is Op.SEND else None),
        "two receives are swapped": _swap(lambda ins: ("from", ins.peer) if ins.op is Op.RECV else None),
        "two collectives are swapped": _swap(lambda ins: ins.axis if ins.op in COLLECTIVE else None),
        "a transfer is resized": _change(lambda ins: ins.op in transfers, _resized),
        "a collective is resized": _change(lambda ins: ins.op in COLLECTIVE, _resized),
        "a transfer has another dtype": _change(lambda ins: ins.op in transfers, _retyped),
        "a collective has another dtype": _change(lambda ins: ins.op in COLLECTIVE, _retyped),
        "another peer": _change(lambda ins: ins.op in transfers, _other_peer(stages)),
        "another micro-batch": _change(lambda ins: ins.op in transfers, _other_microbatch),
        "freed too early": _free_early,
        "never freed": _never_free,
        "released late": _release_late,
        "a circle of waits": _circle,
        "a wait is dropped": _drop_wait,
        "a group member is missing": _drop_collective,
    }
