"""What dropout draws depends on the data-parallel rank and the micro-batch, and on nothing else about the plan."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import graphshard
from marks import full
from numerics.cases import maker
from numerics.reference import assert_close

FOUR_ON_ONE = ("accum4", "pp2:microbatches=4", "pp2:schedule=zb-h1,microbatches=2+accum2")
TWO_ON_TWO = (
    "dp2+accum2",
    "zero3:size=2+accum2",
    "zero3+pp2:microbatches=2",
    "zero1+pp4:schedule=gpipe,microbatches=2",
)


def train(name: str, plan: str, steps: int = 2, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of ``steps`` steps on one batch, and the weights after them, in float64."""
    model, args, kwargs, loss_fn = maker(name, plan, dropout=0.3)()
    compiled = graphshard.compile(
        model.double(), plan, loss_fn=loss_fn, optimizer=partial(SGD, lr=0.1), executor="local", seed=seed
    )
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    return [compiled.step(*args, **kwargs) for _ in range(steps)], compiled.state_dict()


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("mlp", FOUR_ON_ONE),
        ("gpt", TWO_ON_TWO),
        ("bert", TWO_ON_TWO[1:3]),
        full("t5", TWO_ON_TWO[1:3]),
    ],
)
def test_plans_with_one_split_agree(name: str, plans: tuple[str, ...]) -> None:
    losses, weights = train(name, plans[0])
    for plan in plans[1:]:
        other_losses, other_weights = train(name, plan)
        for index, (ours, theirs) in enumerate(zip(other_losses, losses, strict=True)):
            assert_close(f"{plan}: loss of step {index}", ours, theirs, torch.float64)
        for key, value in weights.items():
            assert_close(f"{plan}: {key}", other_weights[key], value, torch.float64)


def frozen_losses(model: nn.Module, plan: str, x: Tensor, steps: int, seed: int = 0) -> list[float]:
    """Losses of steps that change no weight."""
    compiled = graphshard.compile(
        copy.deepcopy(model),
        plan,
        loss_fn=lambda y: y.sum(),
        optimizer=partial(SGD, lr=0.0),
        executor="local",
        seed=seed,
    )
    return [compiled.step(x).item() for _ in range(steps)]


def test_steps_ranks_and_micro_batches_draw_differently() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    x = torch.ones(1, 4).expand(4, 4).contiguous()  # every part of every split is the same
    first, second = frozen_losses(model, "accum4", x, 2)
    assert first != second
    assert [first, second] == frozen_losses(model, "accum4", x, 2)
    assert first != frozen_losses(model, "accum4", x, 1, seed=1)[0]
    # If ranks, or micro-batches, drew the same, their mean would be what one of them has alone.
    alone = frozen_losses(model, "accum1", x[:1], 1)[0]
    assert alone != pytest.approx(frozen_losses(model, "dp2", x[:2], 1)[0])
    assert alone != pytest.approx(frozen_losses(model, "accum2", x[:2], 1)[0])
    assert frozen_losses(model, "dp2", x[:2], 1)[0] != pytest.approx(frozen_losses(model, "accum2", x[:2], 1)[0])


def test_evaluation_draws_nothing() -> None:
    model, args, _, loss_fn = maker("mlp", "dp2", dropout=0.5)()
    compiled = graphshard.compile(model, "dp2", loss_fn=loss_fn, optimizer=partial(SGD, lr=0.1), executor="local")
    assert compiled.evaluate(*args) == compiled.evaluate(*args)
    model.eval()
    assert loss_fn is not None
    assert_close("loss", compiled.evaluate(*args), loss_fn(model(args[0]), args[1]).detach(), torch.float32)
