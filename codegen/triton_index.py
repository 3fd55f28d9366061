"""Index expressions of Triton kernels: sympy expressions of sizes and positions, and what views do to them.

Every expression is a non-negative integer. A size is a positive symbol, a position an :class:`At`, which knows its own
bound, so that ``Div`` and ``Rem`` of it simplify where they can: the address of a contiguous tensor is one position,
however often it was viewed on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import sympy
from sympy import Expr, Integer

Index = tuple[Expr, ...]
"""A position in a tensor, one expression for each dim."""


class At(sympy.Function):  # type: ignore[misc]
    """``At(name, bound)``: the position called ``name``, at least 0 and less than ``bound``."""

    is_integer = True
    is_nonnegative = True


class Div(sympy.Function):  # type: ignore[misc]
    """``a // b``."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if b == 1 or a == 0:
            return a
        whole, rest = _split(a, b)
        if _below(rest, b):
            return whole
        return whole + cls(rest, b) if whole != 0 else None


class Rem(sympy.Function):  # type: ignore[misc]
    """``a % b``."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if b == 1:
            return Integer(0)
        whole, rest = _split(a, b)
        if _below(rest, b):
            return rest
        return cls(rest, b) if whole != 0 else None


def position(name: str, bound: Expr) -> Expr:
    """A variable of the kernel, from 0 to ``bound`` - 1."""
    return Integer(0) if bound == 1 else variable(name, bound)


def variable(name: str, bound: Expr) -> Expr:
    """A position that is one even where ``bound`` is 1."""
    return At(sympy.Symbol(name), bound)


def product(sizes: Iterable[Expr]) -> Expr:
    """The number of elements."""
    return sympy.Mul(*sizes)


def simplified(e: Expr) -> Expr:
    """``e`` with ``c*k*(a // k) + c*(a % k)`` written as ``c*a``, as often as that occurs."""
    e = sympy.expand(e)
    changed = True
    while changed:
        changed = False
        for rem in e.atoms(Rem):
            a, k = rem.args
            div = Div(a, k)
            coefficient = e.coeff(rem)
            if coefficient != 0 and div.has(Div) and sympy.expand(e.coeff(div) - coefficient * k) == 0:
                e = sympy.expand(e - coefficient * rem - coefficient * k * div + coefficient * a)
                changed = True
                break
    return e


def linear(index: Sequence[Expr], strides: Sequence[Expr]) -> Expr:
    """The offset of a position, in elements."""
    return simplified(sympy.Add(*(i * s for i, s in zip(index, strides, strict=True))))


def contiguous(sizes: Sequence[Expr]) -> tuple[Expr, ...]:
    """The strides of a contiguous tensor."""
    return tuple(product(sizes[d + 1 :]) for d in range(len(sizes)))


def unravel(flat: Expr, sizes: Sequence[Expr]) -> Index:
    """The position whose offset in a contiguous tensor of these sizes is ``flat``."""
    index: list[Expr] = []
    for d, size in reversed(list(enumerate(sizes))):
        outermost = all(s == 1 for s in sizes[:d])
        index.append(flat if outermost and size != 1 else Rem(flat, size))
        flat = Div(flat, size)
    return tuple(reversed(index))


def reshaped(index: Sequence[Expr], shape: Sequence[int], source: Sequence[int], sizes: Sizes) -> Index:
    """Where the element at ``index`` of a view of ``shape`` lies in its source.

    Dims are grouped into the shortest runs of equal numbers of elements, so that a dim that both have stays as it is.
    """
    result: list[Expr] = []
    i = j = 0
    while j < len(source):
        i_end, j_end = i, j + 1
        while math.prod(shape[i:i_end]) != math.prod(source[j:j_end]):
            if math.prod(shape[i:i_end]) < math.prod(source[j:j_end]):
                i_end += 1
            else:
                j_end += 1
        group = linear(index[i:i_end], contiguous([sizes.of(n) for n in shape[i:i_end]]))
        result += unravel(group, [sizes.of(n) for n in source[j:j_end]])
        i, j = i_end, j_end
    return tuple(result)


def text(e: Expr) -> str:
    """The expression as Triton, and as Python."""
    return _text(e, 0)


class Sizes:
    """Names for the sizes and strides of a region's inputs, so that a kernel's source does not contain them.

    Equal sizes have one name. A size that no input has is a product of those that they have, or else a constant.
    """

    def __init__(self) -> None:
        self.sources: dict[sympy.Symbol, str] = {}  # symbol → where the launcher finds it, as Python
        self.values: dict[sympy.Symbol, int] = {}
        self._by_value: dict[int, sympy.Symbol] = {}

    def learn(self, name: str, shape: Sequence[int]) -> None:
        """Name what ``shape``, that of input ``name``, has and no other input had."""
        for d, size in enumerate(shape):
            if size > 1 and size not in self._by_value:
                self._by_value[size] = self._symbol(f"n{len(self._by_value)}", f"{name}.shape[{d}]", size)

    def of(self, size: int) -> Expr:
        """The expression for a size."""
        if size in self._by_value:
            return self._by_value[size]
        if size > 1:
            for count in (2, 3):
                for factors in combinations(self._by_value, count):
                    if math.prod(factors) == size:
                        return sympy.Mul(*(self._by_value[f] for f in factors))
        return Integer(size)

    def strides(self, name: str, shape: Sequence[int], strides: Sequence[int], given: bool) -> tuple[Expr, ...]:
        """Expressions for the strides of a tensor: products of its sizes where it is dense, else arguments.

        ``given`` says that it is an input, whose strides the launcher can ask for.
        """
        order = sorted(range(len(shape)), key=lambda d: (strides[d], shape[d]), reverse=True)
        dense: dict[int, Expr] = {}
        expected, expression = 1, Integer(1)
        for d in reversed(order):
            if shape[d] == 1:
                dense[d] = Integer(0)
            elif strides[d] == expected:
                dense[d] = expression
                expected *= shape[d]
                expression = expression * self.of(shape[d])
        result: list[Expr] = []
        for d, stride in enumerate(strides):
            if d in dense:
                result.append(dense[d])
            elif stride <= 1:
                result.append(Integer(stride))
            elif given:
                result.append(self._symbol(f"{name}_s{d}", f"{name}.stride({d})", stride))
            else:
                result.append(self.of(stride))
        return tuple(result)

    def value(self, e: Expr) -> int:
        """What the expression is for this region."""
        return int(e.subs(self.values))

    def _symbol(self, name: str, source: str, value: int) -> sympy.Symbol:
        symbol = sympy.Symbol(name, integer=True, positive=True)
        self.sources[symbol], self.values[symbol] = source, value
        return symbol


def symbols_of(expressions: Iterable[Expr]) -> list[sympy.Symbol]:
    """The sizes and strides that the expressions need, by name, bounds of positions not counted."""
    found: set[sympy.Symbol] = set()
    todo: list[Any] = list(expressions)
    while todo:
        e = todo.pop()
        if isinstance(e, sympy.Symbol):
            found.add(e)
        elif not isinstance(e, At):
            todo += e.args
    return sorted(found, key=lambda s: s.name)


def positions_of(e: Expr) -> set[str]:
    """The names of the positions in an expression."""
    return {at.args[0].name for at in e.atoms(At)}


def _split(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """``(q, r)`` with a = q·b + r, where q takes the terms that ``b`` divides."""
    whole, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(a)):
        quotient = term / b
        if isinstance(term, Integer) and isinstance(b, Integer):
            whole.append(term // b)
            rest.append(term % b)
        elif sympy.fraction(sympy.together(quotient))[1] == 1:
            whole.append(quotient)
        else:
            rest.append(term)
    return sympy.Add(*whole), sympy.Add(*rest)


def _below(e: Expr, bound: Expr) -> bool:
    largest = _largest(e)
    return largest is not None and bool(sympy.expand(bound - 1 - largest).is_nonnegative)


def _largest(e: Expr) -> Expr | None:
    """An upper limit of the expression, if one is evident."""
    if isinstance(e, At):
        return e.args[1] - 1
    if isinstance(e, Rem):
        return e.args[1] - 1
    if isinstance(e, Div):
        largest = _largest(e.args[0])
        if largest is None:
            return None
        whole, rest = _split(largest + 1, e.args[1])
        return whole - 1 if rest == 0 else None
    if isinstance(e, Integer):
        return e
    if isinstance(e, sympy.Add | sympy.Mul):
        parts = [_largest(part) for part in e.args]
        return None if any(part is None for part in parts) else sympy.expand(e.func(*parts))
    if isinstance(e, sympy.Symbol):
        return e
    return None


def _text(e: Expr, level: int) -> str:
    """Spell ``e``; ``level`` 1 inside a product, 2 beside a division."""
    if isinstance(e, At):
        return str(e.args[0].name)
    if isinstance(e, Integer | sympy.Symbol):
        return str(e)
    if isinstance(e, Div | Rem):
        sign = "//" if isinstance(e, Div) else "%"
        result, own = f"{_text(e.args[0], 1)} {sign} {_text(e.args[1], 2)}", 1
        return f"({result})" if level >= own else result
    if isinstance(e, sympy.Add):
        result = " + ".join(_text(term, 0) for term in e.as_ordered_terms())
        return f"({result})" if level >= 1 else result
    if isinstance(e, sympy.Pow):
        base, exponent = e.args
        assert isinstance(exponent, Integer) and exponent > 0
        result = " * ".join([_text(base, 1)] * int(exponent))
        return f"({result})" if level >= 2 else result
    assert isinstance(e, sympy.Mul), f"no spelling for {e!r}"
    result = " * ".join(_text(factor, 1) for factor in e.as_ordered_factors())
    return f"({result})" if level >= 2 else result
