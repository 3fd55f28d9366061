"""Lowering a two-stage program: what runs, what is communicated, and that every value dies once."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import chain

import pytest

from graphshard import text
from graphshard.codegen.lower import lower
from graphshard.codegen.schedule import make
from graphshard.execution import ExecutionPlan, Op, read_refs, result_refs
from graphshard.pipeline import parse_passes, run_passes
from graphshard.plan import SCHEDULES
from graphshard.program import Role, Slot
from graphshard.prove import prove
from two_layers import two_layers

ZERO3 = "pipeline-cut:stages=b;zero:stage=3;bucket;hoist;overlap"
ALL = [
    (passes, schedule, microbatches)
    for passes in (
        ZERO3,
        ZERO3.replace("hoist", "hoist:budget_gb=1"),
        *(ZERO3.replace("=3", f"={s}") for s in (0, 1, 2)),
    )
    for schedule in SCHEDULES
    for microbatches in (1, 4)
]


@cache
def plan_of(passes: str = ZERO3, schedule: str = "1f1b", microbatches: int = 2) -> ExecutionPlan:
    program = text.parse(two_layers(microbatches=microbatches))
    return lower(run_passes(program, parse_passes(passes)), make(schedule, 2, microbatches))


every = pytest.mark.parametrize(("passes", "schedule", "microbatches"), ALL)


@every
def test_every_plan_is_proved(passes: str, schedule: str, microbatches: int) -> None:
    prove(plan_of(passes, schedule, microbatches))


@every
def test_values_of_a_step_die_once(passes: str, schedule: str, microbatches: int) -> None:
    plan = plan_of(passes, schedule, microbatches)
    for index, stage in enumerate(plan.stages):
        given = read_refs(plan, index, first=False)
        live = {ref for ref, (slot, _) in given.items() if slot.role in (Role.BATCH, Role.RNG)}
        stays = set(given) - live | set(result_refs(plan, index))
        for ins in stage.step():
            live |= {ref for ref in ins.outputs if ref not in stays}
            dying = ins.inputs if ins.op is Op.FREE else ins.last
            assert live.issuperset(ref for ref in dying if ref not in stays), ins
            live -= set(dying)
        assert not live


@every
def test_every_send_is_waited_for(passes: str, schedule: str, microbatches: int) -> None:
    for stage in plan_of(passes, schedule, microbatches).stages:
        sent = Counter((ins.inputs[0], ins.peer) for ins in stage.step() if ins.op is Op.SEND)
        waited = Counter(
            (ins.inputs[0], ins.peer) for ins in stage.step() if ins.op is Op.WAIT and ins.peer is not None
        )
        assert sent and sent == waited


def test_each_action_gathers_what_it_reads_and_reduces_what_it_makes() -> None:
    first, last = plan_of().stages
    count = Counter(ins.name for ins in chain(first.body, last.body) if ins.op in (Op.GATHER, Op.REDUCE))
    # Stage 0 needs no weight in its backward: nobody waits for the gradient of its input.
    assert (count["all_gather"], count["reduce_scatter"]) == (2 + 2 * 2, 2 * 2)


def test_a_budget_gathers_once_a_step() -> None:
    for stage in plan_of(ZERO3.replace("hoist", "hoist:budget_gb=1")).stages:
        assert [ins.name for ins in stage.step() if ins.op is Op.GATHER] == ["all_gather"]
        assert [ins.name for ins in stage.step() if ins.name == "reduce_scatter"] == ["reduce_scatter"]


def test_the_first_micro_batch_runs_the_variant_that_overwrites() -> None:
    for stage in plan_of().stages:
        names = [ins.name for ins in stage.body if ins.op is Op.RUN]
        firsts = [name for name in names if name.endswith("_first")]
        assert firsts and len(set(firsts)) == len(firsts)
        for name in firsts:
            assert names.count(name.removesuffix("_first")) == 1  # the other of two micro-batches


def test_accumulators_are_not_made_ahead() -> None:
    for stage in plan_of().stages:
        zeros = {ref.name for ins in stage.prologue for ref in ins.outputs}
        assert not [name for name in zeros if name.startswith("carry:grad")]


def test_reads_and_results_are_this_stages() -> None:
    plan = plan_of()
    shards = [{slot for slot in slots if slot.role is Role.SHARD} for slots in (*plan.reads, *plan.results)]
    a, b = Slot(Role.SHARD, "a.w"), Slot(Role.SHARD, "b.w", stage=1)
    assert shards == [{a}, {b}, {a}, {b}]


def test_sends_follow_the_values() -> None:
    first, last = plan_of().stages
    assert [(ins.action, ins.peer) for ins in first.body if ins.op is Op.SEND] == [("F0.0", 1), ("F0.1", 1)]
    assert [(ins.action, ins.peer) for ins in last.body if ins.op is Op.SEND] == [("B1.0", 0), ("B1.1", 0)]
    received = [ins.outputs[0] for ins in last.body if ins.op is Op.RECV]
    assert [ref.microbatch for ref in received] == [0, 1]
    assert len({ref.name for ref in received}) == 1


def test_a_backward_sends_before_it_makes_weight_gradients() -> None:
    """The stage before waits for the one, nobody for the others."""
    last = plan_of(schedule="1f1b").stages[1]
    backward = [ins for ins in last.body if ins.action == "B1.0" and ins.op in (Op.RUN, Op.SEND)]
    sent = next(i for i, ins in enumerate(backward) if ins.op is Op.SEND)
    made = next(i for i, ins in enumerate(backward) if "cb1" in str(ins.outputs) or "grad:b.w" in str(ins.outputs))
    assert sent < made


def test_a_segment_ends_where_the_epilogue_reduces() -> None:
    """Two gradients of one stage: the first is on its way while the second is made."""
    program = run_passes(text.parse(two_layers("dp=2")), parse_passes("zero:stage=0;overlap"))
    (stage,) = lower(program, make("1f1b", 1, 2)).stages
    last = [ins for ins in stage.body if ins.action == "B0.1"]
    kept = [f"{ins.op} {ins.inputs[0] if ins.op is Op.REDUCE else ''}" for ins in last if ins.op in (Op.RUN, Op.REDUCE)]
    assert kept == ["RUN ", "REDUCE %carry:grad:b.w", "RUN ", "REDUCE %carry:grad:a.w"]


def test_the_loss_is_waited_for_when_it_is_read() -> None:
    """Every stage broadcasts it in the epilogue; updates need not wait."""
    for stage in plan_of().stages:
        issued = next(i for i, ins in enumerate(stage.epilogue) if ins.axis == "pp")
        (shared,) = stage.epilogue[issued].outputs
        waited = next(i for i, ins in enumerate(stage.epilogue) if ins.op is Op.WAIT and ins.inputs == (shared,))
        assert any(ins.op is Op.RUN for ins in stage.epilogue[issued:waited])
