"""Checks of values that Python code makes are left out of a step, which is said, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, StudentT

from graphshard.errors import ModelFailed
from graphshard.trace import capture
from numerics.test_operators import WIDTH, Model, trained


def all_true(_: Any, hidden: Tensor) -> Tensor:
    torch._check_tensor_all(hidden < 99, lambda: "it is small")
    return hidden


def all_true_or(_: Any, hidden: Tensor) -> Tensor:
    torch._check_tensor_all_with(ValueError, hidden < 99, lambda: "it is small")
    return hidden


def asserted(_: Any, hidden: Tensor) -> Tensor:
    torch._assert((hidden < 99).all(), "it is small")
    return hidden


def asserted_later(_: Any, hidden: Tensor) -> Tensor:
    torch._assert_async((hidden < 99).all(), "it is small")
    return hidden


def likely(_: Any, hidden: Tensor) -> Tensor:
    density: Tensor = Normal(hidden.tanh(), 1 + hidden.abs()).log_prob(hidden)
    return hidden - density


def likely_if_asked(model: Any, hidden: Tensor) -> Tensor:
    made = Independent(StudentT(3 + model.weight[0].abs(), hidden), 1, validate_args=True)
    density: Tensor = made.log_prob(model.weight[1])
    return hidden - density[:, None]


CHECKED = (all_true, all_true_or, asserted, asserted_later, likely, likely_if_asked)


@pytest.fixture(autouse=True)
def validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is until torch.compile is first used, which switches it off."""
    monkeypatch.setattr(Distribution, "_validate_args", True)


@pytest.mark.parametrize("between", CHECKED)
def test_a_step_computes_what_is_checked(between: Callable[..., Tensor], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graphshard"):
        trained(between, "dp2")
    (said,) = {record.getMessage() for record in caplog.records if "does not check" in record.getMessage()}
    assert f"test_checks.py:{between.__code__.co_firstlineno + 1}" in said


def test_checks_are_back_afterwards() -> None:
    batch = torch.zeros(16, WIDTH), torch.zeros(16, WIDTH)
    before = Distribution._validate_args
    for between in CHECKED:
        capture(Model(between), F.mse_loss, batch, {}, mode="train")
    assert Distribution._validate_args is before
    with pytest.raises(ValueError, match="scale"):
        Normal(0.0, torch.tensor(-1.0), validate_args=True)
    with pytest.raises(RuntimeError, match="it is small"):
        all_true(None, torch.full((2,), 100.0))


def test_what_is_known_while_a_model_is_captured_is_checked() -> None:
    def wide(_: Any, hidden: Tensor) -> Tensor:
        torch._assert(hidden.dim() == 3, "three dims")
        return hidden

    with pytest.raises(ModelFailed, match="three dims"):
        capture(Model(wide), F.mse_loss, (torch.zeros(16, WIDTH), torch.zeros(16, WIDTH)), {}, mode="train")
