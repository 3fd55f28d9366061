"""Operators that kernels have by torch's decompositions, or by formulas of what those end with, mean what ATen does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphshard import fake
from graphshard.codegen import triton_expand
from graphshard.codegen.triton import supports
from interpreted import Interpreter
from traced import check, region_from

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LIMITS = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-4, -1e-4, 1.0, -1.0, 0.5, 20.5, -20.5, 88.9, -88.9)

WITHOUT = {
    *("digamma", "erfc", "erfinv", "gcd", "i0", "igamma", "igammac", "lcm", "lgamma", "mvlgamma", "nextafter"),
    *("polygamma", "frexp", "angle", "rrelu"),
}
"""Pointwise operators that torch makes of nothing simpler, or that draw; beside those of ``torch.special``."""


def numbers(dtype: torch.dtype) -> Tensor:
    """Of all sizes, and the limits."""
    even = torch.linspace(-6, 6, 181, dtype=torch.float64)
    return torch.cat([even, torch.tensor(LIMITS, dtype=torch.float64)]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(interpreter: Interpreter, dtype: torch.dtype) -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [
            *(f(x) for f in (F.hardswish, F.hardsigmoid, F.hardtanh, F.relu6, F.elu, F.selu, F.celu, F.mish)),
            *(F.softplus(x), F.softplus(x, 2.0, 1.5), F.elu(x, 0.5), F.celu(x, 0.3), F.hardtanh(x, -0.25, 2.5)),
            *(F.softshrink(x), F.hardshrink(x), F.threshold(x, 0.1, -3.0), F.logsigmoid(x), F.softsign(x)),
        ]

    check(interpreter, function, numbers(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_activations(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x = numbers(dtype)
    x = x[x.isfinite()]  # of NaN, ATen's own kernels give different gradients from device to device

    def function(grad: Tensor, x: Tensor) -> list[Tensor]:
        return [
            aten.hardswish_backward(grad, x),
            aten.hardtanh_backward(grad, x, -0.25, 2.5),
            aten.softplus_backward(grad, x, 2.0, 1.5),
            aten.elu_backward(grad, 0.7, 1.5, 0.5, False, x),
            aten.elu_backward(grad, 0.7, 1.5, 0.5, True, x),
            aten.mish_backward(grad, x),
            aten.leaky_relu_backward(grad, x, 0.1, False),
            aten.logit_backward(grad, x, 0.1),
        ]

    check(interpreter, function, x.roll(37), x)
    if dtype is not torch.float64:  # for which ATen multiplies by a sixth in float32
        check(interpreter, aten.hardsigmoid_backward, x.roll(37), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions(interpreter: Interpreter, dtype: torch.dtype) -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [
            *(f(x) for f in (torch.sinh, torch.cosh, torch.asinh, torch.acosh, torch.atanh, torch.tan, torch.log10)),
            *(f(x) for f in (torch.asin, torch.acos, torch.atan, torch.frac, torch.sinc, torch.deg2rad)),
            *(f(x) for f in (torch.isposinf, torch.isneginf, torch.isfinite, torch.signbit, torch.nan_to_num)),
            *(x.round(decimals=1), x.round(decimals=-1), x.nan_to_num(1.0, 2.0, -2.0), x.logit(0.1), x.logit()),
            torch.special.entr(x),
        ]

    check(interpreter, function, numbers(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_two(interpreter: Interpreter, dtype: torch.dtype) -> None:
    some = torch.cat([torch.tensor(LIMITS, dtype=torch.float64), torch.linspace(-3, 3, 6)]).to(dtype)
    x, y = (grid.reshape(-1) for grid in torch.meshgrid(some, some, indexing="ij"))

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            *(f(x, y) for f in (torch.atan2, torch.hypot, torch.copysign, torch.fmax, torch.fmin, torch.heaviside)),
            *(torch.logaddexp(x, y), torch.logaddexp2(x, y), torch.xlogy(x, y), torch.special.xlog1py(x, y)),
            *(torch.xlogy(x, 2.5), torch.xlogy(2.5, y), torch.copysign(x, -1.5), torch.ldexp(x, y.clamp(-4, 4))),
        ]

    check(interpreter, function, x, y)


def test_inverses_of_what_is_nearly_too_large(interpreter: Interpreter) -> None:
    x = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e10])
    check(interpreter, lambda x: [torch.asinh(x), torch.acosh(x), torch.hypot(x / 2, x / 2)], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_have_the_sign_that_aten_gives_them(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    y = torch.tensor([0.0, 0.0, -0.0, -0.0, -0.0, 0.0], dtype=dtype)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        odd = [torch.sinh(x), torch.asinh(x), torch.atanh(x), torch.tan(x), torch.asin(x), torch.atan(x)]
        rounded = [torch.relu(x), torch.round(x * 0.3), torch.round(x * 0.03, decimals=1)]
        both = [torch.copysign(x, y), torch.atan2(x, y), torch.atan2(y, x)]
        return [torch.signbit(f) for f in (*odd, *rounded, *both)]

    check(interpreter, function, x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_whole_numbers(interpreter: Interpreter, dtype: torch.dtype) -> None:
    x, y = (torch.arange(90) % 23 - 9).to(dtype), (torch.arange(90) % 13 + 1).to(dtype)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        exact = [torch.fmod(x, y), torch.fmod(x, 3), torch.fmax(x, y), torch.fmin(x, 2 * y), torch.signbit(x)]
        exact += [
            x << y,
            x >> y,
            x << (y - 3),
            x >> (y - 3),
            x << 2,
            x >> 1,
            5 << y,
            6 & y,
            7 | y,
            3 ^ y,
            7 % y,
            torch.heaviside(x, y),
        ]
        return [*exact, torch.atan2(x, y), torch.copysign(x, -y), torch.sinh(y), torch.atan(x), torch.xlogy(x, y)]

    check(interpreter, function, x, y)


def test_operands_of_several_types(interpreter: Interpreter) -> None:
    x, half = torch.randn(6, 40), torch.randn(40).bfloat16()
    double, whole = torch.randn(6, 1, dtype=torch.float64), torch.arange(40) - 9

    def function(x: Tensor, half: Tensor, double: Tensor, whole: Tensor) -> list[Tensor]:
        return [
            *(torch.hypot(x, double), torch.copysign(whole, x), torch.atan2(half, x), torch.logaddexp(x, double)),
            *(torch.xlogy(whole, half.abs()), F.softplus(half) * x, F.elu(double) + half, torch.fmax(x, double)),
        ]

    check(interpreter, function, x, half, double, whole)


def overloads() -> Iterator[Any]:
    """All pointwise operators of ATen that have a name for users, return something new and are no special functions."""
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, name = qualified.partition("::")
        name, _, overload = name.partition(".")
        if namespace != "aten" or name.startswith(("special_", "_")) or "out" in overload:
            continue
        target = getattr(getattr(aten, name), overload or "default")
        if torch.Tag.pointwise in target.tags and not target._schema.is_mutable:
            yield target


def called(target: Any) -> tuple[Callable[..., Any], int]:
    """A call of the operator with plain numbers for all but tensors, and how many of those it takes."""
    given = [a for a in target._schema.arguments if not a.has_default_value()]
    plain = {"number": 2, "int": 1, "float": 0.5, "bool": False}

    def call(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        values = {a.name: next(rest) if str(a.type) == "Tensor" else plain.get(str(a.type)) for a in given}
        by_name = {a.name: values.pop(a.name) for a in given if a.kwarg_only}
        return target(*values.values(), **by_name)

    return call, sum(str(a.type) == "Tensor" for a in given)


def test_nearly_all_pointwise_operators_can_be_in_a_kernel() -> None:
    kinds = ([torch.bool, torch.float32, torch.float32], [torch.float32] * 5, [torch.int64] * 5)
    missing = set()
    for target in overloads():
        call, count = called(target)
        reasons = []
        for dtypes in kinds:
            try:
                with fake.quiet():
                    region = region_from(call, *(torch.empty(4, 8, dtype=dtype) for dtype in dtypes[:count]))
            except Exception:
                continue  # not of these types, or not without an option
            reasons.append(supports(region))
            if not reasons[-1]:
                break
        if reasons and all(reasons):
            missing.add(str(target).split(".")[1])
    assert missing <= WITHOUT


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_by_decompositions_that_reduce(interpreter: Interpreter, dtype: torch.dtype) -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        losses = (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss)
        return [loss(x, y, reduction=how) for loss in losses for how in ("none", "mean", "sum")]

    x, y = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(interpreter, function, x, y, scale=5)


def test_what_no_decomposition_makes_simpler_is_refused_by_its_own_name() -> None:
    for function, name in ((torch.special.log_ndtr, "special_log_ndtr"), (lambda x: x.cumsum(1), "cumsum")):
        region = region_from(function, torch.empty(4, 8))
        assert supports(region) == f"aten.{name}.default is no operator that kernels have"


def test_a_decomposition_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("not of these")

    monkeypatch.setattr(triton_expand, "make_fx", failing)
    reason = supports(region_from(lambda x: F.mish(x), torch.empty(8)))
    assert reason == "aten.mish.default, which torch's decomposition does not take: not of these"
