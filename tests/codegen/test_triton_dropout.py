"""Dropout in kernels: the mask that the operator draws, bit for bit, wherever its elements lie in a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphshard.ops  # noqa: F401 - defines graphshard::dropout_mask
from graphshard.codegen.triton import write_kernel
from interpreted import Interpreter
from traced import check, region_from

aten = torch.ops.aten
gs = torch.ops.graphshard
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SEED = torch.tensor(0x1234567890ABCDEF)


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x * gs.dropout_mask(seed, list(x.shape), p) * (1 / (1 - p))  # type: ignore[no-any-return]


@quick
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).flatmap(
        lambda first: st.integers(1, 70).map(lambda last: [*first, last])
    ),
    p=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_elements(interpreter: Interpreter, shape: list[int], p: float, seed: int) -> None:
    x, y = torch.randn(shape), torch.randn(shape)
    check(interpreter, lambda x, y, seed: dropped(x, seed, p) + y, x, y, torch.tensor(seed))


def normed(x: Tensor, y: Tensor, seed: Tensor) -> Any:
    """The residual stream, and its norm."""
    total = dropped(x, seed, 0.25) + y
    return total, *aten.native_layer_norm(total, [x.shape[-1]], None, None, 1e-5)


@pytest.mark.parametrize("shape", [(6, 64), (5, 63), (3, 2), (1, 5), (3, 5000), (2, 60002), (1, 60000)])
def test_rows(interpreter: Interpreter, shape: tuple[int, ...]) -> None:
    check(interpreter, normed, torch.randn(shape), torch.randn(shape), SEED)


def other_places(x: Tensor, seed: Tensor) -> list[Tensor]:
    """Elements of a mask read in another order than they are numbered, and more than once."""
    kept = gs.dropout_mask(seed, list(x.shape), 0.5)
    row = gs.dropout_mask(seed, [x.shape[-1]], 0.5)
    return [(x * kept).T, x.T * kept.T, x[1:, 1:] * kept[:-1, :-1], x * row, kept.float()]


@pytest.mark.parametrize("shape", [(8, 12), (7, 9)])
def test_places(interpreter: Interpreter, shape: tuple[int, ...]) -> None:
    check(interpreter, other_places, torch.randn(shape), SEED)


def test_all_or_nothing(interpreter: Interpreter) -> None:
    x = torch.randn(4, 8)
    check(interpreter, lambda x, seed: [x * gs.dropout_mask(seed, [4, 8], p) for p in (0.0, 1.0)], x, SEED)


@pytest.mark.parametrize(
    ("function", "shape", "drawn"),
    [
        (normed, (8, 64), "drawn_in_fours"),
        (normed, (8, 63), "drawn"),
        (normed, (8, 60000), "drawn_in_fours"),
        (lambda x, y, seed: dropped(x, seed, 0.1) + y, (9, 7), "drawn_in_fours"),
        (lambda x, y, seed: dropped(x, seed, 0.1).T + y.T, (12, 8), "drawn_in_fours"),  # in the order of memory
    ],
)
def test_blocks_are_shared_where_rows_allow_it(function: Callable[..., Any], shape: Any, drawn: str) -> None:
    region = region_from(function, torch.empty(shape), torch.empty(shape), SEED)
    source = write_kernel(region, "dropped").source
    assert f"def {drawn}(" in source
    assert source.count("def drawn") == 1
