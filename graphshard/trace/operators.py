"""The ATen operators that a model's forward calls, where AOTAutograd alone would not make a graph of them.

It makes in-place operators functional where it knows the tensor written to: one of the model or the batch, or made of
such. It does not know the others a model has (a mask that is a plain attribute: a constant of the graph), nor what is
made of those alone, until that is wrapped as it wraps its own. A view of a constant is not: it may not be written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from graphshard.errors import UncapturableOperator
from graphshard.trace.errors import calling_line, describe

_FUNCTIONAL = torch._C._TorchDispatchModeKey.FUNCTIONAL


class Operators(TorchDispatchMode):
    """Leaves out checks, and has what is made of constants alone belong to the graph.

    Args:
        unchecked: lines of the model whose checks were left out are added to it.

    Raises:
        UncapturableOperator: one writes to a constant, which every step would have to begin with, or to elements that
            share memory, as those of expand and unfold do.
    """

    def __init__(self, unchecked: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._unchecked = unchecked

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_check(func):
            self._unchecked.add(describe(calling_line()))
            return None
        mode = torch._C._get_dispatch_mode(_FUNCTIONAL)
        known = FakeTensor if mode is None else FunctionalTensor
        targets = written(func, args, kwargs or {})
        if any(not isinstance(value, known) for value in targets):
            instead = "what it writes to has to be a buffer of the model, see register_buffer"
            raise UncapturableOperator(str(func), describe(calling_line()), instead)
        if torch.Tag.inplace_view not in func.tags and any(map(_overlaps, targets)):
            instead = "elements of what it writes to have one place in memory: clone() it first"
            raise UncapturableOperator(str(func), describe(calling_line()), instead)
        result = func(*args, **(kwargs or {}))
        if mode is None or any(argument.alias_info for argument in func._schema.arguments):
            return result
        return tree_map_only(FakeTensor, FunctionalTensor.to_functional, result)


class NoChecksOfGradients(TorchDispatchMode):
    """Leaves out the checks that autograd's formulas make, of linalg.eig's: no line of the model asks for them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if _is_check(func) else func(*args, **(kwargs or {}))


def _is_check(func: Any) -> bool:
    """Whether it gives nothing and writes nothing: a check of values (of F.one_hot, torch.linalg.inv),
    which nothing in a graph could depend on."""
    return func.namespace == "aten" and not func._schema.returns and not func._schema.is_mutable


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of an ATen operator writes to."""
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return [value for value in tree_leaves(found) if isinstance(value, Tensor)]


def _overlaps(value: Tensor) -> bool:
    """Whether two elements have one place in memory."""
    dims = sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    end = 0  # the last place of the dims so far
    for stride, size in dims:
        if stride <= end:
            break
        end += stride * (size - 1)
    else:
        return False
    places = {0}
    for stride, size in dims:
        places = {place + stride * i for place in places for i in range(size)}
    return len(places) < value.numel()
