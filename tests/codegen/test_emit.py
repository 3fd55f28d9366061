"""A plan as files: they give back the very plan, and are Python, JSON and safetensors that mean what they say."""

from __future__ import annotations

import ast
import functools
import json
import tempfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

import graphshard
from graphshard.codegen import emit
from graphshard.execution import ExecutionPlan
from numerics.cases import maker

PLANS = (
    "dp2",
    "zero1:size=2+accum2",
    "zero3+pp2",
    "zero3:budget_gb=1+pp2",
    "dp2+zero3:size=2",
    "pp4:schedule=gpipe",
    "pp2:schedule=zb-h1,microbatches=3",
    "zero3:size=2+bf16:reduce=bf16",
    "zero1+pp2+fp16:init_scale=1024",
    "zero3:size=2+recompute:policy=full",
    f"zero3+pp2+offload:optimizer=nvme,params=cpu,activations=cpu,path={tempfile.gettempdir()}",
)


@functools.cache
def planned(model: str, plan: str, debug_nan: bool = False) -> ExecutionPlan:
    made, args, kwargs, loss_fn = maker(model, plan)()
    compiled = graphshard.compile(
        made,
        plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1),
        max_grad_norm=1.0,
        example_inputs=(args, kwargs),
        executor="none",
        debug_nan=debug_nan,
    )
    return compiled.execution_plan


def same(one: ExecutionPlan, other: ExecutionPlan) -> None:
    assert replace(one, constants={}) == replace(other, constants={})
    assert list(one.constants) == list(other.constants)
    for name, value in one.constants.items():
        assert (value.dtype, value.stride()) == (other.constants[name].dtype, other.constants[name].stride())
        assert torch.equal(value, other.constants[name])


@pytest.mark.parametrize("plan", PLANS)
def test_files_give_back_the_plan(plan: str) -> None:
    made = planned("mlp", plan)
    written = emit.files(made)
    again = emit.parse(written)
    same(made, again)
    assert emit.files(again) == written


@pytest.mark.parametrize(("model", "debug_nan"), [("mlp", True), ("convnet", False), ("gpt", False)])
def test_other_models_too(model: str, debug_nan: bool) -> None:
    made = planned(model, "zero3+pp2", debug_nan)
    assert made.watched == debug_nan
    same(made, emit.parse(emit.files(made)))


def test_the_order_of_what_is_listed_is_kept() -> None:
    """Slots are read in order, and segments printed so."""
    made = planned("gpt", "zero3+pp2")
    again = emit.parse(emit.files(made))
    for ours, theirs in zip(again.stages, made.stages, strict=True):
        assert list(ours.segments) == list(theirs.segments)
    assert [list(reads) for reads in again.reads] == [list(reads) for reads in made.reads]


def test_the_modules_define_what_the_plan_runs() -> None:
    made = planned("gpt", "zero3+pp2")
    written = emit.files(made)
    for index, stage in enumerate(made.stages):
        body = ast.parse(written[f"stage{index}.py"]).body
        assert [item.name for item in body if isinstance(item, ast.FunctionDef)] == list(stage.segments)
    body = ast.parse(written["kernels.py"]).body
    assert [item.name for item in body if isinstance(item, ast.FunctionDef)] == list(made.kernels)
    assert written["plan.txt"].decode() == str(made)
    json.loads(written["plan.json"])


def test_code_is_read_from_the_modules() -> None:
    """There is one copy of it: what a person reads is what runs."""
    made = planned("gpt", "zero3+pp2")
    written = emit.files(made)
    name = next(iter(made.stages[1].segments))
    changed = written["stage1.py"].replace(b"args.clear()", b"args.clear() ", 1)
    again = emit.parse(written | {"stage1.py": changed})
    assert again.stages[1].segments[name].source != made.stages[1].segments[name].source
    assert again.stages[0] == made.stages[0]


DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.booleans()), max_size=4))
def test_constants_keep_values_types_and_strides(kinds: list[tuple[torch.dtype, list[int], bool]]) -> None:
    constants = {}
    for index, (dtype, shape, transposed) in enumerate(kinds):
        value = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        constants[f"c.{index}"] = value.transpose(0, -1) if transposed and shape else value
    made = replace(planned("mlp", "dp2"), constants=constants)
    written = emit.files(made)
    assert ("constants.safetensors" in written) == bool(constants)
    assert set(load(written.get("constants.safetensors", b""))) == set(constants) if constants else True
    again = emit.parse(written)
    assert list(again.constants) == list(constants)
    for name, value in constants.items():
        ours = again.constants[name]
        assert (ours.dtype, ours.shape) == (value.dtype, value.shape)
        assert ours.stride() == value.stride() or not value.numel()
        assert ours.tolist() == value.tolist() if dtype_prints(value) else torch.equal(ours.float(), value.float())


def dtype_prints(value: torch.Tensor) -> bool:
    return value.dtype != torch.float8_e4m3fn
