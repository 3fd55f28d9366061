"""The peak that a plan states is what its ranks hold when they run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from torch.optim import Optimizer

import graphshard
from graphshard.memory.simulate import simulate_memory
from marks import full
from models.zoo import MODELS
from numerics.cases import PLANS, SPLITS, adamw, maker, sgd

SMALL = (
    "dp2",
    "zero3+pp2+recompute:policy=full",
    "zero2:size=2+accum3",
    "zero3+pp2:schedule=zb-h1",
    "zero3+pp2:schedule=zb-h2",
    "pp2:schedule=gpipe,microbatches=2",
    "zero3+pp4",
)
TOLERANCE, TINY_BYTES = 0.05, 1024


def agree(name: str, plan: str, optimizer: Callable[[nn.Module], Optimizer] = adamw) -> None:
    """Two steps: the first one finds no optimizer state."""
    model, args, kwargs, loss_fn = maker(name, plan)()
    compiled = graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=optimizer(model), executor="local", measure_memory=True
    )
    for _ in range(2):
        compiled.step(*args, **kwargs)
        for rank in compiled.report()["ranks"]:
            first, measured = rank["measured_first_step"], rank["measured_peak_bytes"]
            simulated = simulate_memory(compiled.execution_plan, rank["stage"], first).peak_bytes
            allowed = max(TOLERANCE * measured, TINY_BYTES)
            assert abs(simulated - measured) <= allowed, (rank["rank"], first, simulated, measured)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, plan) for name in ("mlp", "convnet") for plan in SMALL),
        ("t5", "zero3+pp2+recompute:policy=full"),
        *(full("t5", plan) for plan in SMALL if "recompute" not in plan),
    ],
)
def test_simulated_and_measured_peaks_agree(name: str, plan: str) -> None:
    agree(name, plan)


@pytest.mark.full
@pytest.mark.parametrize("plan", PLANS + SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_on_every_model_and_plan(name: str, plan: str) -> None:
    agree(name, plan)


@pytest.mark.parametrize("plan", ["dp2+accum2", "zero1+pp2"])
def test_with_an_optimizer_that_keeps_less(plan: str) -> None:
    agree("gpt", plan, sgd)
