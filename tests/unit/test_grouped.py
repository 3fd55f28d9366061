"""``graphshard::grouped_mm`` and its gradient against a product for each group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphshard.ops  # noqa: F401

gs = torch.ops.graphshard
ROWS, K, N = 9, 8, 16  # what torch's kernel on a GPU takes in bfloat16
OFFS = [
    [3, 3, 7],  # a group without rows, and rows behind the last group
    [0, 4, 9],
    [0, 0, 0],
    [9, 9, 9],
]


def by_group(x: Tensor, w: Tensor, offs: list[int]) -> Tensor:
    ends = zip([0, *offs], offs, strict=False)
    parts = [x[start:end] @ w[group] for group, (start, end) in enumerate(ends)]
    return torch.cat([*parts, x.new_zeros(len(x) - offs[-1], w.shape[2])])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(offs=st.sampled_from(OFFS) | st.lists(st.integers(0, ROWS), min_size=3, max_size=3).map(sorted))
def test_rows_of_a_group_are_multiplied_by_its_matrix(transposed: bool, dtype: torch.dtype, offs: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, K, dtype=dtype, requires_grad=True)
    w = torch.randn(3, N, K, dtype=dtype) if transposed else torch.randn(3, K, N, dtype=dtype)
    w.requires_grad_()
    used = w.mT if transposed else w
    ours, theirs = gs.grouped_mm(x, used, torch.tensor(offs, dtype=torch.int32)), by_group(x, used, offs)
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous() and ours.dtype is dtype
    grad = torch.randn(ROWS, N, dtype=dtype)
    for mine, wanted in zip(*(torch.autograd.grad(out, (x, w), grad) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, wanted)
        assert mine.is_contiguous()


@pytest.mark.parametrize("offs", OFFS)
def test_gradients(offs: list[int]) -> None:
    torch.manual_seed(0)
    ends = torch.tensor(offs)
    x = torch.randn(ROWS, K, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, K, N, dtype=torch.float64, requires_grad=True)
    y = torch.randn(ROWS, N, dtype=torch.float64, requires_grad=True)
    for product, operands in ((gs.grouped_mm, (x, w)), (gs.grouped_outer, (x, y))):
        assert torch.autograd.gradcheck(lambda *given, p=product: p(*given, ends), operands)
        assert torch.autograd.gradgradcheck(lambda *given, p=product: p(*given, ends), operands)


def test_types() -> None:
    x, w = torch.randn(ROWS, K), torch.randn(3, N, K).mT
    offs = torch.tensor([2, 5, 9])
    for operator, given_ in ((gs.grouped_mm, (x, w, offs)), (gs.grouped_outer, (x, torch.randn(ROWS, N), offs))):
        torch.library.opcheck(operator, given_, test_utils=("test_schema", "test_faketensor"))
        meta = operator(*(value.to("meta") for value in given_))
        made = operator(*given_)
        assert (meta.shape, meta.stride(), meta.dtype) == (made.shape, made.stride(), made.dtype)
