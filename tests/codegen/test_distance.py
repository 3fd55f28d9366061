"""Copies start as far ahead of their use as they take, by what costs say, and a step holds no more for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphshard.codegen.distance import Clock, Move, reload_in_time, wait_in_time
from graphshard.codegen.lower import lower
from graphshard.codegen.schedule import make
from graphshard.execution import ExecutionPlan, Instruction, Op, Ref, Storage, match_waits
from graphshard.prove import prove
from handmade import kind, refs, run, wait
from layers import compiled_layers
from marks import full

Part = list[Instruction]


def step(text: str) -> Part:
    """``f`` runs a segment; ``+a`` reloads, ``-a`` offloads and ``?a`` waits; ``~a`` frees what was offloaded."""
    return [_instruction(word) for word in text.split()]


def _instruction(word: str) -> Instruction:
    sign, name = word[0], word[1:]
    match sign:
        case "+":
            return Instruction(Op.RELOAD, "cpu", refs(f"away_{name}"), refs(name), type=kind(int(name[1:])))
        case "-":
            return Instruction(Op.OFFLOAD, "cpu", refs(name), refs(f"away_{name}"), type=kind(int(name[1:])))
        case "?":
            return wait(name, "B0.0")
        case "~":
            return Instruction(Op.FREE, inputs=refs(name))
    return run(word, "", f"made_{word}", "B0.0")


def spelt(part: Part) -> str:
    signs = {Op.RELOAD: "+", Op.OFFLOAD: "-", Op.WAIT: "?", Op.FREE: "~", Op.RUN: ""}

    def name(ins: Instruction) -> str:
        if ins.op is Op.RUN:
            return ins.name
        return (ins.outputs if ins.op is Op.RELOAD else ins.inputs)[0].name

    return " ".join(signs[ins.op] + name(ins) for ins in part)


STORAGES = {name: Storage(Ref(name), 4 * int(name[1:]), "transfers") for name in ("a10", "b30", "c100")}
CLOCK = Clock(dict.fromkeys("uvwxyz", 30.0), lambda move: move.type.numel if move.type else 0.0)
"""A segment takes 30, an element that is moved 1."""


def moved(move: Move, text: str, begin: int = 0, room: list[int] | None = None) -> str:
    part = step(text)
    return spelt(move(part, begin, [10**6] * len(part) if room is None else room, STORAGES, CLOCK))


def test_a_small_copy_beside_large_work_starts_one_ahead() -> None:
    assert moved(reload_in_time, "u v w x y +a10 z ?a10") == "u v w x y +a10 z ?a10"


def test_a_large_copy_starts_as_many_ahead_as_it_takes() -> None:
    assert moved(reload_in_time, "u v w x y +c100 z ?c100") == "u v +c100 w x y z ?c100"


def test_copies_take_turns() -> None:
    """The first one is on its way before the second: by itself it would start ahead of ``z``."""
    assert moved(reload_in_time, "u v w x +b30 y +c100 z ?b30 ?c100") == "u +b30 v +c100 w x y z ?b30 ?c100"
    assert moved(reload_in_time, "u v w x y z +b30 ?b30") == "u v w x y +b30 z ?b30"


@pytest.mark.parametrize(("free_from", "expected"), [(1, "u v +c100 w x y z"), (3, "u v w +c100 x y z")])
def test_as_far_as_there_is_room(free_from: int, expected: str) -> None:
    room = [0 if at < free_from else 400 for at in range(8)]
    assert moved(reload_in_time, "u v w x y +c100 z ?c100", room=room) == f"{expected} ?c100"


def test_room_is_taken_once() -> None:
    room = [439] * 7 + [40]
    assert moved(reload_in_time, "u v w x +c100 +a10 y ?c100 ?a10", room=room).startswith("u +c100 v w x +a10 y")


def test_not_ahead_of_what_puts_it_there() -> None:
    assert (
        moved(reload_in_time, "u v -c100 w ?away_c100 x y +c100 z ?c100") == "u v -c100 w ?away_c100 +c100 x y z ?c100"
    )


def test_what_is_before_the_beginning_stays() -> None:
    assert moved(reload_in_time, "u v w +c100 x ?c100 y +a10 ?a10", begin=6) == "u v w +c100 x ?c100 +a10 y ?a10"


def test_an_offload_is_waited_for_when_it_is_done() -> None:
    text = "-a10 u ?away_a10 ~a10 -c100 v ?away_c100 ~c100 w x y z"
    assert moved(wait_in_time, text) == "-a10 u ?away_a10 ~a10 -c100 v w x y ?away_c100 ~c100 z"


def test_what_leaves_is_held_where_there_is_room() -> None:
    text = "-c100 v ?away_c100 ~c100 w x y z"
    assert moved(wait_in_time, text, room=[400] * 6 + [0] * 2) == "-c100 v w x ?away_c100 ~c100 y z"


def test_what_is_reloaded_has_left() -> None:
    text = "-c100 v ?away_c100 ~c100 w +d100 x y z ?d100"
    reload = step(text)
    at = next(at for at, ins in enumerate(reload) if ins.op is Op.RELOAD)
    reload[at] = replace(reload[at], inputs=refs("away_c100"))
    assert spelt(wait_in_time(reload, 0, [10**6] * len(reload), STORAGES, CLOCK)) == (
        "-c100 v w ?away_c100 ~c100 +d100 x y z ?d100"
    )


def test_what_is_handed_over_stays_behind_a_copy_that_reads_it_meanwhile() -> None:
    """A value that two phases read is reloaded twice."""
    part = step("u +c100 v w ?c100 x +d100 z ?d100")
    at = next(at for at, ins in enumerate(part) if ins.outputs == refs("d100"))
    source = refs("away_c100")
    for last, expected in ((source, "+c100 u v w ?c100 +d100 x z ?d100"), ((), "+c100 u +d100 v w ?c100 x z ?d100")):
        part[at] = replace(part[at], inputs=source, last=frozenset(last))
        assert spelt(reload_in_time(part, 0, [10**6] * len(part), STORAGES, CLOCK)) == expected


PLANS = [
    ("zero3+offload:optimizer=cpu,params=cpu", 64),
    full("zero3+accum2+offload:params=cpu", 64),
    ("zero3+accum2+offload:activations=cpu", 512),
    ("dp2+accum2+offload:optimizer=cpu,activations=cpu", 256),
    full("zero3+pp2+offload:optimizer=cpu,params=cpu,activations=cpu", 512),
]


def planned(plan: str, rows: int) -> ExecutionPlan:
    program = compiled_layers(plan, layers=8, rows=rows)[0].program
    return lower(program, make("1f1b", program.stages, program.microbatches), on_gpu=True)


def distance(plan: ExecutionPlan) -> int:
    """How many segments run between the start of a move and its WAIT, in all."""
    found = 0
    for stage in plan.stages:
        instructions = stage.step()
        for waited, started in match_waits(instructions).items():
            if instructions[started].op in (Op.RELOAD, Op.OFFLOAD):
                found += sum(ins.op is Op.RUN for ins in instructions[started:waited])
    return found


@pytest.mark.parametrize(("plan", "rows"), PLANS)
def test_dear_copies_are_apart_in_the_same_memory(plan: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a byte of the host is dear beside such small products."""
    apart = planned(plan, rows)
    prove(apart)
    with monkeypatch.context() as patch:
        patch.setattr("graphshard.codegen.order._copied_in_time", lambda parts, memory: parts)
        near = planned(plan, rows)
    assert apart.peak_bytes == near.peak_bytes
    assert distance(apart) > distance(near)
