"""What a caller has switched on around a step changes nothing of it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.errors import AmbientAutocast

X, Y = torch.linspace(-1, 1, 32).view(8, 4), torch.linspace(1, -1, 24).view(8, 3)


def compiled(plan: str, **more: Any) -> graphshard.Compiled:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return graphshard.compile(model, plan, loss_fn=F.mse_loss, optimizer=sgd, executor="local", cache=False, **more)


def run(made: graphshard.Compiled, x: Tensor, y: Tensor) -> list[Tensor]:
    return [made.evaluate(x, y), made.step(x, y), made.step(x, y), made(x), *made.state_dict().values()]


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2:microbatches=2", "fp16"])
def test_autocast_is_refused_where_the_plan_says_otherwise(plan: str) -> None:
    made = compiled(plan)
    for _ in range(2):  # before anything is traced, and after
        with torch.autocast("cpu", torch.bfloat16):
            for call in (made.step, made.evaluate, made.trace, lambda x, _: made(x)):
                with pytest.raises(
                    AmbientAutocast, match=r"compile with '\+bf16' or '\+fp16' in the plan, and call step"
                ):
                    call(X, Y)
            assert torch.is_autocast_enabled("cpu")
        made.step(X, Y)


def test_autocast_is_refused_around_tracing_in_compile() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AmbientAutocast, match="the plan has no precision"):
        compiled("dp2", example_inputs=(X, Y))


@pytest.mark.parametrize("plan", ["bf16", "zero3+bf16"])
def test_autocast_in_the_precision_of_the_plan_changes_nothing(plan: str) -> None:
    expected = run(compiled(plan), X, Y)
    made, later = compiled(plan), compiled(plan)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(made, X, Y)
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, inside, expected))
    first = [later.evaluate(X, Y), later.step(X, Y)]
    with torch.autocast("cpu", torch.bfloat16):
        rest = [later.step(X, Y), later(X), *later.state_dict().values()]
    assert all(map(torch.equal, first + rest, expected))


def test_the_accounts_of_a_plan_are_the_same_under_autocast() -> None:
    expected, made = compiled("zero3"), compiled("zero3")
    expected.trace(X, Y)
    made.trace(X, Y)
    with torch.autocast("cpu", torch.bfloat16):
        assert made.verify()
    assert str(made.execution_plan) == str(expected.execution_plan)


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2:microbatches=2", "fp16:init_scale=1024+zero1+accum2"])
def test_inference_mode_changes_nothing(plan: str) -> None:
    expected = compiled(plan)
    before, after = run(expected, X, Y), run(expected, X, Y)
    made = compiled(plan)
    with torch.inference_mode():
        x, y = X.clone(), Y.clone()
        inside = run(made, x, y)
        assert torch.is_inference_mode_enabled()
    assert all(map(torch.equal, inside, before))
    assert not inside[0].is_inference()
    assert all(map(torch.equal, run(made, x, y), after))
    with torch.inference_mode():  # a shape that is new
        made.evaluate(x[:4], y[:4])
    assert made.evaluate(X[:4], Y[:4]).isfinite()


def test_gradients_stay_off_where_they_were_off() -> None:
    made = compiled("dp2")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        made.step(X, Y)
        assert not torch.is_grad_enabled()
