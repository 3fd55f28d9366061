"""The plan verifier: good plans pass; each kind of damage is found and shown where it is."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphshard
from graphshard.errors import PlanError
from graphshard.execution import ExecutionPlan, Instruction, Op, Ref, StagePlan, TensorType, Workspace
from graphshard.prove import prove
from graphshard.prove.ranks import prove_ranks
from graphshard.runtime.local import LocalExecutor
from graphshard.runtime.storage import Storage
from handmade import GPIPE, ONE_F_ONE_B, collective, eager, edited, free, kind, refs, run, two_stages, wait, weights
from handmade import batches as batches_of
from models import zoo

Edit = Callable[[list[Instruction]], None]


def at(body: list[Instruction], op: Op, name: str, nth: int = 0) -> int:
    """Position of the n-th instruction of that kind about a value of that name."""
    found = [i for i, ins in enumerate(body) if ins.op is op and name in {r.name for r in ins.inputs + ins.outputs}]
    return found[nth]


def damaged(stage: int, edit: Edit, schedule: tuple[str, str] = ONE_F_ONE_B) -> ExecutionPlan:
    plan = two_stages(schedule=schedule)
    body = list(plan.stages[stage].body)
    edit(body)
    return edited(plan, stage, body)


def bind(source: str, target: str) -> Instruction:
    return Instruction(Op.BIND, inputs=refs(source), outputs=refs(target))


def swap(body: list[Instruction], a: int, b: int) -> None:
    body[a], body[b] = body[b], body[a]


def remove(body: list[Instruction], *indices: int) -> None:
    for index in sorted(indices, reverse=True):
        del body[index]


def changed(body: list[Instruction], index: int, **changes: object) -> None:
    body[index] = replace(body[index], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [GPIPE, ONE_F_ONE_B])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_plans_that_work_are_proved(schedule: tuple[str, str], dp: int) -> None:
    prove(two_stages(dp, schedule))


WRONG = kind(3, 5)
HOLES = TensorType((3, 4), WRONG.dtype, (8, 1))

DAMAGE: dict[str, tuple[int, Edit, str]] = {
    "a receive is missing": (
        1,
        lambda b: remove(b, at(b, Op.RECV, "h"), at(b, Op.WAIT, "h")),
        "%h.0 is used before it is defined",
    ),
    "a send is doubled": (
        0,
        lambda b: b.insert(at(b, Op.SEND, "h"), b[at(b, Op.SEND, "h")]),
        "%h.0 is freed before the WAIT for the communication that reads it",
    ),
    "a send is never waited for": (1, lambda b: remove(b, at(b, Op.WAIT, "gh", 2)), "%gh.2 is freed before"),
    "sends are in the wrong order": (
        0,
        lambda b: swap(b, at(b, Op.SEND, "h", 0), at(b, Op.SEND, "h", 1)),
        "%h.1 is used before it is defined",
    ),
    "another type is received": (1, lambda b: changed(b, at(b, Op.RECV, "h"), type=WRONG), "is sent as"),
    "other strides are received": (1, lambda b: changed(b, at(b, Op.RECV, "h"), type=kind(3, 4)), "is sent as"),
    "strides with holes": (0, lambda b: changed(b, at(b, Op.SEND, "h"), type=HOLES), "leave holes in memory"),
    "sent to oneself": (0, lambda b: changed(b, at(b, Op.SEND, "h"), peer=0), "names stage 0, which is not another"),
    "used after it was freed": (
        0,
        lambda b: b.insert(at(b, Op.FREE, "h") + 1, run("copy", "h.0", "again", "")),
        "%h.0 is used after it was freed at",
    ),
    "used after it was handed over": (
        1,
        lambda b: b.insert(at(b, Op.RUN, "d") + 1, run("copy", "w.0", "again", "")),
        "%w.0 is used after it was handed over at",
    ),
    "freed twice": (0, lambda b: b.insert(at(b, Op.FREE, "h"), b[at(b, Op.FREE, "h")]), "although it was freed at"),
    "read before its wait": (
        1,
        lambda b: swap(b, at(b, Op.WAIT, "h"), at(b, Op.RUN, "d")),
        "%h.0 is read before the WAIT for it",
    ),
    "overwritten in flight": (
        0,
        lambda b: b.insert(at(b, Op.SEND, "h") + 1, bind("batch:0.0", "h.0")),
        "%h.0 is overwritten before the WAIT",
    ),
    "defined twice": (
        0,
        lambda b: b.insert(at(b, Op.SEND, "h") + 1, run("copy", "batch:0.0", "h.0", "")),
        "%h.0 is defined again while it is still there",
    ),
    "never freed": (0, lambda b: remove(b, at(b, Op.FREE, "h", 1)), "%h.1 is neither freed nor a result"),
    "a wait for nothing": (0, lambda b: b.append(wait("shard:b0", "")), "no communication is outstanding"),
    "an axis there is not": (0, lambda b: changed(b, at(b, Op.GATHER, "w"), axis="ep"), "over axis 'ep'; axes are"),
    "a collective there is not": (0, lambda b: changed(b, at(b, Op.GATHER, "w"), name="all"), "it can be all_gather"),
    "gathered as another type": (
        0,
        lambda b: changed(b, at(b, Op.GATHER, "w"), type=WRONG),
        "%shard:b0 is float32[8] but is communicated as float32[3,5]",
    ),
    "scattered unevenly": (
        0,
        lambda b: changed(b, at(b, Op.REDUCE, "g"), type=kind(15)),
        "cannot be scattered evenly over 2 ranks",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found(what: str) -> None:
    stage, edit, rule = DAMAGE[what]
    with pytest.raises(PlanError) as caught:
        prove(damaged(stage, edit))
    assert rule in caught.value.rule
    assert "\n  > " in caught.value.excerpt


def test_the_message_shows_both_ends_of_a_bad_transfer() -> None:
    plan = damaged(1, lambda body: changed(body, at(body, Op.RECV, "h", 1), type=WRONG))
    with pytest.raises(PlanError) as caught:
        prove(plan)
    assert caught.value.rule == (
        "transfer 1 from stage 0 to stage 1 is sent as float32[3,4] with strides [1, 3] "
        "and received as float32[3,5] with strides [5, 1]"
    )
    marked = [line.split(maxsplit=3)[2:] for line in caught.value.excerpt.splitlines() if line.startswith("  > ")]
    assert [m[0] for m in marked] == ["F0.1", "F1.1"]
    assert [line for line in caught.value.excerpt.splitlines() if line.startswith("stage")] == ["stage 0:", "stage 1:"]


def test_transfers_of_different_values_are_told_apart_by_name() -> None:
    body = list(two_stages().stages[0].body)
    index = at(body, Op.SEND, "h")
    body[index] = replace(body[index], name="something else")
    with pytest.raises(PlanError, match="sends 'something else' but receives ''"):
        prove(edited(two_stages(), 0, body))


def test_swapped_micro_batches_are_found() -> None:
    """Both ends are well-formed on their own; only the pairing is wrong."""
    plan, other = two_stages(schedule=("F0 F1 B0 B1",) * 2), two_stages(schedule=("F0 F1 B1 B0",) * 2)
    with pytest.raises(PlanError, match=r"sends %gh\.0 but receives %gh\.1: two micro-batches"):
        prove(replace(plan, stages=(relabelled(other.stages[0]), plan.stages[1])))


def relabelled(stage: StagePlan) -> StagePlan:
    """The gradient is begun by the micro-batch that comes first: the last one of the forward."""
    swap = {"copy": "add", "add": "copy"}
    body = []
    for ins in stage.body:
        if ins.name in swap:
            source = tuple(ref for ref in ins.inputs if ref.name != "carry:g")
            inputs = source if ins.name == "add" else (*refs("carry:g"), *source)
            ins = replace(ins, name=swap[ins.name], inputs=inputs)
        body.append(ins)
    return replace(stage, body=tuple(body))


def test_a_circle_of_waiting_stages_is_found() -> None:
    """Each stage waits for what the other sends only after its own wait."""
    plan = two_stages()
    what, ring = kind(2), []
    for peer in (1, 0):
        ring.append(
            (
                run("zeros", "", "x", "F0"),
                Instruction(Op.RECV, outputs=refs("y"), peer=peer, type=what, action="F0"),
                wait("y", "F0"),
                Instruction(Op.SEND, inputs=refs("x"), peer=peer, type=what, action="F0"),
                wait("x", "F0"),
                free("x y", "F0"),
            )
        )
    stuck = replace(
        plan,
        stages=tuple(replace(s, body=body + s.body) for s, body in zip(plan.stages, ring, strict=True)),
    )
    with pytest.raises(PlanError) as caught:
        prove(stuck)
    assert caught.value.rule == "stages wait in a circle: stage 0 waits for stage 1, stage 1 waits for stage 0"
    assert caught.value.excerpt.count("> ") - caught.value.excerpt.count("->") == 2


def test_stages_must_agree_on_collectives_over_stages() -> None:
    plan = two_stages()
    first, second = plan.stages
    more = [collective(Op.REDUCE, "all_reduce", "shard:b1", "twice", kind(8), "epilogue", "pp"), wait("twice", "")]
    second = replace(second, body=(*second.body, *more, free("twice", "")))
    with pytest.raises(PlanError, match="collective 0 over the stages differs between stage 0 and stage 1"):
        prove(replace(plan, stages=(first, second)))


def test_the_first_epilogue_is_checked_too() -> None:
    plan = two_stages()
    stage = plan.stages[0]
    assert stage.first_epilogue is not None
    broken = replace(stage, first_epilogue=stage.epilogue)  # reads state that does not exist yet
    with pytest.raises(PlanError, match="%state:b0:momentum is used before it is defined"):
        prove(replace(plan, stages=(broken, plan.stages[1])))


def test_results_must_be_defined() -> None:
    plan = two_stages()
    stage = plan.stages[0]
    unbound = tuple(i for i in stage.epilogue if i.op is not Op.BIND)
    with pytest.raises(PlanError, match='result shard "b0" is not defined at the end'):
        prove(replace(plan, stages=(replace(stage, epilogue=unbound), plan.stages[1])))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_what_is_proved_runs_and_gives_the_same(seed: int) -> None:
    """A random damage is either rejected, or harmless: in a random interleaving the step ends as ever."""
    choose = random.Random(seed)
    plan = two_stages(schedule=choose.choice([GPIPE, ONE_F_ONE_B]))
    stage = choose.randrange(2)
    body = list(plan.stages[stage].body)
    a, b = choose.randrange(len(body)), choose.randrange(len(body))
    match choose.randrange(4):
        case 0:
            del body[a]
        case 1:
            body.insert(b, body[a])
        case 2:
            swap(body, a, b)
        case _:
            body.insert(b, body.pop(a))
    plan = edited(plan, stage, body)
    try:
        prove(plan)
    except PlanError:
        return
    executor = LocalExecutor(plan.mesh, interleaving=seed)
    storage = Storage(executor, plan)
    storage.write_model(weights(), {})
    loss = executor.step(plan, batches_of(plan, 0), lrs=[0.1]).loss
    losses, params = eager(plan, 1)
    assert loss is not None and loss.item() == pytest.approx(losses[0], rel=1e-5)
    for name, value in storage.read_params().items():
        assert value.allclose(params[name], rtol=1e-5, atol=1e-6)


def test_a_thousand_ranks_are_proved_by_their_representatives() -> None:
    """1,024 ranks and 64 micro-batches: half a minute on one core is asked for, some seconds are allowed here."""
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(32)))
        rows = torch.empty(64 * 64, 8)
    compiled = graphshard.compile(
        model,
        "zero3+pp16:microbatches=64",
        loss_fn=lambda output: output.square().mean(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        executor="none",
        world_size=1024,
        example_inputs=rows,
    )
    plan = compiled.execution_plan
    begin = time.process_time()
    prove_ranks([plan] * 1024)
    assert time.process_time() - begin < 15
    body = list(plan.stages[7].body)
    swapped = [at for at, ins in enumerate(body) if ins.op is Op.SEND and ins.peer == 8][30:32]
    body[swapped[0]], body[swapped[1]] = body[swapped[1]], body[swapped[0]]
    stages = list(plan.stages)
    stages[7] = replace(stages[7], body=tuple(body))
    odd = plan.mesh.rank({"pp": 7, "dp": 33})
    with pytest.raises(PlanError, match=rf"rank {odd} "):
        prove_ranks([replace(plan, stages=tuple(stages)) if rank == odd else plan for rank in range(1024)])


def compiled_plan(plan: str) -> ExecutionPlan:
    model, (args, kwargs), loss_fn = zoo.MODELS["mlp"](rows=16)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    return graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=optimizer, executor="none", example_inputs=(args, kwargs)
    ).execution_plan


def test_a_segment_that_leaves_more_than_it_accounts_for_is_refused() -> None:
    plan = compiled_plan("zero3:size=2")
    (stage,) = plan.stages
    name = next(ins.name for ins in stage.body if ins.op is Op.RUN)
    segment = stage.segments[name]
    held, released = segment.workspace.held, segment.workspace.released

    def with_account(account: Workspace) -> ExecutionPlan:
        segments = stage.segments | {name: replace(segment, workspace=account)}
        return replace(plan, stages=(replace(stage, segments=segments),))

    less = Workspace((*held[:-1], held[-1] - 1), released)
    with pytest.raises(PlanError, match=rf"segment {name} leaves {held[-1]} bytes, and {held[-1] - 1} are accounted"):
        prove(with_account(less))
    with pytest.raises(PlanError, match=rf"segment {name} reads {len(released)} values, and its account has 1"):
        prove(with_account(Workspace(held, released[:1])))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_plan_that_takes_more_memory_than_it_states_is_refused(stage: int) -> None:
    plan = compiled_plan("zero3:size=2+pp2")
    prove(plan)
    stated = list(plan.peak_bytes)
    assert all(f"stage {s}: at most {peak} bytes a rank" in str(plan) for s, peak in enumerate(stated))
    stated[stage] -= 1
    with pytest.raises(
        PlanError, match=rf"stage {stage} holds \d+ bytes, where the plan states {stated[stage]} at most"
    ):
        prove(replace(plan, peak_bytes=tuple(stated)))


def test_a_storage_that_is_accounted_too_small_is_refused() -> None:
    plan = compiled_plan("zero3:size=2")
    (stage,) = plan.stages
    name = next(ins for ins in stage.body if ins.op is Op.GATHER).outputs[0].name
    storages = stage.storages | {name: replace(stage.storages[name], nbytes=stage.storages[name].nbytes - 1)}
    with pytest.raises(PlanError, match=rf"%{name}.* takes \d+ bytes, and \d+ are accounted for it"):
        prove(replace(plan, stages=(replace(stage, storages=storages),)))


def test_a_gathered_parameter_that_a_view_keeps_is_refused() -> None:
    """Another name for the same storage, freed a segment later."""
    plan = compiled_plan("zero3:size=2")
    (stage,) = plan.stages
    body = list(stage.body)
    runs = [at for at, ins in enumerate(body) if ins.op is Op.RUN]
    at = next(at for at in runs if any(ref.name in stage.storages and ref in body[at].last for ref in gathered(body)))
    ref = next(ref for ref in gathered(body) if ref in body[at].last)
    view, other = Ref("view", ref.microbatch), Ref("other", ref.microbatch)
    later = next(run for run in runs if run > at)

    def kept(*after: Instruction) -> ExecutionPlan:
        lines = (*body[:at], renamed(ref, view), *body[at : later + 1], *after, *body[later + 1 :])
        return replace(plan, stages=(replace(stage, body=lines),), peak_bytes=())

    prove(kept(renamed(view, other), Instruction(Op.FREE, inputs=(view, other))))  # what is read there may stay
    with pytest.raises(PlanError, match=r"%view.* is released later than where it is read last"):
        prove(kept(Instruction(Op.FREE, inputs=(view,))))


def renamed(old: Ref, new: Ref) -> Instruction:
    return Instruction(Op.BIND, inputs=(old,), outputs=(new,))


def gathered(body: list[Instruction]) -> list[Ref]:
    return [ref for ins in body if ins.op is Op.GATHER for ref in ins.outputs]


def test_a_segment_is_there_and_takes_what_it_is_given() -> None:
    plan = compiled_plan("zero3:size=2+pp2")
    stage = plan.stages[0]
    at = next(at for at, ins in enumerate(stage.body) if ins.op is Op.RUN and len(ins.inputs) > 1)
    ins = stage.body[at]
    segment = stage.segments[ins.name]
    wider = replace(segment.input_types[0], shape=(*segment.input_types[0].shape, 1))
    for changed, segments, message in (
        (replace(ins, name="nobody"), {}, "segment 'nobody' is not part of the plan"),
        (
            replace(ins, inputs=ins.inputs[:-1], last=frozenset()),
            {},
            rf"segment '{ins.name}' reads \d+ values, not \d+",
        ),
        (replace(ins, outputs=(*ins.outputs, Ref("more", 0))), {}, rf"segment '{ins.name}' makes \d+ values, not \d+"),
        (ins, {ins.name: replace(segment, input_types=(wider, *segment.input_types[1:]))}, f"'{ins.name}' takes .*,1"),
        (ins, {ins.name: replace(segment, output_types=(wider,) * len(ins.outputs))}, "takes|communicated as|result"),
    ):
        body = (*stage.body[:at], changed, *stage.body[at + 1 :])
        damaged = replace(stage, body=body, segments=stage.segments | segments)
        with pytest.raises(PlanError, match=message):
            prove(replace(plan, stages=(damaged, plan.stages[1])))
