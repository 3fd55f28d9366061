"""Large matrix products: either library's result, on every layout that segments use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from graphshard.runtime import products
from graphshard.runtime.products import Library

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "repeated": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.fixture(params=Library, ids=lambda library: library.name)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which moves what it made ten rows at a time."""
    monkeypatch.setattr(products, "library", lambda: request.param)
    monkeypatch.setattr(products, "part_rows", lambda columns: 10)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("left_layout", LAYOUTS)
@pytest.mark.parametrize("right_layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(24, 1, 40), (24, 600, 40), (24, 300, 1100)])
def test_products(left_layout: str, right_layout: str, rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(0)
    left = LAYOUTS[left_layout](torch.randn(rows, inner))
    right = LAYOUTS[right_layout](torch.randn(inner, columns))
    bias = torch.randn(columns)
    expected = left.double() @ right.double()
    target = torch.randn(rows, columns)
    added = target.double() + expected
    products.add_mm(target, left, right)
    overwritten = torch.full((rows, columns), float("nan"))
    products.mm_into(overwritten, left, right)
    memory = torch.full((rows, columns), float("nan"))
    assert products.mm(left, right, lambda: memory).data_ptr() == memory.data_ptr()
    for result, wanted in (
        (products.mm(left, right), expected),
        (products.addmm(bias, left, right), expected + bias.double()),
        (target, added),
        (overwritten, expected),
        (memory, expected),
    ):
        assert result.is_contiguous()
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5 * inner**0.5)


def test_a_long_sum_is_nearly_as_accurate_as_with_blas() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 8192), torch.randn(8192, 64)
    exact = left.double() @ right.double()

    def off(result: Tensor) -> float:
        return float((result - exact).square().mean().sqrt())

    assert off(products._by_onednn(torch.empty(64, 64), left, right)) < 2 * off(left @ right)


def test_the_choice_is_made_once_and_holds() -> None:
    assert products.library() is products.library()


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float, bool], Library]]:
    """What is chosen where oneDNN takes such a part of the other's time, on a processor of AMD's or not."""

    def chosen(part: float, amds: bool) -> Library:
        seconds = itertools.cycle([part, 1.0])
        monkeypatch.setattr(products, "_seconds", lambda product: next(seconds))
        monkeypatch.setattr(products, "_is_amds", lambda: amds)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        products.library.cache_clear()
        return products.library()

    yield chosen
    products.library.cache_clear()


def test_the_processors_name_decides_what_a_trial_would_not_find_twice(
    trial: Callable[[float, bool], Library],
) -> None:
    assert trial(0.5, False) is trial(0.5, True) is Library.ONEDNN
    assert trial(0.9, True) is trial(1.1, True) is Library.BOTH
    assert trial(0.9, False) is trial(1.1, False) is Library.BLAS


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "adds", "by_onednn"),
    [
        (512, 512, 2048, False, True),
        (512, 512, 2048, True, False),
        (512, 600, 2048, False, False),
        (512, 256, 2048, False, False),
        (512, 512, 512, False, False),
    ],
)
def test_where_both_compute_each_has_what_it_is_faster_at(
    rows: int, inner: int, columns: int, adds: bool, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "library", lambda: Library.BOTH)
    left, right = torch.empty(rows, inner), torch.empty(inner, columns)
    assert products._goes_to_onednn(left, right, adds) == by_onednn
    assert not products._goes_to_onednn(torch.empty(inner, rows).t(), right, adds)
