"""``graphshard::attention`` against torch's own, forward and backward, by kernel and by formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphshard.ops  # noqa: F401
from graphshard import attention

gs = torch.ops.graphshard


def tensor(batch: int, heads: int, length: int, dim: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """[batch, heads, length, dim], contiguous or as a transposed projection."""
    if transposed:
        return torch.randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
    return torch.randn(batch, heads, length, dim, dtype=dtype)


def masks(kind: str, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "bool":
        mask = torch.rand(queries, keys) > 0.3
        mask[0] = False  # a query that sees nothing
        return mask
    if kind == "number":
        return torch.randn(1, 1, queries, keys, dtype=dtype)
    return torch.randn(2, 1, 1, keys, dtype=dtype) if kind == "rows" else None


@pytest.mark.parametrize("formula", [False, True], ids=["kernel", "formula"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dims=st.sampled_from([(8, 8), (8, 6), (5, 5), (1, 1)]),
    transposed=st.booleans(),
    mask_kind=st.sampled_from(["none", "causal", "bool", "number", "rows"]),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_same_as_torch(
    formula: bool,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    dims: tuple[int, int],
    transposed: bool,
    mask_kind: str,
    scale: float | None,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    q = tensor(2, heads[0], lengths[0], dims[0], transposed, dtype).requires_grad_()
    k = tensor(2, heads[1], lengths[1], dims[0], transposed, dtype).requires_grad_()
    v = tensor(2, heads[1], lengths[1], dims[1], transposed, dtype).requires_grad_()
    mask, causal, grouped = masks(mask_kind, *lengths, dtype), mask_kind == "causal", heads[0] != heads[1]
    with pytest.MonkeyPatch.context() as patch:
        if formula:
            patch.setattr(attention, "_kernel", lambda *_: "")
        out, lse = gs.attention(q, k, v, mask, causal, scale, grouped)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), grad)
    expected = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out, expected, **close)
    for have, want in zip(grads, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(have, want, **close)
    fakes = gs.attention(
        *(x.detach().to("meta") for x in (q, k, v)), None if mask is None else mask.to("meta"), causal, scale, grouped
    )
    assert [(x.shape, x.stride(), x.dtype) for x in fakes] == [(x.shape, x.stride(), x.dtype) for x in (out, lse)]


@pytest.mark.only_cpu("its kernel put together from parts")
@pytest.mark.parametrize("length", [255, 256, 257, 600, 1024, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_causal_attention_in_halves(
    length: int, dtype: torch.dtype, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of torch's kernel over all positions: less is computed, and the result is nearly the same."""
    torch.manual_seed(0)
    q, k, v, grad = (tensor(1, 2, length, 8, True, dtype) for _ in range(4))
    assert (attention._kernel(q, k, v, None, True) == "halves") == (256 <= length <= 1024)
    assert (
        attention._kernel(q, k[:, :, 1:], v[:, :, 1:], None, True) == attention._kernel(q, k, v, None, False) == "cpu"
    )
    found = []
    for _ in range(2):
        out, lse = gs.attention(q, k, v, None, True, scale, False)
        found.append((out, lse, *gs.attention_backward(grad, q, k, v, None, out, lse, True, scale, False)))
        monkeypatch.setattr(attention, "_kernel", lambda *_: "cpu")
    for ours, theirs in zip(*found, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 if dtype is torch.float32 else 1e-14)


def test_backward_strides_are_those_of_the_type() -> None:
    q, k, v = (tensor(2, 4, 5, 8, False, torch.float32) for _ in range(3))
    out, lse = gs.attention(q, k, v, None, True, None, False)
    arguments = (torch.ones_like(out), q, k, v, None, out, lse, True, None, False)
    real = gs.attention_backward(*arguments)
    fake = gs.attention_backward(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
    assert [x.stride() for x in real] == [x.stride() for x in fake]


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"dropout_p": 0.5}, False),
        ({"attn_mask": lambda: torch.zeros(4, 4, requires_grad=True)}, False),
        ({"attn_mask": lambda: torch.zeros(4, 4)}, True),
    ],
)
def test_what_stays_one_operator(change: dict[str, Any], fused: bool) -> None:
    x = torch.randn(2, 2, 4, 8, requires_grad=True)
    options = {name: value() if callable(value) else value for name, value in change.items()}
    y = attention.scaled_dot_product_attention(F.scaled_dot_product_attention, x, x, x, **options)
    assert ("graphshard" in type(y.grad_fn).__name__) == fused


def test_three_dimensions_and_broadcasting_are_left_to_torch() -> None:
    x, one = torch.randn(3, 4, 8), torch.randn(1, 3, 4, 8)
    for q, k in ((x, x), (torch.randn(2, 3, 4, 8), one)):
        ours = attention.scaled_dot_product_attention(F.scaled_dot_product_attention, q, k, k)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, k))
