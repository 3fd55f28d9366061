"""Operators of which capture makes something else than AOTAutograd would: models that use them train as eagerly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphshard.trace import capture
from numerics.cases import sgd
from numerics.reference import check_parity

PLANS = ("dp1", "zero3:size=2+accum2", "pp2", "recompute:policy=full")
WIDTH = 6


class Model(nn.Module):
    """Two linear layers, with ``between(self, hidden)`` behind each."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(self, layer(x))
        return x


def trained(between: Callable[[Any, Tensor], Tensor], plan: str, dtype: torch.dtype = torch.float64) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Model(between), (torch.randn(16, WIDTH), torch.randn(16, WIDTH)), {}, F.mse_loss

    check_parity(make, plan, sgd, dtype=dtype)


def inverse(model: Any, hidden: Tensor) -> Tensor:
    return hidden @ torch.inverse(model.weight)


def cholesky(model: Any, hidden: Tensor) -> Tensor:
    result: Tensor = hidden @ torch.linalg.cholesky(model.weight @ model.weight.t())
    return result


def solved(model: Any, hidden: Tensor) -> Tensor:
    result: Tensor = torch.linalg.solve(model.weight, hidden.t()).t()
    return result


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("between", [inverse, cholesky, solved])
def test_layers(between: Any, plan: str) -> None:
    trained(between, plan)


def one_hot_loss(out: Tensor, classes: Tensor) -> Tensor:
    return F.l1_loss(out, F.one_hot(classes, WIDTH).to(out.dtype))


@pytest.mark.parametrize("plan", PLANS)
def test_one_hot(plan: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        batch = torch.randn(16, WIDTH), torch.randint(WIDTH, (16,))
        return Model(lambda _, hidden: torch.tanh(hidden)), batch, {}, one_hot_loss

    check_parity(make, plan, sgd, dtype=torch.float64)


def test_that_values_are_not_checked_is_said(caplog: pytest.LogCaptureFixture) -> None:
    batch = torch.zeros(2, WIDTH), torch.zeros(2, dtype=torch.int64)
    with caplog.at_level(logging.WARNING, "graphshard"):
        capture(Model(inverse), one_hot_loss, batch, {}, mode="train")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "torch.inverse(model.weight)" in said[0] and "F.one_hot(classes, WIDTH)" in said[1]
