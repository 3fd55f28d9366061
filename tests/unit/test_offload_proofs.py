"""What is offloaded is read only when it is back, and everywhere where it is: plans and programs that say otherwise are
refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

from graphshard import text
from graphshard.codegen.lower import lower
from graphshard.codegen.schedule import make
from graphshard.errors import IllegalProgram, PlanError
from graphshard.execution import ExecutionPlan, Instruction, Op, Ref, match_waits
from graphshard.memory.simulate import simulate_memory
from graphshard.offloaded import offloaded, offloaded_bytes
from graphshard.pipeline import Context, parse_passes, run_passes
from graphshard.program import MemoryTag, Program, info
from graphshard.prove import prove
from graphshard.runtime.traffic import moved_bytes
from graphshard.verify import verify
from two_layers import two_layers

gs = torch.ops.graphshard
CASES = Path(__file__).parent.parent / "cases" / "offload"
PASSES = "normalize;pipeline-cut;zero:stage={};overlap;offload:optimizer=cpu,params=nvme"
TAGGED = "zero:stage=3;offload:activations=nvme"


def passed(name: str = "stored", passes: str = PASSES.format(3)) -> Program:
    program = text.parse((CASES / f"{name}.graph").read_text())
    return run_passes(program, parse_passes(passes), Context(program.mesh))


@functools.cache
def planned(name: str = "stored", passes: str = PASSES.format(3)) -> ExecutionPlan:
    """With the steps as one list, so that edits can be anywhere."""
    program = passed(name, passes)
    plan = lower(program, make("1f1b", 1, program.microbatches))
    prove(plan)
    (stage,) = plan.stages
    flat = replace(stage, prologue=(), body=stage.step(), epilogue=(), first_epilogue=None)
    return replace(plan, stages=(flat,), peak_bytes=())


Edit = Callable[[list[Instruction]], None]


def at(body: list[Instruction], op: Op, nth: int = 0) -> int:
    return [i for i, ins in enumerate(body) if ins.op is op][nth]


def wait_of(body: list[Instruction], started: int) -> int:
    return next(wait for wait, begun in match_waits(body).items() if begun == started)


def without_wait(op: Op, nth: int = 0) -> Edit:
    def edit(body: list[Instruction]) -> None:
        del body[wait_of(body, at(body, op, nth))]

    return edit


def elsewhere(body: list[Instruction]) -> None:
    body[at(body, Op.RELOAD)] = replace(body[at(body, Op.RELOAD)], name="cpu")


def nowhere(body: list[Instruction]) -> None:
    body[at(body, Op.OFFLOAD)] = replace(body[at(body, Op.OFFLOAD)], name="tape")


def freed_early(body: list[Instruction]) -> None:
    started = at(body, Op.OFFLOAD)
    body.insert(started + 1, Instruction(Op.FREE, inputs=body[started].inputs))


def read_directly(body: list[Instruction]) -> None:
    gather, reload = at(body, Op.GATHER), at(body, Op.RELOAD)
    body[gather] = replace(body[gather], inputs=body[reload].inputs, last=frozenset())


def overwritten_in_flight(body: list[Instruction]) -> None:
    """Offloaded into the place that is still being read."""
    started = at(body, Op.OFFLOAD)
    reload = next(i for i, ins in enumerate(body) if ins.op is Op.RELOAD and ins.inputs == body[started].outputs)
    late = body.pop(reload)
    again = replace(late, outputs=(Ref("again", late.outputs[0].microbatch),))
    body.insert(at(body, Op.OFFLOAD), again)
    body.insert(reload, late)


def left_on_the_device(body: list[Instruction]) -> None:
    started = at(body, Op.OFFLOAD)
    wait = wait_of(body, started)
    move = body[started]
    del body[wait]
    body[started] = Instruction(Op.BIND, inputs=move.inputs, outputs=move.outputs)


DAMAGE: dict[str, tuple[Edit, str]] = {
    "a reload is not waited for": (without_wait(Op.RELOAD), "is read before the WAIT for it"),
    "an offload is not waited for": (without_wait(Op.OFFLOAD), "is freed before the WAIT for the communication"),
    "a source is freed while it leaves": (freed_early, "is freed before the WAIT for the communication that reads it"),
    "reloaded from another place": (elsewhere, "is reloaded from cpu, but it is in nvme"),
    "offloaded to no place": (nowhere, "OFFLOAD names 'tape', which is no place; it can be cpu, nvme"),
    "read where it is": (read_directly, "is read while it is offloaded to nvme"),
    "replaced while it is read": (overwritten_in_flight, "before the WAIT for the communication that reads it"),
    "left on the device": (left_on_the_device, "is kept in cpu, and left on the device"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_plans_are_refused(what: str) -> None:
    edit, message = DAMAGE[what]
    (stage,) = planned().stages
    body = list(stage.body)
    edit(body)
    with pytest.raises(PlanError, match=re.escape(message)):
        prove(replace(planned(), stages=(replace(stage, body=tuple(body)),)))


def test_an_activation_is_reloaded_after_it_has_left() -> None:
    (stage,) = planned("activations", TAGGED).stages
    body = list(stage.body)
    started = at(body, Op.OFFLOAD)
    away = body[started].outputs
    body.append(body.pop(wait_of(body, started)))
    body = [ins for ins in body if ins.op is not Op.FREE or ins.inputs != body[started].inputs]
    assert any(ins.op is Op.RELOAD and ins.inputs == away for ins in body)
    with pytest.raises(PlanError, match=r"is read before the WAIT for it"):
        prove(replace(planned("activations", TAGGED), stages=(replace(stage, body=tuple(body)),)))


def test_few_buckets_are_on_the_device_while_they_are_updated() -> None:
    """What is offloaded has left before what comes two buckets later arrives."""
    plan = planned()
    outstanding: set[str] = set()
    waits = {wait: plan.stages[0].body[started] for wait, started in match_waits(plan.stages[0].body).items()}
    for position, ins in enumerate(plan.stages[0].body):
        if ins.op is Op.OFFLOAD:
            outstanding.add(str(ins.outputs[0]))
        elif position in waits and waits[position].op is Op.OFFLOAD:
            outstanding.discard(str(waits[position].outputs[0]))
        buckets = {name.split(":")[1] for name in outstanding}
        assert len(buckets) <= 2
    assert not outstanding


def test_what_is_away_is_counted_apart() -> None:
    plan = planned()
    assert plan.stages[0].homes
    state, parameters = 4 * (8 + 5), 4 * (8 + 5)
    assert offloaded_bytes(plan, 0) == {"cpu": state, "nvme": parameters}
    assert offloaded(plan, 0, "nvme") == {32: 1, 20: 1}
    times = 2 * plan.microbatches + 1  # forward and backward of each micro-batch, and the update
    b_alone = plan.microbatches  # the backward does not read the first layer's weight
    assert moved_bytes(plan, 0) == {
        "from nvme": times * parameters - b_alone * 32,
        "from cpu": state,
        "to nvme": parameters,
        "to cpu": state,
    }
    plain = passed(passes=PASSES.format(3).rpartition(";")[0])
    resident = lower(plain, make("1f1b", 1, plain.microbatches))
    assert simulate_memory(plan, 0).peak_bytes < simulate_memory(resident, 0).peak_bytes


def test_activations_need_room_for_all_that_are_in_flight() -> None:
    plan = planned("activations", TAGGED)
    assert offloaded(plan, 0, "nvme") == {32: 2}


def refused(program: Program, message: str) -> None:
    with pytest.raises(IllegalProgram, match=re.escape(message)):
        verify(program)


def found(program: Program, target: object) -> fx.Node:
    return next(node for node in program.body.nodes() if node.target is target)


def test_nothing_reads_what_is_away() -> None:
    program = passed("activations", TAGGED)
    reload = found(program, gs.reload.default)
    (wait,) = reload.users
    next(iter(wait.users)).replace_input_with(wait, reload.all_input_nodes[0])
    refused(program, "reads %offload_default_1, which is offloaded to nvme")


def test_it_is_reloaded_from_where_it_is() -> None:
    program = passed("activations", TAGGED)
    reload = found(program, gs.reload.default)
    reload.args = (reload.args[0], "cpu")
    refused(program, "from cpu, but it is in nvme")
    reload.args = (reload.args[0], "tape")
    refused(program, "'tape' is no place to keep a value; there are cpu, nvme")


def test_only_what_was_offloaded_is_reloaded() -> None:
    program = passed("activations", TAGGED)
    reload = found(program, gs.reload.default)
    reload.args = (reload.all_input_nodes[0].all_input_nodes[0], "nvme")
    refused(program, "but it is not offloaded")


def test_a_reload_is_waited_for() -> None:
    program = passed("activations", TAGGED)
    reload = found(program, gs.reload.default)
    (wait,) = reload.users
    wait.replace_all_uses_with(reload)
    refused(program, "reads the reload %reload_default_1 without waiting for it")


def test_graphs_agree_on_where_a_slot_is() -> None:
    program = passed()
    section = program.epilogue
    outputs = list(section.output_node.args[0])  # type: ignore[arg-type]
    outputs[1] = outputs[1].all_input_nodes[0]
    section.output_node.args = (tuple(outputs),)
    refused(program, 'shard "a.weight" is kept in nvme by another graph, and here on the device')


def test_moves_belong_to_sharded_programs() -> None:
    lines = '  %out = graphshard.offload.default(%x, "cpu")\n  %h1 ='
    source = two_layers("dp=2")
    first = next(line for line in source.splitlines() if " = aten." in line and "full" not in line)
    moved = first.partition("=")[0].strip()
    program = text.parse(source.replace(first, lines.replace("  %h1 =", f"  {moved} =") + first.partition("=")[2], 1))
    refused(program, "graphshard::offload does not exist at level captured")


def test_what_is_tagged_is_not_kept() -> None:
    program = passed("activations", TAGGED)
    kept = next(node for node in program.body.nodes() if info(node).tag is MemoryTag.OFFLOAD)
    late = found(program, torch.ops.aten.sin.default)
    late.replace_input_with(late.all_input_nodes[0], kept)
    refused(program, "is to be offloaded, and kept on the device for %s")
