"""The simulation of memory: storages, what segments hold, what is in flight, and what the store keeps."""

from __future__ import annotations

from graphshard.execution import (
    ExecutionPlan,
    Instruction,
    Op,
    Ref,
    Segment,
    StagePlan,
    Storage,
    TensorType,
    Workspace,
    slot_ref,
)
from graphshard.memory.simulate import simulate_memory, simulated
from graphshard.mesh import Mesh
from graphshard.program import Role, Slot
from handmade import collective, free, kind, refs, run, wait

BATCH, FROZEN, WEIGHT = Slot(Role.BATCH, "0"), Slot(Role.BUFFER, "frozen"), Slot(Role.PARAM, "w")
SIZES = {"batch:0": 40, "buffer:frozen": 8, "param:w": 100, "a": 10, "g": 100, "r": 50, "s": 100, "v": 10}
ROOTS = {"v": "a"}  # the others have storage of their own
CATEGORIES = {"a": "saved activations", "g": "gradients", "batch:0": "batch", "param:w": "parameters"}


NOTHING = Workspace()


def plan_of(*body: Instruction, workspace: Workspace = NOTHING) -> ExecutionPlan:
    """One stage; the segment ``f`` holds ``workspace``."""
    shapes = {slot: TensorType((1,), kind(1).dtype, (1,)) for slot in (BATCH, FROZEN, WEIGHT)}
    per_microbatch = ("a", "g", "r", "s", "v", "batch:0")
    storages = {
        name: Storage(
            Ref(ROOTS.get(name, name), 0 if name in per_microbatch else None), size, CATEGORIES.get(name, "workspace")
        )
        for name, size in SIZES.items()
    }
    stage = StagePlan((), body, (), None, {"f": Segment("f", "", (), (), workspace=workspace)}, storages)
    return ExecutionPlan(Mesh((("dp", 2),)), (stage,), 1, "", (shapes,), ({WEIGHT: kind(1)},), {}, {}, {})


def totals(plan: ExecutionPlan) -> list[int]:
    return [sum(row.values()) for row in simulated(plan, 0)]


STORED = 40 + 8 + 100


def test_inside_a_segment_inputs_go_and_workspace_comes() -> None:
    step = run("f", "batch:0.0 param:w", "a.0", "F0.0", last="batch:0.0")
    account = Workspace((15, 60), (0, 1))  # the batch goes at the end of the first interval
    assert totals(plan_of(step, workspace=account)) == [STORED - 40 + 60]
    use = simulate_memory(plan_of(step, workspace=account), 0)
    assert use.at_peak == {"parameters": 100, "workspace": 8 + 60}
    assert (use.peak_bytes, use.peak_action, use.peak_position) == (STORED + 20, "F0.0", 0)
    kept = run("f", "batch:0.0 param:w", "a.0", "F0.0")
    assert totals(plan_of(kept, workspace=account)) == [STORED + 60], "nobody gives the batch away"


def test_what_is_held_under_another_name_does_not_go() -> None:
    make = run("f", "", "a.0 v.0", "F0.0")
    read = run("f", "a.0", "", "B0.0", last="a.0")
    after = free("v.0", "B0.0")
    plan = plan_of(make, read, after, workspace=Workspace((10, 25), ()))
    assert totals(plan) == [STORED + 25, STORED + 10 + 25, STORED + 10]


def test_the_store_keeps_what_the_step_does_not_replace() -> None:
    plan = plan_of(free("buffer:frozen param:w batch:0.0", "F0.0"), free("", "F0.0"))
    assert totals(plan) == [STORED, 8]


def test_a_collective_holds_what_it_reads_until_its_wait() -> None:
    make = run("f", "", "g.0", "B0.0")
    reduce = collective(Op.REDUCE, "reduce_scatter", "g.0", "r.0", kind(4), "B0.0", "dp")
    handed = Instruction(reduce.op, reduce.name, reduce.inputs, reduce.outputs, frozenset(refs("g.0")), axis="dp")
    last = free("", "B0.0")
    assert totals(plan_of(make, handed, wait("r.0", "B0.0"), last)) == [STORED, STORED + 150, STORED + 150, STORED + 50]
    in_place = Instruction(Op.REDUCE, "all_reduce", refs("g.0"), refs("s.0"), frozenset(refs("g.0")), axis="dp")
    assert totals(plan_of(make, in_place, wait("s.0", "B0.0"), last)) == [STORED, *[STORED + 100] * 3]


def test_a_second_name_costs_nothing() -> None:
    make = run("f", "", "g.0", "B0.0")
    bind = Instruction(Op.BIND, inputs=refs("g.0"), outputs=(slot_ref(WEIGHT),), last=frozenset(refs("g.0")))
    plan = plan_of(make, bind, free("", "end"))
    assert totals(plan)[1:] == [STORED + 100, STORED], "the weight that it replaces goes"
