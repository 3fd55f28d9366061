"""Values of a step lie in one block of memory such that none is written over while it is needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphshard
from graphshard.errors import LayoutMismatch
from graphshard.execution import (
    ExecutionPlan,
    Instruction,
    Op,
    Place,
    Ref,
    Segment,
    StagePlan,
    Storage,
    TensorType,
    slot_ref,
)
from graphshard.memory.arena import ALIGNMENT, Gathered, Given, Layout, Resident, lay_out, pack
from graphshard.memory.spans import Span, memory_spans
from graphshard.mesh import Mesh
from graphshard.program import Role, Slot
from graphshard.runtime.arena import Arena, Placing, Residents, Shared, SharedArena
from graphshard.runtime.local import LocalExecutor

F32 = TensorType((64,), torch.float32, (1,))
CPU = torch.device("cpu")

spans = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(0, 30), st.integers(0, 10)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=40,
)


@given(spans)
def test_what_is_needed_at_once_does_not_overlap(wanted: list[tuple[int, int, int]]) -> None:
    offsets, nbytes = pack(wanted)
    placed = list(zip(wanted, offsets, strict=True))
    for ((size, begin, end), at), ((other_size, other_begin, other_end), other) in combinations(placed, 2):
        if begin <= other_end and other_begin <= end:
            assert at + size <= other or other + other_size <= at
    assert all(at % ALIGNMENT == 0 for at in offsets)
    assert nbytes >= max((at + size for (size, _, _), at in placed), default=0)


@given(st.lists(st.integers(1, 5000), max_size=20))
def test_values_that_follow_one_another_take_the_room_of_the_largest(sizes: list[int]) -> None:
    _, nbytes = pack([(size, time, time) for time, size in enumerate(sizes)])
    assert nbytes == -(-max(sizes, default=0) // ALIGNMENT) * ALIGNMENT


def plan_of(*step: Instruction, segments: Mapping[str, Segment]) -> ExecutionPlan:
    stage = StagePlan((), step, (), None, dict(segments))
    return ExecutionPlan(Mesh((("pp", 1), ("dp", 2))), (stage,), 1, "", ({},), ({},), {}, {}, {})


def ref(name: str) -> Ref:
    return Ref(name, 0)


def run(name: str, inputs: str, outputs: str, last: str = "") -> Instruction:
    return Instruction(
        Op.RUN,
        name,
        tuple(map(ref, inputs.split())),
        tuple(map(ref, outputs.split())),
        frozenset(map(ref, last.split())),
    )


def test_an_input_ends_where_the_code_lets_it_go() -> None:
    segments = {
        "f": Segment("f", "", (), ("a",), places=(Place(F32, 1, 3, (0,)),)),
        "g": Segment("g", "", ("a",), ("b",), places=(Place(F32, 0, 2), Place(F32, 2, 5, (0,))), ends=(1,)),
        "h": Segment("h", "", ("b",), (), ends=(0,)),
    }
    plan = plan_of(run("f", "", "a"), run("g", "a", "b", "a"), run("h", "b", "", "b"), segments=segments)
    # f has items 0 to 3, g 4 to 9, h item 10.
    assert memory_spans(plan, 0) == [
        Span(256, 1, 5, 0, 0),
        Span(256, 4, 6, 1, 0),
        Span(256, 6, 10, 1, 1),
    ]
    layout = lay_out(plan, 0)
    assert layout.nbytes == layout.alive_bytes == 512, "the last takes the place of the first"


def test_an_output_that_lives_in_an_input_keeps_its_memory() -> None:
    segments = {
        "f": Segment("f", "", (), ("a",), places=(Place(F32, 0, 1, (0,)),)),
        "g": Segment("g", "", ("a",), ("carry",), ends=(1,), aliases=((0, 0),)),
        "h": Segment("h", "", ("carry",), (), ends=(0,)),
    }
    made = [run("f", "", "a"), run("g", "a", "carry", "a")]
    plan = plan_of(*made, run("h", "carry", "", "carry"), segments=segments)
    assert memory_spans(plan, 0) == [Span(256, 0, 4, 0, 0)]
    assert memory_spans(plan_of(*made, segments=segments), 0) == [], "what the step leaves is not in the block"


def test_communication_reads_and_writes_until_its_wait() -> None:
    segments = {"f": Segment("f", "", (), ("a",), places=(Place(F32, 0, 0, (0,)),))}
    reduce = Instruction(
        Op.REDUCE, "reduce_scatter", (ref("a"),), (ref("b"),), frozenset([ref("a")]), axis="dp", type=F32
    )
    wait = Instruction(Op.WAIT, inputs=(ref("b"),))
    free = Instruction(Op.FREE, inputs=(ref("b"),))
    plan = plan_of(run("f", "", "a"), reduce, wait, free, segments=segments)
    assert memory_spans(plan, 0) == [Span(256, 0, 2, 0, 0, given="dp"), Span(128, 1, 3, 1)]
    forgotten = plan_of(run("f", "", "a"), reduce, free, segments=segments)
    assert memory_spans(forgotten, 0) == [], "nobody waits, so nobody knows when it is over"


def gather(source: str, result: str) -> tuple[Instruction, Instruction]:
    started = Instruction(Op.GATHER, "all_gather", (ref(source),), (ref(result),), axis="dp", type=F32)
    return started, Instruction(Op.WAIT, inputs=(ref(result),))


def test_what_ranks_gather_lies_in_memory_that_they_share() -> None:
    """By turns in two places, for as long as it is read; but not what the step leaves, or nobody reads."""
    segments = {"f": Segment("f", "", ("w",), (), ends=(0,)), "g": Segment("g", "", ("w",), (), ends=(0,))}
    a, b, c, unread, kept = (gather("shard", name) for name in ("a", "b", "c", "unread", "kept"))
    body = [*a, b[0], run("f", "a", "", "a"), b[1], c[0], run("g", "b", ""), Instruction(Op.FREE, inputs=(ref("b"),))]
    body += [c[1], run("f", "c", "", "c"), unread[0], Instruction(Op.FREE, inputs=(ref("unread"),)), unread[1], *kept]
    plan = plan_of(*body, segments=segments)
    layout = lay_out(plan, 0, shared=("dp",))
    assert layout.gathered == {0: Gathered("dp", 0, 3), 2: Gathered("dp", 512, 7), 5: Gathered("dp", 0, 9)}
    assert layout.shared_bytes == {"dp": 1024}
    assert set(layout.made) == {10}
    assert not lay_out(plan, 0).gathered and set(lay_out(plan, 0).made) == {0, 2, 5, 10}


SHARD = Slot(Role.SHARD, "w")
PART = slot_ref(SHARD)
STORED = {"new": Storage(PART, 128, "parameters"), PART.name: Storage(PART, 128, "parameters")}


def update(results: bool = True, **parts: Any) -> ExecutionPlan:
    """What gathers a part that the step replaces, by a segment that ``parts`` may say to do so in place."""
    half = TensorType((32,), torch.float32, (1,))
    segments = {"f": Segment("f", "", ("w",), (), ends=(0,)), "u": Segment("u", "", ("w",), ("new",))}
    started = Instruction(Op.GATHER, "all_gather", (PART,), (ref("a"),), axis="dp", type=half)
    once = (started, Instruction(Op.WAIT, inputs=(ref("a"),)), run("f", "a", "", "a"))
    new = Instruction(Op.RUN, "u", (PART,), (Ref("new"),))
    bind = Instruction(Op.BIND, inputs=(Ref("new"),), outputs=(PART,))
    epilogue = (new, bind) if results else ()
    stage = StagePlan((), once, epilogue, segments=segments, **parts)
    slots: dict[Slot, TensorType] = {SHARD: half}
    written = slots if results else {}
    return ExecutionPlan(Mesh((("pp", 1), ("dp", 2))), (stage,), 1, "", (slots,), (written,), {}, {}, {})


def test_what_ranks_store_lies_where_they_gather_it_if_it_is_replaced_there() -> None:
    layout = lay_out(update(storages=STORED), 0, shared=("dp",))
    assert layout.residents == {0: Resident("dp", PART, 256, 2)} and layout.replaced == {"dp": (3,)}
    assert not layout.gathered and layout.shared_bytes == {"dp": 0} and 0 not in layout.made
    assert layout.residents_along("dp") == {PART: 256} and not layout.residents_along("shard")
    assert lay_out(update(storages=STORED), 0, shared=("dp",)).shared_along("dp") == layout.shared_along("dp")
    first = Instruction(Op.RUN, "u", (PART,), (Ref("made"),)), Instruction(Op.BIND, "", (Ref("made"),), (PART,))
    late = Instruction(Op.RUN, "f", (ref("a"),), (), frozenset([ref("a")]))
    again = replace(update(storages=STORED).stages[0], body=update().stages[0].body[:2])
    new, bind = again.epilogue
    others = {
        "replaced by what lies elsewhere": update(),
        "in the first step": update(storages=STORED, first_epilogue=first),
        "not on the device": update(storages=STORED, homes={PART: "cpu"}),
        "an evaluation": update(results=False),
        "read when it is written": replace(update(), stages=(replace(again, epilogue=(new, late, bind)),)),
    }
    for why, plan in others.items():
        found = lay_out(plan, 0, shared=("dp",))
        assert not found.residents and not found.replaced and list(found.gathered) == [0], why
        assert found.shared_along("dp") != layout.shared_along("dp")


def test_what_is_never_replaced_lies_where_ranks_gather_it_while_others_are_trained() -> None:
    plan = update(storages=STORED)
    frozen = Slot(Role.SHARD, "frozen")
    started = replace(plan.stages[0].body[0], inputs=(slot_ref(frozen),))
    stage = replace(plan.stages[0], body=(started, *plan.stages[0].body[1:]))
    plan = replace(plan, stages=(stage,), reads=({**plan.reads[0], frozen: plan.reads[0][SHARD]},))
    layout = lay_out(plan, 0, shared=("dp",))
    assert layout.residents == {0: Resident("dp", slot_ref(frozen), 256, 2)}
    assert layout.replaced == {"dp": (5,)}, "behind the last instruction"


def test_a_part_that_is_replaced_while_others_are_yet_to_be_gathered_is_not_read_then() -> None:
    names = ("w", "v", "u")
    parts = {name: Slot(Role.SHARD, name) for name in names}
    one = update(storages=STORED)
    kind, stage = one.reads[0][SHARD], one.stages[0]

    def of(name: str, *instructions: Instruction) -> list[Instruction]:
        to = {PART: slot_ref(parts[name]), Ref("new"): Ref(f"new_{name}"), ref("a"): ref(name)}
        return [
            replace(
                ins,
                inputs=tuple(to[i] for i in ins.inputs),
                outputs=tuple(to[o] for o in ins.outputs),
                last=frozenset(to[i] for i in ins.last),
            )
            for ins in instructions
        ]

    def layout(*order: tuple[str, bool]) -> Layout:
        step = [ins for name, new in order for ins in of(name, *(stage.epilogue if new else stage.body))]
        storages = {
            called: Storage(slot_ref(parts[name]), 128, "parameters")
            for name in names
            for called in (f"new_{name}", slot_ref(parts[name]).name)
        }
        slots = dict.fromkeys(parts.values(), kind)
        again = replace(stage, body=tuple(step), epilogue=(), storages=storages)
        return lay_out(replace(one, stages=(again,), reads=(slots,), results=(slots,)), 0, shared=("dp",))

    gathered = [(name, False) for name in names]
    assert layout(*gathered, *((name, True) for name in names)).replaced == {"dp": (9,)}
    late = layout(("w", False), ("w", True), ("v", False), ("u", False), ("u", True), ("v", True))
    assert late.replaced == {"dp": (3, 11)}, "w is read before one, v and u before the other"
    assert len(late.residents) == 3
    both = layout(("w", False), ("v", False), ("w", True), ("u", False), ("v", True), ("u", True))
    assert both.replaced == {"dp": (6, 13)}, "v was not read behind where w was written to"


def test_what_ranks_reduce_lies_where_the_others_can_read_it() -> None:
    segments = {"f": Segment("f", "", (), ("a",), places=(Place(F32, 0, 1), Place(F32, 0, 0, (0,))))}
    reduce = Instruction(
        Op.REDUCE, "reduce_scatter", (ref("a"),), (ref("b"),), frozenset([ref("a")]), axis="dp", type=F32
    )
    step = (
        run("f", "", "a"),
        reduce,
        Instruction(Op.WAIT, inputs=(ref("b"),)),
        Instruction(Op.FREE, inputs=(ref("b"),)),
    )
    layout = lay_out(plan_of(*step, segments=segments), 0, shared=("dp",))
    assert (layout.given, layout.given_bytes) == ({(0, 1): Given("dp", 0)}, {"dp": 256})
    assert layout.runs == {0: (0, None)}


def test_a_rank_tells_what_it_lets_go_of() -> None:
    told: list[int] = []
    arena = SharedArena(bytearray, lambda: told.append(arena.let_go_of))
    answers = iter([True, False])
    residents = Residents(bytearray, lambda: told.append(-residents.let_go_of), place=1, size=2)
    unread = Mock()
    shared = Shared(arena, (Arena(), Arena()), residents, 1, lambda text: next(answers), lambda: unread)
    layout = Layout(
        runs={1: (None, None)},
        gathered={0: Gathered("dp", 64, 3)},
        shared_bytes={"dp": 320},
        given={(1, 0): Given("dp", 128)},
        given_bytes={"dp": 512},
        residents={2: Resident("dp", ref("part"), F32.nbytes, 4)},
        replaced={"dp": (5,)},
    )
    placing = Placing(CPU, Arena(), layout, {"dp": shared})
    gathered, made = placing.of_result(0, F32), placing.of_run(1, (Place(F32, 0, 0), Place(F32, 0, 0)))
    resident, half = placing.of_result(2, F32), TensorType((32,), torch.float32, (1,))
    agreed = placing.share(None)
    assert (arena.nbytes, [given.nbytes for given in shared.given], shared.nbytes) == (320, [512] * 2, 320 + 2 * 512)
    tensors = gathered(), made(0), made(1)
    assert [[at.offset(tensor) for tensor in tensors] for at in (arena, shared.own)] == [[64, -1, -1], [-1, 128, -1]]
    assert residents.number(resident()) == 0 and residents.number(gathered()) == -1 and resident() is resident()
    parts = placing.parts({ref("part"): half})
    resident().copy_(torch.arange(64.0))
    assert list(parts) == [ref("part")] and parts[ref("part")].tolist() == list(range(32, 64))
    assert parts[ref("part")].storage_offset() == 0
    behind = placing.behind()
    calls = [call for position in (3, 4) for call in behind.pop(position)]
    for call in calls:
        call()
    assert (behind, told) == ({}, [1, -1])
    assert [(position, [begin() for begin in begins]) for position, begins in placing.before().items()] == [
        (5, [unread])
    ]
    assert placing.share(agreed) == agreed
    larger = replace(layout, residents={2: replace(layout.residents[2], ref=ref("another"))})
    with pytest.raises(LayoutMismatch):
        Placing(CPU, Arena(), larger, {"dp": shared}).share({"dp": larger.shared_along("dp")})
    with pytest.raises(LayoutMismatch, match="what is gathered over dp would come and go in another order"):
        placing.share({"dp": "another one"})
    assert placing.share(None) == {"dp": ""}, "the others have another layout"
    tensors = gathered(), made(0), made(1)
    assert [[at.offset(tensor) for tensor in tensors] for at in (arena, shared.own)] == [[-1] * 3] * 2
    for call in calls:
        call()
    assert told == [1, -1]
    assert residents.number(resident()) == -1 and placing.parts({ref("part"): half}) == {}
    assert [begin() for begin in placing.before()[5]] == [None]


def test_residents_stay_where_they_are_when_others_come() -> None:
    blocks: list[bytearray] = []

    def block(nbytes: int) -> bytearray:
        blocks.append(bytearray(nbytes))
        return blocks[-1]

    residents = Residents(block, Mock(), place=0, size=2)
    residents.reserve({ref("a"): 100, ref("b"): F32.nbytes})
    first = residents.value(ref("b"), F32).fill_(1.0)
    residents.reserve({ref("b"): F32.nbytes, ref("c"): 64})
    residents.reserve({ref("a"): 100})
    assert [len(made) for made in blocks] == [128 + F32.nbytes, 64]
    assert residents.value(ref("b"), F32).data_ptr() == first.data_ptr() and residents.number(first) == 1
    assert residents.holds({ref("a"): 100, ref("c"): 64})
    assert not residents.holds({ref("a"): 200}) and not residents.holds({ref("d"): 1})


def test_a_block_that_grows_moves_what_was_given() -> None:
    arena = Arena()
    arena.reserve(512)
    (first,) = tensors = arena.tensors([(256, F32)])
    first.fill_(1.0)
    assert first.storage_offset() == 0 and first.untyped_storage().nbytes() == F32.storage_bytes
    arena.reserve(100)
    assert tensors[0] is first, "it is large enough"
    arena.reserve(4096)
    assert tensors[0] is not first and arena.nbytes == 4096
    assert len(arena._given) == 1
    del tensors
    assert not arena._given, "nobody can see it any more"


def test_without_a_layout_memory_is_new_each_time() -> None:
    memory = Placing(CPU).of_run(0, (Place(F32, 0, 0),))
    assert memory(0).data_ptr() != (kept := memory(0)).data_ptr() and kept.shape == (64,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        return ((x - y) ** 2).mean()


PLANS = ["dp2", "zero2:size=2+accum2", "zero3:size=2+accum2+bf16", "pp2:schedule=zb-h1", "zero3:size=2+pp2"]


@pytest.mark.parametrize("plan", PLANS)
def test_training_does_not_depend_on_what_the_block_holds(plan: str) -> None:
    """Bits are those of a run in which each value has memory of its own, with NaN in all of the block before a step."""
    losses: dict[bool, list[float]] = {}
    for alone in (True, False):
        torch.manual_seed(0)
        compiled = graphshard.compile(
            Net(), plan, optimizer=functools.partial(torch.optim.AdamW, lr=0.1), max_grad_norm=1.0, measure_memory=alone
        )
        torch.manual_seed(1)
        losses[alone] = []
        for _ in range(3):
            losses[alone].append(compiled.step(torch.randn(16, 16), torch.randn(16, 16)).item())
            executor = compiled._runtime
            assert isinstance(executor, LocalExecutor)
            for arena in executor.arenas.values():
                memoryview(arena._block)[:] = b"\xff" * arena.nbytes
            assert alone or all(arena.nbytes for arena in executor.arenas.values())
    assert losses[True] == losses[False]


def test_a_rank_waits_until_others_do_not_read_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    done_at: list[int] = []
    handle = Mock()

    def done() -> bool:
        (loaded,) = executor._loaded.values()
        done_at.append(loaded.machines[0].position)
        return len(done_at) == 2

    handle.done.side_effect = done
    monkeypatch.setattr(Placing, "before", lambda self: {3: [lambda: None, lambda: handle]})
    compiled = graphshard.compile(Net(), "accum2", optimizer=torch.optim.AdamW)
    batch = torch.randn(16, 16), torch.randn(16, 16)
    executor = compiled._made_executor()
    compiled.step(*batch)
    assert done_at == [3, 3], "it is that instruction that waits"
