"""Kernels that reduce mean what ATen means: norms, softmax, cross-entropy, sums; forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import graphshard.ops  # noqa: F401 - defines graphshard::sq_norm
from graphshard.codegen.triton import supports, write_kernel
from interpreted import Interpreter
from traced import check, region_from

aten = torch.ops.aten
gs = torch.ops.graphshard
quick = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Rows in one or two dims, and columns: few, many, or too many for one block."""
    rows = draw(st.lists(st.sampled_from((1, 2, 3, 7, 16)), min_size=1, max_size=2))
    cols = draw(st.sampled_from((2, 5, 16, 33, 96, 700)))
    return (*rows, cols)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, the rows of every second seed transposed in memory."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 2 and len(shape) > 1:
        turned = torch.randn(shape[-1], *shape[:-1], generator=generator, dtype=torch.float64) * scale
        return turned.permute(*range(1, len(shape)), 0).to(dtype)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@quick
@given(shapes(), st.sampled_from(DTYPES), st.integers(0, 9), st.booleans())
def test_layer_norm(
    interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, seed: int, half: bool
) -> None:
    x, grad = (drawn(seed + i, *shape, dtype=dtype) for i in range(2))
    weight, bias = (drawn(i, shape[-1], dtype=dtype) for i in (2, 4))
    size = list(shape[-1:])

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        out, mean, rstd = aten.native_layer_norm(x, size, weight, bias, 1e-5)
        return out, mean.float(), rstd.float()  # a kernel has them in float32 in any case, as a GPU's ATen

    def backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return aten.native_layer_norm_backward(grad, x, size, mean, rstd, weight, bias, [True, not half, True])

    check(interpreter, forward, x, weight, bias)
    _, mean, rstd = aten.native_layer_norm(x.double(), size, weight.double(), bias.double(), 1e-5)
    # Columns of few rows and of many have sums of other sizes: the tolerance grows with them.
    check(interpreter, backward, grad, x, mean.to(dtype), rstd.to(dtype), weight, bias, scale=10)


def test_statistics_of_a_layer_norm_are_not_rounded(interpreter: Interpreter) -> None:
    """The backward divides by them: of bf16 they would be off by a part in 256."""
    x = torch.randn(4, 32).bfloat16()
    region = region_from(lambda x: aten.native_layer_norm(x, [32], None, None, 1e-5), x)
    (_, mean, rstd), _ = interpreter(write_kernel(region, "region"), (x,))
    wide = x.float()
    torch.testing.assert_close(mean, wide.mean(1, keepdim=True))
    torch.testing.assert_close(rstd, (wide.var(1, correction=0, keepdim=True) + 1e-5).rsqrt())


def test_a_layer_norm_without_rows(interpreter: Interpreter) -> None:
    """The gradient of its bias is what it is given, copied."""
    grad, x, statistic = torch.randn(4, 2)[:, 0], torch.randn(4), torch.randn(1)

    def backward(grad: Tensor, x: Tensor, statistic: Tensor) -> Any:
        return aten.native_layer_norm_backward(grad, x, [4], statistic, statistic, x, x, [True] * 3)

    kernel = check(interpreter, backward, grad, x, statistic)
    assert "grad_1," not in kernel.source.rpartition("return ")[2]


@quick
@given(shapes(), st.sampled_from(DTYPES), st.integers(0, 9))
def test_rms_norm(interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x, grad, weight = drawn(seed, *shape, dtype=dtype), drawn(seed + 1, *shape, dtype=dtype), drawn(2, shape[-1])

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def backward(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        g = grad * weight
        by_rstd = (g * wide).sum(-1, keepdim=True)
        dx = g * rstd + (by_rstd * -0.5 * rstd.pow(3)).expand(x.shape) / x.shape[-1] * 2 * wide
        return [dx.to(x.dtype), (grad * wide * rstd).sum(list(range(x.dim() - 1)))]

    check(interpreter, forward, x, weight)
    check(interpreter, backward, grad, x, weight, scale=10)


@quick
@given(shapes(), st.sampled_from(DTYPES), st.integers(0, 9), st.booleans())
def test_softmax(interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, seed: int, masked: bool) -> None:
    x, grad = drawn(seed, *shape, dtype=dtype, scale=4), drawn(seed + 1, *shape, dtype=dtype)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask[..., 0] = False  # a row of which nothing is left is NaN

    def function(x: Tensor, mask: Tensor) -> list[Tensor]:
        x = x.masked_fill(mask, float("-inf")) if masked else x * 0.5
        return [torch.softmax(x, -1), torch.log_softmax(x, -1)]

    check(interpreter, function, x, mask)
    soft, logs = torch.softmax(x, -1), torch.log_softmax(x, -1)
    check(interpreter, lambda g, o: aten._softmax_backward_data(g, o, -1, dtype), grad, soft)
    check(interpreter, lambda g, o: aten._log_softmax_backward_data(g, o, -1, dtype), grad, logs, scale=3)


def test_rows_of_infinities_and_nan(interpreter: Interpreter) -> None:
    x = torch.randn(6, 40)
    x[0], x[1, 3], x[2, 5], x[3, :20] = -torch.inf, torch.nan, torch.inf, -torch.inf
    for cols in (40, 20000):  # in one block, and in steps of a loop
        wide = torch.cat([x, torch.full((6, cols - 40), -torch.inf)], 1)
        wide[5, -1] = 2.0
        check(interpreter, lambda x: [torch.softmax(x, -1), torch.log_softmax(x, -1), x.amax(-1), x.amin(-1)], wide)


@quick
@given(
    st.sampled_from((1, 5, 37)),
    st.sampled_from((3, 50, 1000)),
    st.sampled_from(DTYPES),
    st.sampled_from((1, 2)),
    st.booleans(),
    st.integers(0, 9),
)
def test_cross_entropy(
    interpreter: Interpreter, rows: int, classes: int, dtype: torch.dtype, reduction: int, weighted: bool, seed: int
) -> None:
    _check_cross_entropy(interpreter, rows, classes, dtype, reduction, weighted, seed)


def test_cross_entropy_of_a_large_vocabulary(interpreter: Interpreter) -> None:
    sources = _check_cross_entropy(interpreter, 3, 128256, torch.bfloat16, 1, False, 0)
    # Logits are read once, in steps, and once more at the targets; nothing of their size is written.
    assert sources[0].count("for start in") == 1 and "float32, device" in sources[0]
    assert "torch.empty((n0, n1)" not in sources[0]
    assert sources[1].count("for start in") == 1 and "//" not in sources[1]  # rows: no element asks in which it is


def _check_cross_entropy(
    interpreter: Interpreter, rows: int, classes: int, dtype: torch.dtype, reduction: int, weighted: bool, seed: int
) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    logits = drawn(seed, rows, classes, dtype=dtype, scale=3)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1::3] = -100
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(classes, generator=generator).to(wide) + 0.5 if weighted else None

    def forward(logits: Tensor, target: Tensor, *weights: Tensor) -> Any:
        logs = torch.log_softmax(logits.to(wide), -1)
        return aten.nll_loss_forward(logs, target, weights[0] if weights else None, reduction, -100)

    def backward(grad: Tensor, logs: Tensor, target: Tensor, total: Tensor, *weights: Tensor) -> Any:
        given = weights[0] if weights else None
        by_logs = aten.nll_loss_backward(grad, logs, target, given, reduction, -100, total)
        return aten._log_softmax_backward_data(by_logs, logs, 1, wide).to(dtype)

    weights = [] if weight is None else [weight]
    first = check(interpreter, forward, logits, target, *weights, scale=3)
    logs = torch.log_softmax(logits.to(wide), -1)
    total = aten.nll_loss_forward(logs, target, weight, reduction, -100)[1]
    second = check(interpreter, backward, torch.tensor(1.5, dtype=wide), logs, target, total, *weights)
    return [first.source, second.source]


@quick
@given(shapes(), st.sampled_from(DTYPES), st.integers(0, 9))
def test_sums_and_extremes(interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = drawn(seed, *shape, dtype=dtype)

    def rows(x: Tensor) -> list[Tensor]:
        return [
            x.sum(-1),
            x.mean(-1, keepdim=True),
            x.amax(-1),
            x.amin(-1),
            x - x.amax(-1, keepdim=True),
            (x > 0).sum(-1),
        ]

    def columns(x: Tensor) -> list[Tensor]:
        first = list(range(x.dim() - 1))
        return [(x * 2).sum(first), x.sum(first, keepdim=True), x * 3]

    def everything(x: Tensor) -> list[Tensor]:
        return [x.sum(), x.mean(), x / (x.pow(2).mean() + 1)]

    for function in (rows, columns, everything):
        check(interpreter, function, x, scale=20)
    check(interpreter, lambda x: [x.var(-1), *torch.var_mean(x, -1, correction=0, keepdim=True)], x, scale=5)


@quick
@given(st.lists(st.sampled_from((1, 3, 64, 1025, 3000)), min_size=1, max_size=10), st.sampled_from(DTYPES))
def test_norm_of_gradients_and_packing(interpreter: Interpreter, sizes: list[int], dtype: torch.dtype) -> None:
    parts = [drawn(2 * i, size, dtype=dtype) for i, size in enumerate(sizes)]
    offsets = [sum(sizes[:i]) + 8 * i for i in range(len(sizes))]
    check(interpreter, lambda *parts: gs.sq_norm([part * 0.5 for part in parts]), *parts, scale=10)
    length = sum(sizes) + 8 * len(sizes)
    check(interpreter, lambda *parts: gs.pack([p.to(torch.bfloat16) for p in parts], offsets, length), *parts)


def test_packing_reads_parts_in_the_order_of_their_elements(interpreter: Interpreter) -> None:
    x, y = torch.randn(6, 40).T, torch.randn(30, 1).expand(30, 8)
    check(interpreter, lambda x, y: gs.pack([x * 2, y + 1], [0, 240], 480), x, y)


def test_clipping_by_the_norm_is_one_region(interpreter: Interpreter) -> None:
    def clip(a: Tensor, b: Tensor) -> list[Tensor]:
        factor = (1.0 / (gs.sq_norm([a, b]).sqrt() + 1e-6)).clamp(max=1.0)
        return [a * factor, b * factor]

    check(interpreter, clip, torch.randn(50, 60), torch.randn(1234), in_place={0: 0, 1: 1})


def test_rows_in_a_loop_need_one_pass_for_each_level(interpreter: Interpreter) -> None:
    x, weight = torch.randn(2, 30000), torch.randn(30000)
    kernel = check(interpreter, lambda x, w: F.layer_norm(x, [30000], w), x, weight)
    assert kernel.source.count("for start in") == 3 and "steps" in kernel.how
    kernel = check(interpreter, lambda x, w: torch.softmax(x * w, -1), x, weight)
    assert kernel.source.count("for start in") == 2  # maximum and sum together, then the results


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sum(0), "a sum over rows of 100000 columns"),
        (lambda x: x.softmax(-1) + x.view(500, 10000).softmax(-1).view(50, 100000), "reductions of different shapes"),
        (lambda x: x[:, :1].softmax(-1) * x, "reductions of another shape: (50, 1)"),
    ],
)
def test_refusals(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert reason in supports(region_from(function, torch.empty(50, 100000)))


def test_a_choice_names_blocks_and_warps() -> None:
    region = region_from(lambda x: torch.softmax(x, -1), torch.empty(64, 4096))
    assert write_kernel(region, "rows").how == "rows_kernel: a row of 4096 in one block, 64 rows, 1 a program, 8 warps"
    tuned = write_kernel(region, "rows", autotune=True)
    assert "@triton.autotune(" in tuned.source and "autotuned" in tuned.how
