"""What a program costs: the bytes of its plan exactly, its peak nearly, and the rules of the estimate one by one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import graphshard
from graphshard import text
from graphshard.costs import costs
from graphshard.memory.simulate import simulate_memory
from graphshard.runtime.traffic import sent_bytes
from marks import full
from models import zoo


@functools.cache
def compiled(name: str, plan: str, rows: int = 16) -> graphshard.Compiled:
    model, inputs, loss_fn = zoo.MODELS[name](rows=rows)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    return graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=adamw, example_inputs=inputs, executor="none", max_grad_norm=1.0
    )


PLANS = ["dp2", "zero1+accum2", "zero2+accum2", "zero3+accum2", "zero3:budget_gb=1+accum2", "pp2", "zero3+pp2"]


@pytest.mark.parametrize("plan", [*PLANS, "dp2+zero3:size=2", full("dp2+pp2:schedule=zb-h1")])
def test_bytes_sent_are_those_of_the_plan(plan: str) -> None:
    made = compiled("gpt", plan)
    found = costs(made.program)
    for stage, mine in enumerate(found.stages):
        assert mine.sent_bytes == sent_bytes(made.execution_plan, made.mesh.rank({"pp": stage}))
        assert mine.sent_bytes
    assert found.sent_bytes.keys() == dict(made.mesh.axes).keys()


@pytest.mark.parametrize(
    ("model", "plan"),
    [*(("gpt", plan) for plan in (*PLANS, "pp4:microbatches=4")), ("convnet", "dp2"), ("convnet", "zero3+pp2")],
)
def test_the_peak_is_near_that_of_the_plan(model: str, plan: str) -> None:
    made = compiled(model, plan)
    for stage, mine in enumerate(costs(made.program).stages):
        simulated = simulate_memory(made.execution_plan, stage).peak_bytes
        assert mine.peak_bytes == pytest.approx(simulated, rel=0.25)
        assert mine.stored_bytes < mine.peak_bytes


def test_flops_of_the_body_are_the_reports() -> None:
    made = compiled("gpt", "dp2")
    (found,) = costs(made.program).stages
    assert found.flops["forward"] + found.flops["backward"] == made.report()["ranks"][0]["flops"]
    assert found.flops["update"] > 0


BODY = """graphshard 1
mesh {mesh}
level {level}
microbatches {microbatches}
param "w" : f32[8,8]

graph prologue {{
  %zero : f32[8,8] = aten.full.default([8, 8], 0.0)
  return carry "grad:w" %zero
}}

graph body {{
  %w : f32[8,8] = param "w"
  %x : f32[2,8] = batch 0
  %sum : f32[8,8] = carry "grad:w"
  %y : f32[2,8] = aten.mm.default(%x, %w)
  %v : f32[16] = aten.view.default(%y, [16])
  %z : f32[16] = aten.exp.default(%v)
  %g : f32[16] = aten.mul.Tensor(%z, %z) {{phase=backward}}
  %h : f32[2,8] = aten.view.default(%g, [2, 8]) {{phase=backward}}
  %t : f32[8,2]{{1,8}} = aten.t.default(%x) {{phase=backward}}
  %dw : f32[8,8] = aten.mm.default(%t, %h) {{phase=backward}}
  %new : f32[8,8] = aten.add.Tensor(%sum, %dw) {{phase=backward}}
  return carry "grad:w" %new
}}

graph epilogue {{
  %sum : f32[8,8] = carry "grad:w"
  %w : f32[8,8] = param "w"
  %next : f32[8,8] = aten.sub.Tensor(%w, %sum)
  return param "w" %next
}}
"""


def of(microbatches: int, body: str = BODY, mesh: str = "", level: str = "captured") -> Any:
    made = body.format(microbatches=microbatches, mesh=mesh, level=level).replace("mesh \n", "")
    return costs(text.parse(made)).stages


def test_flops_count_the_body_once_per_micro_batch() -> None:
    (once,), (twice,) = of(1), of(2)
    assert once.flops == {"forward": 2 * 2 * 8 * 8 + 16, "backward": 2 * 8 * 2 * 8 + 16 + 64, "update": 64 + 64}
    assert twice.flops == once.flops | {phase: 2 * once.flops[phase] for phase in ("forward", "backward")}


def test_peak_of_values_in_node_order() -> None:
    weight, batch, row = 256, 64, 64
    (found,) = of(2)
    assert found.stored_bytes == weight
    # The accumulator and the gradient, written over it; y is gone once z is there, z once g is.
    assert found.peak_bytes == weight + 2 * batch + weight + (row + weight)
    (alone,) = of(1)
    assert alone.peak_bytes == weight + batch + 2 * weight, "the accumulator begins as the first gradient"


def test_a_view_keeps_its_storage_alive_and_takes_none() -> None:
    kept = BODY.replace('return carry "grad:w" %new', 'return carry "grad:w" %new, output 0 %v, output 1 %y')
    assert of(2, kept)[0].peak_bytes == of(2)[0].peak_bytes + 64


def test_earlier_stages_hold_more_micro_batches() -> None:
    staged = BODY.replace("{{phase", "{{stage=1, phase").replace('"grad:w"', '"grad:w" @1')
    staged = (
        staged.replace("%y : f32[2,8] = aten.mm.default(%x, %w)", "%y : f32[2,8] = aten.mm.default(%x, %w) {{stage=0}}")
        .replace("aten.view.default(%y, [16])", "aten.view.default(%y, [16]) {{stage=0}}")
        .replace("aten.exp.default(%v)", "aten.exp.default(%v) {{stage=0}}")
        .replace(
            "  %g : f32[16] = aten.mul.Tensor(%z, %z)",
            "  %s : f32[16] = graphshard.transfer.default(%z, 0, 1) {{stage=1}}\n"
            "  %q : f32[16] = aten.mul.Tensor(%z, 2) {{stage=0, phase=backward}}\n"
            "  %g : f32[16] = aten.mul.Tensor(%s, %s)",
        )
        .replace("%new\n}}\n\ngraph epi", "%new, output 0 %q\n}}\n\ngraph epi")
    )
    one, two = (of(count, staged, "pp=2", "staged") for count in (1, 2))
    assert one[0].sent_bytes == {"pp": 64} and two[0].sent_bytes == {"pp": 128} and not one[1].sent_bytes
    batch, saved = 64, 64
    assert two[0].peak_bytes - one[0].peak_bytes == batch + saved
    assert two[0].flops["forward"] == 2 * (2 * 2 * 8 * 8 + 16)
    assert "forward" not in two[1].flops


def test_a_captured_program_is_one_stage_and_sends_nothing() -> None:
    (found,) = of(2, mesh="pp=2 dp=2")
    assert found.sent_bytes == {}
