"""What each pointwise ATen operator is in Triton.

A formula is text with ``{0}``, ``{1}``, … for the operator's arguments, already of the type it computes in; where it
depends on that type or on an option, a function of the node and the type returns the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

Formula = str | Callable[[fx.Node, torch.dtype], str]


class Unsupported(Exception):
    """The region cannot become a kernel: why, naming the operator."""


@dataclass(frozen=True)
class Pointwise:
    """``formula`` of the operands in one type: the result's, or, where ``by_operands``, what they promote to."""

    formula: Formula
    by_operands: bool = False


TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
"""Triton's name of each dtype that kernels take."""


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """What values of ``dtype`` are computed and accumulated in: float32 for the half types, else their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def constant(value: Any, dtype: torch.dtype) -> str:
    """A number as Triton, of exactly that type: a bare literal would be rounded to float32 on its way to float64."""
    if dtype is torch.bool:
        return f"tl.full((), {bool(value)}, tl.int1)"
    if dtype.is_floating_point:
        value = float(value)
        spelled = repr(value) if math.isfinite(value) else f'float("{value}")'
        return f"tl.full((), {spelled}, {TYPES[dtype]})"
    return f"tl.full((), {_wrapped(int(value), dtype)}, {TYPES[dtype]})"


def literal(value: Any, dtype: torch.dtype) -> str:
    """A number as Triton beside an operand of that type, whose type it takes."""
    if dtype is torch.bool or (dtype.is_floating_point and not math.isfinite(value)):
        return constant(value, dtype)
    return repr(float(value) if dtype.is_floating_point else _wrapped(int(value), dtype))


def _wrapped(value: int, dtype: torch.dtype) -> int:
    """The number of that type that has the same last bits: as ATen takes -1 beside uint8."""
    limits = torch.iinfo(dtype)
    return (value - limits.min) % (1 << limits.bits) + limits.min


def divided(a: str, b: str, dtype: torch.dtype) -> str:
    """The quotient, rounded as IEEE says: ``/`` of float32 is a fast approximation."""
    return f"tl.div_rn({a}, {b})" if dtype is torch.float32 else f"({a} / {b})"


def root(x: str, dtype: torch.dtype) -> str:
    """The square root, rounded as IEEE says."""
    return f"tl.sqrt_rn({x})" if dtype is torch.float32 else f"tl.sqrt({x})"


def _div(node: fx.Node, dtype: torch.dtype) -> str:
    return divided("{0}", "{1}", dtype)


def _div_mode(node: fx.Node, dtype: torch.dtype) -> str:
    mode = node.kwargs["rounding_mode"]
    quotient = divided("{0}", "{1}", dtype)
    if mode is None:
        return quotient
    if mode == "floor":
        return _floor_divide(node, dtype)
    return f"toward_zero({quotient})" if dtype.is_floating_point else "({0} // {1})"


def _floor_divide(node: fx.Node, dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        raise Unsupported(f"{node.target} of fractions, for which a GPU has no exact remainder")
    return "floor_quotient({0}, {1})"


def _remainder(node: fx.Node, dtype: torch.dtype) -> str:
    return f"({{0}} - {{1}} * {_floor_divide(node, dtype)})"


def _add(node: fx.Node, dtype: torch.dtype) -> str:
    return _with_alpha(node, "+", dtype)


def _sub(node: fx.Node, dtype: torch.dtype) -> str:
    return _with_alpha(node, "-", dtype)


def _rsub(node: fx.Node, dtype: torch.dtype) -> str:
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    return "({1} - {0})" if alpha == 1 else f"({{1}} - {{0}} * {literal(alpha, dtype)})"


def _with_alpha(node: fx.Node, sign: str, dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "({0} | {1})"
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    return f"({{0}} {sign} {{1}})" if alpha == 1 else f"({{0}} {sign} {{1}} * {literal(alpha, dtype)})"


def _mul(node: fx.Node, dtype: torch.dtype) -> str:
    return "({0} & {1})" if dtype is torch.bool else "({0} * {1})"


def _value_times(node: fx.Node, dtype: torch.dtype) -> str:
    value = node.kwargs.get("value", 1)
    product = "{1} * {2}" if value == 1 else f"{literal(value, dtype)} * {{1}} * {{2}}"
    return f"({{0}} + {product})"


def _value_over(node: fx.Node, dtype: torch.dtype) -> str:
    value = node.kwargs.get("value", 1)
    top = "{1}" if value == 1 else f"({literal(value, dtype)} * {{1}})"
    return f"({{0}} + {divided(top, '{2}', dtype)})"


def _lerp(node: fx.Node, dtype: torch.dtype) -> str:
    # As ATen: from the nearer end, so that a weight of 1 gives the end itself.
    weight = node.args[2]
    near, far = "({0} + {2} * ({1} - {0}))", "({1} - ({1} - {0}) * (1 - {2}))"
    if isinstance(weight, int | float):
        return near if abs(weight) < 0.5 else far
    return f"tl.where(tl.abs({{2}}) < 0.5, {near}, {far})"


def _pow(node: fx.Node, dtype: torch.dtype) -> str:
    exponent = node.args[1]
    assert isinstance(exponent, int | float)
    whole = {1: "{0}", 2: "({0} * {0})", 3: "({0} * {0} * {0})", 4: "({0} * {0} * {0} * {0})"}
    if exponent in whole:
        return whole[int(exponent)]
    if not dtype.is_floating_point:
        raise Unsupported(f"{node.target} of integers to the power {exponent}")
    if exponent == 0.5:
        return root("{0}", dtype)
    if exponent == -0.5:
        return divided("1.0", root("{0}", dtype), dtype) if dtype is torch.float64 else "tl.rsqrt({0})"
    if exponent == -1:
        return divided("1.0", "{0}", dtype)
    return "power({0}, {1})"


def _power(node: fx.Node, dtype: torch.dtype) -> str:
    if not dtype.is_floating_point:
        raise Unsupported(f"{node.target} of integers")
    return "power({0}, {1})"


def _abs(node: fx.Node, dtype: torch.dtype) -> str:
    return "{0}" if dtype is torch.bool else "tl.abs({0})"


def _neg_one_to_one(node: fx.Node, dtype: torch.dtype) -> str:
    one = constant(1, dtype)
    return f"tl.where({{0}} > 0, {one}, tl.where({{0}} < 0, -{one}, 0))"


def _signbit(node: fx.Node, dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "is_negative({0})"
    return "({0} < 0)" if dtype.is_signed else "({0} != {0})"


def _not(node: fx.Node, dtype: torch.dtype) -> str:
    return "({0} == 0)" if dtype is torch.bool else "(~{0})"


def _clamp(node: fx.Node, dtype: torch.dtype) -> str:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    result = "{0}"
    if low is not None:
        result = f"largest({result}, {'{1}' if isinstance(low, fx.Node) else literal(low, dtype)})"
    if high is not None:
        result = f"smallest({result}, {'{2}' if isinstance(high, fx.Node) else literal(high, dtype)})"
    return result


def _gelu(node: fx.Node, dtype: torch.dtype) -> str:
    if node.kwargs.get("approximate", "none") == "tanh":
        return f"(0.5 * {{0}} * (1 + {_GELU_TANH.format('{0}')}))"
    return f"(0.5 * {{0}} * (1 + tl.erf({{0}} * {literal(math.sqrt(0.5), dtype)})))"


def _gelu_backward(node: fx.Node, dtype: torch.dtype) -> str:
    if node.kwargs.get("approximate", "none") == "tanh":
        # d/dx of x·(1 + tanh u)/2 with u = k·(x + c·x³): ((1 + t) + x·(1 - t²)·k·(1 + 3c·x²))/2.
        t = _GELU_TANH.format("{1}")
        slope = f"{literal(math.sqrt(2 / math.pi), dtype)} * (1 + 0.134145 * {{1}} * {{1}})"
        return f"({{0}} * 0.5 * ((1 + {t}) + {{1}} * (1 - {t} * {t}) * {slope}))"
    cdf = f"0.5 * (1 + tl.erf({{1}} * {literal(math.sqrt(0.5), dtype)}))"
    pdf = f"{literal(1 / math.sqrt(2 * math.pi), dtype)} * tl.exp(-0.5 * {{1}} * {{1}})"
    return f"({{0}} * ({cdf} + {{1}} * {pdf}))"


_GELU_TANH = "tanh(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0}))"
_LEG = "tl.sqrt((1 - {0}) * (1 + {0}))"
"""The other leg of a right triangle whose longest side is 1."""
_SIGMOID = "(1 / (1 + tl.exp(-{0})))"


def _rounded(formula: str) -> Formula:
    """``formula`` of a fraction; a whole number is itself."""
    return lambda node, dtype: formula if dtype.is_floating_point else "{0}"


def _round_decimals(node: fx.Node, dtype: torch.dtype) -> str:
    if not dtype.is_floating_point:
        raise Unsupported(f"{node.target} of whole numbers")
    decimals: Any = node.kwargs["decimals"]
    power = literal(10.0 ** abs(decimals), dtype)
    if decimals < 0:
        return f"(nearest({divided('{0}', power, dtype)}) * {power})"
    return divided(f"nearest({{0}} * {power})", power, dtype)


def _fmod(node: fx.Node, dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        raise Unsupported(f"{node.target} of fractions, for which a GPU has no exact remainder")
    return "({0} % {1})"


def _shifted(sign: str) -> Formula:
    """By as many bits as the type has, or by less than none, as by all: nothing is left but the sign."""

    def formula(node: fx.Node, dtype: torch.dtype) -> str:
        if dtype.is_floating_point:
            raise Unsupported(f"{node.target} of fractions")
        bits = torch.iinfo(dtype).bits
        outside = f"({{1}} < 0) | ({{1}} >= {bits})" if dtype.is_signed else f"({{1}} >= {bits})"
        nothing = f"{{0}} >> {bits - 1}" if dtype.is_signed and sign == ">>" else "0"
        return f"tl.where({outside}, {nothing}, {{0}} {sign} {{1}})"

    return formula


def _leaky(node: fx.Node, dtype: torch.dtype) -> str:
    slope: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    return f"tl.where({{0}} > 0, {{0}}, {{0}} * {literal(slope, dtype)})"


def _compared(sign: str) -> Pointwise:
    return Pointwise(f"({{0}} {sign} {{1}})", by_operands=True)


def _logical(sign: str) -> Pointwise:
    return Pointwise(f"(({{0}} != 0) {sign} ({{1}} != 0))", by_operands=True)


_FORMULAS: dict[Any, Formula] = {
    aten.add: _add,
    aten.sub: _sub,
    aten.rsub: _rsub,
    aten.mul: _mul,
    aten.div: _div,
    aten.floor_divide: _floor_divide,
    aten.remainder: _remainder,
    aten.neg: "(-{0})",
    aten.abs: _abs,
    aten.sign: _neg_one_to_one,
    aten.sgn: _neg_one_to_one,
    aten.exp: "tl.exp({0})",
    aten.exp2: "tl.exp2({0})",
    aten.expm1: "expm1({0})",
    aten.log: "tl.log({0})",
    aten.log2: "tl.log2({0})",
    aten.log10: f"(tl.log({{0}}) * {1 / math.log(10)})",
    aten.log1p: "log1p({0})",
    aten.sqrt: lambda node, dtype: root("{0}", dtype),
    aten.rsqrt: lambda node, dtype: divided("1.0", root("{0}", dtype), dtype),
    aten.reciprocal: lambda node, dtype: divided("1.0", "{0}", dtype),
    aten.sin: "tl.sin({0})",
    aten.cos: "tl.cos({0})",
    aten.tan: lambda node, dtype: divided("tl.sin({0})", "tl.cos({0})", dtype),
    aten.asin: "arctangent({0}, " + _LEG + ")",
    aten.acos: "arctangent(" + _LEG + ", {0})",
    aten.atan: lambda node, dtype: f"arctangent({{0}}, {constant(1, dtype)})",
    aten.atan2: "arctangent({0}, {1})",
    aten.sinh: "sinh({0})",
    aten.cosh: "cosh({0})",
    aten.asinh: "asinh({0})",
    aten.acosh: "acosh({0})",
    aten.atanh: "atanh({0})",
    aten.erf: "tl.erf({0})",
    aten.tanh: "tanh({0})",
    aten.sigmoid: _SIGMOID,
    aten.silu: "({0} * " + _SIGMOID + ")",
    aten.relu: "tl.where({0} < 0, 0, {0})",
    aten.leaky_relu: _leaky,
    aten.gelu: _gelu,
    aten.floor: _rounded("tl.floor({0})"),
    aten.ceil: _rounded("tl.ceil({0})"),
    aten.trunc: _rounded("toward_zero({0})"),
    aten.copysign: "with_sign(tl.abs({0}), {1})",
    aten.hypot: "hypotenuse({0}, {1})",
    aten.fmod: _fmod,
    aten.fmax: "tl.where(({0} > {1}) | ({1} != {1}), {0}, {1})",
    aten.fmin: "tl.where(({0} < {1}) | ({1} != {1}), {0}, {1})",
    aten.maximum: "largest({0}, {1})",
    aten.minimum: "smallest({0}, {1})",
    aten.clamp: _clamp,
    aten.clamp_min: "largest({0}, {1})",
    aten.clamp_max: "smallest({0}, {1})",
    aten.lerp: _lerp,
    aten.addcmul: _value_times,
    aten.addcdiv: _value_over,
    aten.bitwise_and: "({0} & {1})",
    aten.bitwise_or: "({0} | {1})",
    aten.bitwise_xor: "({0} ^ {1})",
    aten.bitwise_not: _not,
    aten.bitwise_left_shift: _shifted("<<"),
    aten.bitwise_right_shift: _shifted(">>"),
    aten.__lshift__: _shifted("<<"),
    aten.__rshift__: _shifted(">>"),
    aten.gelu_backward: _gelu_backward,
    aten.silu_backward: "({0} * " + _SIGMOID.format("{1}") + " * (1 + {1} * (1 - " + _SIGMOID.format("{1}") + ")))",
    aten.tanh_backward: "({0} * (1 - {1} * {1}))",
    aten.sigmoid_backward: "({0} * (1 - {1}) * {1})",
    aten.threshold_backward: "tl.where({1} <= {2}, 0, {0})",
    aten.native_dropout_backward: "({0} * {1} * {2})",
    aten.detach: "{0}",
    aten.clone: "{0}",
    aten._to_copy: "{0}",
    aten.lift_fresh_copy: "{0}",
    aten.alias: "{0}",
}

_OVERLOADS: dict[Any, Pointwise] = {
    aten.div.Tensor_mode: Pointwise(_div_mode),
    aten.div.Scalar_mode: Pointwise(_div_mode),
    aten.pow.Tensor_Scalar: Pointwise(_pow),
    aten.pow.Tensor_Tensor: Pointwise(_power),
    aten.pow.Scalar: Pointwise(_power),
    aten.round.default: Pointwise(_rounded("nearest({0})")),
    aten.round.decimals: Pointwise(_round_decimals),
    aten.signbit.default: Pointwise(_signbit, by_operands=True),
    aten.logical_not.default: Pointwise("({0} == 0)", by_operands=True),
    aten.logical_and.default: _logical("&"),
    aten.logical_or.default: _logical("|"),
    aten.logical_xor.default: _logical("^"),
    aten.isnan.default: Pointwise("({0} != {0})", by_operands=True),
    aten.isinf.default: Pointwise('(tl.abs({0}) == float("inf"))', by_operands=True),
    prims.convert_element_type.default: Pointwise("{0}"),
} | {
    overload: _compared(sign)
    for packet, sign in (
        (aten.eq, "=="),
        (aten.ne, "!="),
        (aten.lt, "<"),
        (aten.le, "<="),
        (aten.gt, ">"),
        (aten.ge, ">="),
    )
    for overload in (packet.Tensor, packet.Scalar)
}

VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
)
"""Operators that show another's value, which a kernel reads at other places."""

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
"""The same, of several results."""

FILLS = (
    aten.full.default,
    aten.full_like.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.scalar_tensor.default,
    prims.scalar_tensor.default,
)
"""Operators that make the same number everywhere."""

SELECTS = (
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
)
"""Operators that choose by a mask, whose type is not that of the rest."""

CASTS = (aten._to_copy.default, prims.convert_element_type.default)
"""Operators that round to the type of their result, where others keep float32 until they are stored."""


_PLAIN = ("default", "Tensor", "Scalar", "Tensor_Scalar", "Scalar_Tensor")
"""Overloads that differ in which operands are numbers alone."""
_OTHERS = frozenset((*VIEWS, *SPLITS, *FILLS, *SELECTS, aten.arange.default))


def pointwise(target: Any) -> Pointwise | None:
    """The formula of an operator, or None if it has none."""
    if target in _OVERLOADS:
        return _OVERLOADS[target]
    packet = getattr(target, "overloadpacket", None)
    name = str(target).rpartition(".")[2]
    known = packet in _FORMULAS and name in _PLAIN
    return Pointwise(_FORMULAS[packet]) if known else None


def has_form(target: Any) -> bool:
    """Whether kernels have the operator as it is."""
    return target in _OTHERS or pointwise(target) is not None
