"""Pointwise kernels mean what ATen means, over random expressions, shapes, strides and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import graphshard.ops  # noqa: F401 - defines graphshard::bernoulli
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.triton import supports, write_kernel
from graphshard.region import Region
from interpreted import Interpreter
from traced import TOLERANCE, check, region_from

aten = torch.ops.aten
gs = torch.ops.graphshard
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.neg,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: torch.sqrt(x.abs() + 0.5),
    lambda x: torch.rsqrt(x * x + 1),
    lambda x: torch.exp(-x.abs()),
    lambda x: torch.log(x * x + 1),
    lambda x: x.clamp(-0.5, 0.75),
    lambda x: x.pow(3),
    lambda x: x * 0.1 + 3,
    lambda x: 1 / (2 + x * x),
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: x.masked_fill(x > 0.5, -1.5),
    lambda x: x.float() * 2,
    lambda x: torch.floor(x * 0.25 + 0.1),
    F.hardswish,
    F.mish,
    F.elu,
    lambda x: F.softplus(x, 2.0, 1.5),
    torch.atan,
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.where(a > b, a, b * 2),
    lambda a, b: torch.where((a > 0) & ~(b > 0.5), a, 0.25),
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.add(a, b, alpha=0.5),
    torch.hypot,
    torch.logaddexp,
]
VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.transpose(-1, -2),
    lambda x: x.reshape(-1),
    lambda x: x.reshape(x.shape[0], -1),
    lambda x: x.unsqueeze(1),
    lambda x: x[..., 1:],
    lambda x: x[..., ::2],
    lambda x: x[0],
    lambda x: x.transpose(0, 1).reshape(-1, x.shape[-1]),
    lambda x: x.unsqueeze(0).expand(3, *x.shape),
]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Of that shape or one that broadcasts to it, in some order of strides, perhaps with gaps."""
    shape = tuple(1 if draw(st.integers(0, 5)) == 0 else size for size in shape[draw(st.integers(0, 1)) :])
    order = draw(st.permutations(range(len(shape))))
    gaps = [size + (draw(st.integers(0, 5)) == 0) for size in shape]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    stored = torch.randn([gaps[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
    return stored.permute([order.index(d) for d in range(len(shape))])[tuple(slice(size) for size in shape)]


@st.composite
def programs(draw: st.DrawFn) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of two or three tensors, of a few operators, with up to three results."""
    shape = tuple(draw(st.lists(st.sampled_from((2, 3, 5, 8, 16, 33)), min_size=2, max_size=4)))
    while math.prod(shape) > 5000:
        shape = shape[1:]
    arguments = [draw(tensors(shape)) for _ in range(draw(st.integers(2, 3)))]
    steps = draw(
        st.lists(st.tuples(st.sampled_from("ubbv"), st.integers(0, 99), st.integers(0, 9)), min_size=2, max_size=8)
    )
    results = draw(st.integers(1, 3))

    def function(*values: Tensor) -> list[Tensor]:
        known = list(values)
        for kind, which, operand in steps:
            x = known[-1]
            if kind == "u":
                known.append(UNARY[which % len(UNARY)](x))
            elif kind == "v" and x.dim() >= 2 and min(x.shape) > 1 and x.numel() < 5000:
                known.append(VIEWS[which % len(VIEWS)](x))
            else:
                other = known[operand % len(known)]
                try:
                    torch.broadcast_shapes(x.shape, other.shape)
                except RuntimeError:
                    other = x
                known.append(BINARY[which % len(BINARY)](x, other))
        return [value * 1 for value in known[-results:]]

    return function, arguments


def hinges_on_rounding(function: Callable[..., Any], region: Region, arguments: list[Tensor]) -> bool:
    """Whether ATen itself gives something else in float64, as where two numbers that should be equal are compared: a
    kernel rounds in other places, and both are right."""
    wide = function(*(a.double() if a.is_floating_point() else a for a in arguments))
    meaning = region(*arguments)
    for narrow, exact in zip(meaning if isinstance(meaning, tuple) else (meaning,), wide, strict=True):
        rtol, atol = max(TOLERANCE[a.dtype] for a in (narrow, *arguments) if a.dtype in TOLERANCE)
        if not torch.allclose(narrow.double(), exact.double(), rtol, atol, equal_nan=True):
            return True
    return False


@quick
@given(programs())
def test_expressions(interpreter: Interpreter, program: tuple[Callable[..., Any], list[Tensor]]) -> None:
    function, arguments = program
    region = region_from(function, *arguments)
    try:
        region(*arguments)
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)
        reject()  # a result has other strides than torch said it would: what was a view of it by those is none
    if hinges_on_rounding(function, region, arguments):
        reject()
    check(interpreter, region, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_formula(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-6, 6, 301), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-4])]).to(
        dtype
    )
    y = x.roll(11)
    positive = (x.abs() + 0.01).nan_to_num(1, 1)

    def unary(x: Tensor, positive: Tensor) -> list[Tensor]:
        return [
            *(f(x) for f in (torch.abs, torch.sign, torch.exp, torch.expm1, torch.erf, torch.tanh, torch.sigmoid)),
            *(f(x) for f in (torch.floor, torch.ceil, torch.trunc, torch.round, torch.relu, F.silu)),
            F.gelu(x.clamp(-100, 100)),  # of infinity torch makes NaN where it has AVX-512, of vectors alone
            *(f(positive) for f in (torch.log, torch.log2, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal)),
            *(x.pow(n) for n in (1, 2, 3, 4)),
            *(positive.pow(n) for n in (0.5, -0.5, -1, 1.7)),
            *(x.isnan(), x.isinf(), x.logical_not(), F.leaky_relu(x), x.clamp(min=-1), x.clamp(max=2), 3 - x),
        ]

    def binary(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            *(f(x, y) for f in (torch.maximum, torch.minimum, torch.eq, torch.ne, torch.lt, torch.le, torch.gt)),
            *(torch.ge(x, y), x.lerp(y, 0.3), x.lerp(y, 0.7), torch.addcmul(x, y, y, value=0.5)),
            *(torch.addcdiv(x, y, y * y + 1, value=2.0), torch.logical_and(x, y), torch.logical_xor(x > 1, y > 1)),
            aten.threshold_backward(x, y, 0.5),
            aten.silu_backward(x, y),
            aten.gelu_backward(x, y),
            aten.gelu_backward(x, y, approximate="tanh"),
            aten.tanh_backward(x, y),
            aten.sigmoid_backward(x, y),
            aten.native_dropout_backward(x, y > 0, 1.25),
        ]

    finite = y.nan_to_num(2, 3, -3)
    check(interpreter, unary, x, positive)
    check(interpreter, binary, x.nan_to_num(1, 2, -2), finite)
    check(interpreter, lambda x, y: [torch.maximum(x, y), torch.minimum(x, y), x.clamp(-1, 1), torch.relu(x)], x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_at_the_limits(interpreter: Interpreter, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1, -1, 0.5, -0.5, 2.5, -3, 7, math.inf, -math.inf, math.nan], dtype=dtype)
    a, b = (grid.reshape(-1) for grid in torch.meshgrid(values, values, indexing="ij"))
    check(interpreter, lambda a, b: [a.pow(b), 1 / a.pow(b), a.pow(1.5), a.pow(-3), torch.pow(2.0, b)], a, b)


def test_differences_from_one_where_an_exponential_has_few_bits(interpreter: Interpreter) -> None:
    check(interpreter, lambda x: torch.expm1(x) * 2, torch.linspace(-110, 10, 500))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int8, torch.uint8])
def test_whole_numbers_that_are_rounded_or_wrapped(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x, y = (torch.arange(60) % 7 - 3).to(dtype), (torch.arange(60) % 5 + 1).to(dtype)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        rounded = [f(x) + y for f in (torch.floor, torch.ceil, torch.trunc, torch.round)]
        return [
            *rounded,
            x // y,
            x // 3,
            x % -3,
            x.masked_fill(y > 2, -1),
            x.clamp(-2, 5),
            x.bfloat16(),
            (x > y).half(),
        ]

    check(interpreter, function, x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_and_truth(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x, y = (torch.arange(60) % 7 - 3).to(dtype), (torch.arange(60) % 5 + 1).to(dtype)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        same = [x & y, x | y, x ^ y, x == y, x < y, x.float() * 0.5, torch.where(x > 1, x, y), x + 2.5, x.bool(), x / y]
        if dtype is torch.bool:
            return [*same, ~x, x * y]
        return [*same, x + y, x * y - x, torch.div(x, y, rounding_mode="floor"), x % y, ~x, x.abs()]

    check(interpreter, function, x, y)


def test_scalars_of_float64_stay_exact(interpreter: Interpreter) -> None:
    x = torch.randn(50, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64)
    check(interpreter, lambda x, lr: [x * 0.1 + 1 / 3, x * (1 - lr * 0.3), torch.full_like(x, 0.7) - x], x, lr)


def test_one_source_serves_other_sizes() -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        return [torch.relu(x.reshape(-1, x.shape[-1]) * w), (x.transpose(0, 1) + 1).contiguous()]

    sources = [
        write_kernel(region_from(function, torch.empty(a, b, c), torch.empty(c)), "same").source
        for a, b, c in ((3, 4, 5), (7, 11, 2000))
    ]
    assert sources[0] == sources[1]


def test_addresses_of_contiguous_tensors_need_no_division() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x.view(6, 20) * 2).view(2, 3, 4, 5).reshape(-1, 5).view_as(y) + y

    source = write_kernel(region_from(function, torch.empty(6, 4, 5), torch.empty(24, 5)), "plain").source
    assert "//" not in source and "%" not in source.replace("1 %", "")


def test_single_elements_of_several_shapes(interpreter: Interpreter) -> None:
    check(interpreter, lambda a, b: [a * 2, b + 1, (a + b) * 3], torch.randn(1), torch.randn(()))
    check(interpreter, lambda a, b: [a * 2, b + a, a.view(1) - 1], torch.randn(1, 1), torch.randn(40))


@pytest.mark.parametrize("name", ["x", "row", "n0", "tl", "triton", "tanh", "rows", "programs", "tanh_1_out", "x_s0"])
def test_an_input_may_be_called_what_a_kernel_calls_something_else(interpreter: Interpreter, name: str) -> None:
    first, second = torch.randn(6, 10)[:, ::2], torch.randn(6, 5)
    region = region_from(lambda a, b: [a.tanh() * b, torch.softmax(a, -1) + b.sum(0)], first, second)
    region.inputs[0].name, region.inputs[1].name = name, f"{name}_in"
    check(interpreter, region, first, second)


def test_what_returns_something_else_is_another_kernel() -> None:
    kernels = Kernels(on_gpu=True)
    added: list[Callable[[Tensor], Any]] = [lambda x: [x * 2, x * 2 + 1], lambda x: x * 2 + 1, lambda x: x * 2 + 1]
    names = [kernels.add(region_from(function, torch.empty(8)), {}).name for function in added]
    assert names[0] != names[1] == names[2]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x @ x.T, "aten.mm.default"),
        (lambda x: torch.cumsum(x, 0), "aten.cumsum.default"),
        (lambda x: x % 0.7, "aten.remainder.Scalar of fractions"),
        (lambda x: torch.div(x, 0.1, rounding_mode="floor"), "of fractions"),
        (lambda x: torch.fft.fft(x), "complex64"),
        (lambda x: x.amax(0), "aten.amax.default over dims [0]"),
        (lambda x: gs.bernoulli(x, torch.zeros(4, dtype=torch.int64), 1), "graphshard.bernoulli.default draws"),
        (lambda x: torch.relu(x[:0]) * 2, "aten.mul.Tensor: a result without elements"),
    ],
)
def test_refusals_name_the_operator(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert reason in supports(region_from(function, torch.empty(4, 4)))


def test_in_place(interpreter: Interpreter) -> None:
    x, y = torch.randn(40, 60), torch.randn(60, 40)
    kernel = check(interpreter, lambda x, y: [x * 2 + 1, y - 1], x, y, in_place={0: 0, 1: 1})
    assert "empty" not in kernel.source and "copy_" not in kernel.source


def test_what_a_result_is_stored_over_has_been_read_by_the_others(interpreter: Interpreter) -> None:
    x, y, row = torch.randn(40, 60), torch.randn(40, 60), torch.randn(40, 1)
    kernel = check(interpreter, lambda x, y: [x * 2, x * 2 + y, y - 1], x, y, in_place={0: 1, 1: 0})
    assert "copy_" not in kernel.source
    check(
        interpreter,
        lambda x, row: [x.sum(1, keepdim=True), row * 2, x + x.amax(1, keepdim=True)],
        x,
        row,
        in_place={0: 1},
    )
    check(interpreter, lambda x, y: [torch.softmax(x, 1), y + 1, y * 2], x, y, in_place={0: 1})


def test_an_input_that_others_read_is_overwritten_last(interpreter: Interpreter) -> None:
    x = torch.randn(40, 40)
    kernel = check(interpreter, lambda x: [x + x.T, x.sum(0)], x, in_place={0: 0})
    assert "x_1.copy_(" in kernel.source
    step = torch.tensor(3.0)
    check(interpreter, lambda x, step: [step + 1, x * step], x, step, in_place={0: 1, 1: 0})
