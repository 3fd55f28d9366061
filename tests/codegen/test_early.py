"""The update of a bucket whose state is moved comes behind its gradient, and before nothing that it would disturb."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from graphshard.codegen.early import update_early
from graphshard.errors import PlanError
from graphshard.execution import ExecutionPlan, Instruction, Op, Storage
from graphshard.prove import prove
from handmade import collective, kind, refs, run, wait
from layers import compiled_layers
from marks import full

X = kind(4)
Part = list[Instruction]


def move(op: Op, source: str, target: str) -> Instruction:
    return Instruction(op, "nvme", refs(source), refs(target), type=X, action="epilogue")


def backward(bucket: str, reads: str = "") -> Instruction:
    return run(f"b{bucket}", f"y.0 {reads}".strip(), f"carry:grad:{bucket}", "B0.0")


def update(bucket: str, reads: str = "", writes: str = "new") -> Part:
    state, inputs = f"state:{bucket}:m", f"carry:grad:{bucket} m{bucket} {reads}".strip()
    return [
        wait(f"m{bucket}", "epilogue"),
        run(f"u{bucket}", inputs, f"{writes}{bucket} n{bucket}", "epilogue"),
        move(Op.OFFLOAD, f"n{bucket}", state),
    ]


def reload(bucket: str) -> Instruction:
    return move(Op.RELOAD, f"state:{bucket}:m", f"m{bucket}")


FORWARD = run("f", "batch:0.0", "y.0", "F0.0")
BODY = [FORWARD, *map(backward, "cba")]
EPILOGUE = [reload("c"), reload("b"), *update("c"), reload("a"), *update("b"), *update("a")]


def merged(
    body: Part, epilogue: Part, storages: dict[str, Storage] | None = None, room: list[int] | None = None
) -> tuple[str, str]:
    """Both parts as words: a segment's name, or ``+c`` and ``-c`` for what comes and goes, ``?c`` for its WAIT."""
    before, (after,) = update_early(body, [epilogue], storages or {}, None if room is None else [room])

    def word(ins: Instruction) -> str:
        sign = {Op.RELOAD: "+", Op.OFFLOAD: "-", Op.WAIT: "?"}.get(ins.op, "")
        return ins.name if ins.op is Op.RUN else f"{sign}{ins.outputs[0] if ins.outputs else ins.inputs[0]}"

    return tuple(" ".join(map(word, part)).replace("%", "") for part in (before, after))  # type: ignore[return-value]


def test_behind_its_gradient_with_the_next_state_on_its_way() -> None:
    assert merged(BODY, EPILOGUE) == (
        "f",
        "+mc bc +mb ?mc uc -state:c:m bb +ma ?mb ub -state:b:m ba ?ma ua -state:a:m",
    )


def test_without_moves_nothing_comes_early() -> None:
    epilogue = [ins for ins in EPILOGUE if ins.op is Op.RUN]
    assert merged(BODY, epilogue) == ("f bc bb ba", "uc ub ua")


def test_what_needs_all_gradients_waits_for_them() -> None:
    norm = run("norm", "carry:grad:c carry:grad:b carry:grad:a", "norm", "epilogue")
    clipped = [replace(ins, inputs=(*ins.inputs, *refs("norm"))) if ins.op is Op.RUN else ins for ins in EPILOGUE]
    before, after = merged(BODY, [norm, *clipped])
    assert before == "f bc bb ba"
    assert after.split()[:4] == ["norm", "+mc", "+mb", "?mc"]


def chosen(bucket: str, reads: str) -> Part:
    """An update in two parts: averages, and the parameter, which is stored or left as it was."""
    kept = f"shard:{bucket}"
    return [
        move(Op.RELOAD, kept, f"p{bucket}"),
        *update(bucket),
        wait(f"p{bucket}", "epilogue"),
        run(f"v{bucket}", f"new{bucket} p{bucket} {reads}", f"q{bucket}", "epilogue"),
        move(Op.OFFLOAD, f"q{bucket}", kept),
    ]


def test_an_update_of_which_a_part_needs_all_gradients_stays() -> None:
    """As where loss scaling may skip it: its averages would be there, and what it is computed from, until the end."""
    finite = run("finite", "carry:grad:c carry:grad:b carry:grad:a", "finite", "epilogue")
    c, b = (chosen(bucket, "finite") for bucket in "cb")
    epilogue = [reload("c"), reload("b"), *c[:4], *b[:4], finite, *c[4:], *b[4:]]
    assert merged(BODY, epilogue) == (
        "f bc bb ba",
        "+mc +mb +pc ?mc uc -state:c:m +pb ?mb ub -state:b:m finite ?pc vc -shard:c ?pb vb -shard:b",
    )


def test_what_is_reloaded_is_waited_for_where_it_is_read() -> None:
    """An instruction that reads it may come later than what its WAIT stood in front of."""
    epilogue = [reload("c"), *chosen("c", "carry:grad:b"), reload("a"), *update("a")]
    first, *rest = epilogue
    moved = [first, rest[0], rest[4], *rest[1:4], *rest[5:]]  # all arrives ahead of the first part
    for order in (epilogue, moved):
        assert merged(BODY, order)[1] == ("+mc bc +pc ?mc uc -state:c:m bb ?pc vc -shard:c +ma ba ?ma ua -state:a:m")


def test_what_other_stages_add_to_stays_with_its_reloads() -> None:
    summed = [
        collective(Op.REDUCE, "all_reduce", "carry:grad:b", "sum", X, "epilogue", "pp"),
        wait("sum", "epilogue"),
    ]
    late = [replace(ins, inputs=(*ins.inputs, *refs("sum"))) if ins.name == "ub" else ins for ins in EPILOGUE]
    assert merged(BODY, summed + late) == (
        "f",
        "+mc bc ?mc uc -state:c:m +ma bb ba ?ma ua -state:a:m sum ?sum +mb ?mb ub -state:b:m",
    )


def test_a_parameter_is_not_written_before_it_is_read_last() -> None:
    """The update writes in place, where a later layer's backward still reads."""
    body = [FORWARD, backward("c"), backward("b", "flat:c"), backward("a")]
    (flat,) = refs("flat:c")
    storages = {name: Storage(flat, 16, "parameters") for name in ("flat:c", "newc")}
    epilogue = [reload("c"), *update("c", "flat:c")]
    assert merged(body, epilogue, storages)[1] == "+mc bc bb ?mc uc -state:c:m ba"
    assert merged(body, epilogue)[1] == "+mc bc ?mc uc -state:c:m bb ba"


def test_a_reduction_is_waited_for_behind_other_work() -> None:
    reduce = collective(Op.REDUCE, "all_reduce", "carry:grad:c", "rc", X, "B0.0", "dp")
    body = [FORWARD, backward("c"), reduce, backward("b"), backward("a")]
    epilogue = [reload("c"), wait("rc", "epilogue"), *update("c", "rc")]
    assert merged(body, epilogue)[1] == "+mc bc rc bb ?rc ?mc uc -state:c:m ba"


def test_what_the_body_starts_there_goes_first() -> None:
    reduce = collective(Op.REDUCE, "all_reduce", "carry:grad:b", "rb", X, "B0.0", "dp")
    body = [FORWARD, backward("b"), backward("c"), reduce, backward("a")]
    assert merged(body, [reload("c"), *update("c")])[1] == "+mc bb bc rb ?mc uc -state:c:m ba"


def stored(*names: str, nbytes: int = 10) -> dict[str, Storage]:
    """Storages of their own."""
    return {name: Storage(refs(name)[0], nbytes, "workspace") for name in names}


STATES = stored("mc", "mb", "ma", "nc", "nb", "na")  # what a bucket reloads, and what it offloads
GRADIENTS = stored("carry:grad:c", "carry:grad:b", "carry:grad:a", nbytes=4)


@pytest.mark.parametrize(
    ("room", "order"),
    [
        # While bb runs, what uc offloads leaves and what ub reads arrives.
        ([0, 10, 20, 20], "+mc bc +mb ?mc uc -state:c:m bb ?state:c:m +ma ?mb ub -state:b:m ba"),
        # There is room for one of them: mb arrives when c has left, with ma.
        ([0, 10, 10, 20], "+mc bc ?mc uc -state:c:m bb ?state:c:m +mb ba"),
        # Not before bb has made room.
        ([0, 0, 0, 20], "bc bb +mc ba"),
        # The gradient that uc frees is room for mb.
        ([0, 10, 16, 16], "+mc bc +mb ?mc uc -state:c:m bb ?state:c:m +ma ?mb ub -state:b:m ba"),
        ([0, 10, 15, 20], "+mc bc ?mc uc -state:c:m bb ?state:c:m +mb ba"),
        ([0, 9, 9, 9], "bc bb ba"),
    ],
)
def test_an_update_begins_when_there_is_room(room: list[int], order: str) -> None:
    before, after = merged(BODY, EPILOGUE, STATES | GRADIENTS, room)
    assert f"{before} {after}".split("ba")[0] + "ba" == f"f {order}"


def planned(plan: str, rows: int = 4, layers: int = 3, **options: Any) -> ExecutionPlan:
    return compiled_layers(plan, layers=layers, rows=rows, **options)[0].execution_plan


OFFLOADED = "zero3+offload:optimizer=cpu,params=cpu"


def late_peaks(monkeypatch: pytest.MonkeyPatch, plan: str, **options: int) -> tuple[int, ...]:
    """The peaks with all updates at the end of the step."""
    with monkeypatch.context() as patch:
        patch.setattr("graphshard.codegen.order._updated_early", lambda prologue, body, ends, late, memory: late)
        found = planned(plan, **options)
    assert not early_updates(found)
    return found.peak_bytes


def early_updates(plan: ExecutionPlan) -> int:
    """How many values have been offloaded when the last instruction of the backward runs, on all stages."""
    found = 0
    for stage in plan.stages:
        step = stage.step()
        last = max(at for at, ins in enumerate(step) if ins.action[0] in "BW")
        found += sum(ins.op is Op.OFFLOAD and ins.action == "epilogue" for ins in step[:last])
    return found


STATE_BYTES = 3 * 8 * 8 * 4 // 2  # what a rank moves of a layer: half of a weight and of AdamW's averages
WITH_ROOM = [
    ("zero3+offload:optimizer=cpu,params=cpu", 16),
    full("zero3+offload:optimizer=cpu,params=cpu", 64),
    ("zero3+accum2+offload:optimizer=cpu,params=cpu", 64),
    full("zero3:budget_gb=1+accum2+offload:optimizer=cpu,params=cpu", 64),
    ("zero1+accum2+offload:optimizer=cpu", 64),
    ("dp2+accum2+offload:optimizer=cpu", 256),
    ("zero3+pp2+offload:optimizer=cpu,params=cpu", 512),
]


@pytest.mark.parametrize(("plan", "rows"), WITH_ROOM)
def test_early_updates_raise_no_peak(plan: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    early = planned(plan, rows, layers=8)
    late = late_peaks(monkeypatch, plan, rows=rows, layers=8)
    assert all(mine <= other for mine, other in zip(early.peak_bytes, late, strict=True))
    assert early_updates(early) > 0
    prove(early)


def test_where_gradients_replace_activations_one_bucket_more_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's activations are as large as its gradients here: what it holds stays the same until the end."""
    early = planned(OFFLOADED, rows=8, layers=8)
    (late,) = late_peaks(monkeypatch, OFFLOADED, rows=8, layers=8)
    assert late < early.peak_bytes[0] <= late + STATE_BYTES
    assert early_updates(early) >= 8 * 3 // 2
    prove(early)


def actions(plan: ExecutionPlan) -> list[str]:
    return [ins.action for ins in plan.stages[0].epilogue]


def test_a_compiled_plan_keeps_its_actions() -> None:
    plan = planned(OFFLOADED)
    assert set(actions(plan)) == {"B0.0", "epilogue"}
    (clipped,) = planned(OFFLOADED, max_grad_norm=1.0).stages
    early = [ins for ins in clipped.epilogue if ins.op is Op.RUN and ins.action == "B0.0"]
    behind = clipped.epilogue[clipped.epilogue.index(early[-1]) :]
    updates = [ins for ins in clipped.epilogue if ins.op is Op.OFFLOAD]
    assert updates
    assert set(updates) <= set(behind), "only copies to the device may have begun before the backward has ended"
    assert set(actions(planned("zero3"))) == {"epilogue"}


def test_a_watched_step_updates_behind_its_backward() -> None:
    assert set(actions(planned(OFFLOADED, debug_nan=True))) == {"epilogue"}


def rejected(plan: ExecutionPlan, step: Part) -> None:
    (stage,) = plan.stages
    edited = replace(stage, prologue=(), body=(), epilogue=tuple(step), first_epilogue=None)
    with pytest.raises(PlanError, match=r"is read by B0.* although the update has begun to replace it"):
        prove(replace(plan, stages=(edited,), peak_bytes=()))


def test_a_reload_behind_what_replaces_it_is_refused() -> None:
    plan = planned(OFFLOADED)
    step = list(plan.stages[0].step())
    write = next(at for at, ins in enumerate(step) if ins.op is Op.OFFLOAD and ins.outputs[0].name.startswith("shard:"))
    shard = step[write].outputs
    done = next(at for at in range(write, len(step)) if step[at].op is Op.WAIT and step[at].inputs == shard)
    reload = next(ins for ins in step if ins.op is Op.RELOAD and ins.inputs == shard)
    again = replace(reload, outputs=refs("again"), action="B0.0")
    step[done + 1 : done + 1] = [again, wait("again", "B0.0"), Instruction(Op.FREE, inputs=refs("again"))]
    rejected(plan, step)


def test_a_read_of_what_was_written_in_place_is_refused() -> None:
    plan = planned("dp2+offload:optimizer=cpu")
    (stage,) = plan.stages
    step = list(stage.step())
    at, bound = next((at, ins) for at, ins in enumerate(step) if ins.op is Op.BIND and ins.action == "epilogue")
    flat = next(ref for ref in bound.outputs if ref.name.startswith("flat:"))
    new = bound.inputs[bound.outputs.index(flat)]
    in_place = replace(stage, storages=stage.storages | {new.name: stage.storages[flat.name]})
    prove(replace(plan, stages=(in_place,), peak_bytes=()))
    reader = replace(collective(Op.REDUCE, "all_reduce", str(flat)[1:], "read", X, "B0.0", "dp"), type=kind(64))
    step[at:at] = [reader, wait("read", "B0.0"), Instruction(Op.FREE, inputs=refs("read"))]
    rejected(replace(plan, stages=(in_place,)), step)
