"""Large matrix products: either library's result, on every layout that segments use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphshard.runtime import products

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "repeated": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("left_layout", LAYOUTS)
@pytest.mark.parametrize("right_layout", LAYOUTS)
@pytest.mark.parametrize("inner", [1, 512, 600])
def test_products(left_layout: str, right_layout: str, inner: int) -> None:
    torch.manual_seed(0)
    left = LAYOUTS[left_layout](torch.randn(24, inner))
    right = LAYOUTS[right_layout](torch.randn(inner, 40))
    bias = torch.randn(40)
    expected = left.double() @ right.double()
    target = torch.randn(24, 40)
    added = target.double() + expected
    products.add_mm(target, left, right)
    overwritten = torch.full((24, 40), float("nan"))
    products.mm_into(overwritten, left, right)
    for result, wanted in (
        (products.mm(left, right), expected),
        (products.addmm(bias, left, right), expected + bias.double()),
        (target, added),
        (overwritten, expected),
    ):
        assert result.is_contiguous()
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5 * inner**0.5)


def test_a_long_sum_is_nearly_as_accurate_as_with_blas() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 8192), torch.randn(8192, 64)
    exact = left.double() @ right.double()

    def off(result: Tensor) -> float:
        return float((result - exact).square().mean().sqrt())

    assert off(products._by_onednn(left, right)) < 2 * off(left @ right)


def test_the_choice_is_made_once_and_holds() -> None:
    assert products.onednn_is_faster() is products.onednn_is_faster()
