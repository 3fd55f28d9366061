"""In-place operators that change a tensor's dims (``t_``, ``unsqueeze_``), where a view is involved.

Once memory is written to, autograd makes its views anew from what they are views of. In eager code a view is made with
the strides that it has; in capture by the operators that made it, without those that changed its dims in place: a
gradient would be that of other elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphshard.errors import UncapturableOperator
from graphshard.trace.errors import calling_line, describe

_TURNS = ("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_")


@dataclass(frozen=True)
class _Turn:
    """An in-place change of dims: the tensor of which it counts, how often that had been written to by then."""

    tensor: Tensor
    version: int
    operator: str
    line: str


class Turned:
    """Watches calls of torch functions for uses of what autograd would make anew in another way than eager code."""

    def __init__(self) -> None:
        # By id; tensors are kept, so that no id is given twice.
        self._views: dict[int, _Turn] = {}  # views that were turned, and views of those
        self._bases: dict[int, _Turn] = {}  # what was turned itself
        self._later: dict[int, Tensor] = {}  # views that were made of those since

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call is to be made.

        Raises:
            UncapturableOperator: it is given a turned view whose memory was written to since, or a view of before.
        """
        if not (self._views or self._bases):
            return
        for value in _tensors((args, kwargs)):
            turn = self._views.get(id(value))
            if turn is not None and value._version != turn.version and value.requires_grad:
                _refuse(turn, _WRITTEN)
            turn = self._bases.get(id(value._base)) if value._is_view() else None
            if turn is not None and value.requires_grad and id(value) not in self._later:
                _refuse(turn, "a use of a view made before it")

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """A call was made.

        Raises:
            UncapturableOperator: it has written to a turned view.
        """
        name = getattr(func, "__name__", "")
        if name in _TURNS and args and isinstance(args[0], Tensor):
            self._turn(_Turn(args[0], args[0]._version, name, describe(calling_line())))
            return
        if not (self._views or self._bases):
            return
        turns = [turn for value in _tensors((args, kwargs)) if (turn := self._views.get(id(value))) is not None]
        for turn in turns:
            if turn.tensor._version != turn.version and turn.tensor.requires_grad:
                _refuse(turn, _WRITTEN)
        for made in _tensors(result):
            if made._is_view() and id(made._base) in self._bases:
                self._later[id(made)] = made
            for turn in turns:
                if made._is_view() and made._base is turn.tensor._base:
                    self._views[id(made)] = replace(turn, tensor=made)

    def _turn(self, turn: _Turn) -> None:
        if turn.tensor._is_view():
            self._views[id(turn.tensor)] = turn
        else:
            self._bases[id(turn.tensor)] = turn
            self._later = {key: view for key, view in self._later.items() if view._base is not turn.tensor}


_WRITTEN = "a write to the same memory"


def _tensors(values: Any) -> Sequence[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _refuse(turn: _Turn, then: str) -> NoReturn:
    name = turn.operator.removesuffix("_")
    instead = f"use the view that {name} returns: x = x.{name}(...)"
    raise UncapturableOperator(f"{turn.operator} and then {then}", turn.line, instead)
