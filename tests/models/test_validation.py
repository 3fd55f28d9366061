"""Translation validation of every model of the zoo: no pass changes what a step computes."""

from __future__ import annotations

import pytest

import graphshard
from models.zoo import MODELS
from numerics.cases import adamw, maker

PLAN = "zero3+pp2:microbatches=2"


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_keeps_the_meaning(name: str) -> None:
    model, args, kwargs, loss_fn = maker(name, PLAN)()
    compiled = graphshard.compile(
        model,
        PLAN,
        loss_fn=loss_fn,
        optimizer=adamw(model),
        example_inputs=(args, kwargs),
        executor="none",
        max_grad_norm=0.5,
    )
    assert list(compiled.verify()) == compiled.passes
