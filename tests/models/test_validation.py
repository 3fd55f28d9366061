"""Translation validation: no pass changes what a step computes. ``-m full``: of every model, for every plan."""

from __future__ import annotations

import pytest

import graphshard
from models.zoo import MODELS
from numerics.cases import PLANS, SPLITS, adamw, maker

PLAN = "zero3+pp2:microbatches=2"
FEW = ("mlp", "convnet", "nested", "gpt")


@pytest.mark.parametrize("name", FEW)
def test_every_pass_keeps_the_meaning(name: str) -> None:
    check(name, PLAN)


@pytest.mark.full
@pytest.mark.parametrize("plan", [PLAN, *PLANS, *SPLITS])
@pytest.mark.parametrize("name", MODELS)
def test_every_pass_of_every_plan_keeps_the_meaning(name: str, plan: str) -> None:
    check(name, plan)


def check(name: str, plan: str) -> None:
    model, args, kwargs, loss_fn = maker(name, plan)()
    compiled = graphshard.compile(
        model,
        plan,
        loss_fn=loss_fn,
        optimizer=adamw(model),
        example_inputs=(args, kwargs),
        executor="none",
        max_grad_norm=0.5,
    )
    assert compiled.verify() == compiled.passes
