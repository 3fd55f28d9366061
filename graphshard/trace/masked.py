"""Assignments through a mask while a model is captured: ``h[mask] = value`` selects by ``torch.where``.

Torch's operator reads the gradient of ``value`` by the mask: as many rows as are masked, which no graph can hold. A
value that is the same for every masked place needs none of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from graphshard.errors import ShapeNeedsValue
from graphshard.trace.errors import calling_line, describe

_SET: Any = Tensor.__setitem__
_PUT: Any = (Tensor.index_put, torch.index_put)
_PUT_IN_PLACE: Any = (Tensor.index_put_, torch.index_put_)
_ALL = slice(None)
_MASKS = (torch.bool, torch.uint8)

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A torch function, its positional and its keyword arguments."""

_Choice = tuple[Tensor, Tensor, Tensor]
"""Arguments of ``torch.where``: the mask, what is written, and what is written to."""


@dataclass(frozen=True)
class _Place:
    """What a mask chooses from: the dims of ``target`` from ``begin`` on are those of ``mask``."""

    target: Tensor
    mask: Tensor
    begin: int

    @property
    def behind(self) -> int:
        """How many dims of the target come after the mask's."""
        return self.target.dim() - self.begin - self.mask.dim()


def selected(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call to make instead of one of a torch function: the same, unless that writes through a mask.

    Raises:
        ShapeNeedsValue: what it writes has a gradient, and an element for each masked place.
    """
    if func == _SET:
        target, index, value = args
        index = index if isinstance(index, tuple) else (index,)
        if (choice := _choice(target, index, value)) is not None:
            return func, (target, _around(index), torch.where(*choice)), {}
    elif (func in _PUT or func in _PUT_IN_PLACE) and (choice := _choice_of_put(*args, **kwargs)) is not None:
        # A copy has the target's strides, which the result of torch.where need not have.
        written = choice[2].clone() if func in _PUT else choice[2]
        return Tensor.copy_, (written, torch.where(*choice)), {}
    return func, args, kwargs


def _choice_of_put(
    input: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> _Choice | None:
    return _choice(input, tuple(_ALL if index is None else index for index in indices), values, accumulate)


def _choice(target: Tensor, index: tuple[Any, ...], value: Any, accumulate: bool = False) -> _Choice | None:
    """What ``torch.where`` makes of the target's part where ``value`` goes; None: torch's own operator writes it."""
    if not any(isinstance(item, Tensor) and item.dtype in _MASKS for item in index) or not isinstance(value, Tensor):
        return None
    place = _place_of(target, index)
    if place is not None and value.dtype is target.dtype:
        mask = place.mask[(..., *(None,) * place.behind)]
        spread = _spread(value, place)
        if spread is not None:
            return mask, place.target + spread if accumulate else spread, place.target
    if value.requires_grad and torch.is_grad_enabled():
        raise ShapeNeedsValue("aten.index.Tensor (the gradient of what is assigned)", describe(calling_line()))
    return None


def _place_of(target: Any, index: tuple[Any, ...]) -> _Place | None:
    """Where ``target[index]`` is, if the only tensor in ``index`` is a mask."""
    at = next((i for i, item in enumerate(index) if isinstance(item, Tensor)), None)
    if at is None or not all(_is_plain(item) for i, item in enumerate(index) if i != at):
        return None
    mask, before, after = index[at], index[:at], index[at + 1 :]
    if mask.dtype is not torch.bool or not mask.dim():
        return None
    if any(item != _ALL for item in (*before, *after)):
        target = target[_around(index)]
    if any(item is ... for item in before):
        begin = target.dim() - mask.dim() - sum(not isinstance(item, int) for item in after)
    else:
        begin = sum(not isinstance(item, int) for item in before)
    fits = begin >= 0 and target.shape[begin : begin + mask.dim()] == mask.shape
    return _Place(target, mask, begin) if fits else None


def _around(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """``index`` with all of the dims that its mask is for."""
    return tuple(part for item in index for part in ((_ALL,) * item.dim() if isinstance(item, Tensor) else (item,)))


def _is_plain(item: Any) -> bool:
    """Whether an index makes a view."""
    return isinstance(item, (int, slice, EllipsisType, type(None))) and not isinstance(item, bool)


def _spread(value: Tensor, place: _Place) -> Tensor | None:
    """``value``, the same for every masked place, with the dims of the mask, each of size 1; None if it is not."""
    at = value.dim() - place.behind - 1  # of the dim that counts masked places
    if at >= 0:
        if value.shape[at] != 1:
            return None
        value = value.reshape(*value.shape[:at], *(1,) * place.mask.dim(), *value.shape[at + 1 :])
    return value if _broadcasts(value, place.target) else None


def _broadcasts(value: Tensor, target: Tensor) -> bool:
    """Whether ``value`` can be made as large as ``target``."""
    pairs = zip(reversed(value.shape), reversed(target.shape), strict=False)
    return value.dim() <= target.dim() and all(own in (1, size) for own, size in pairs)
