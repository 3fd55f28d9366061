"""In-place operators on lists of tensors (``torch._foreach_mul_``) while a model is captured: autograd would leave them
out of the gradient of a view, so that each tensor is written to by itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_PREFIX = "_foreach_"
_SCALED = ("addcmul_", "addcdiv_")
_OTHER_NAMES = {"maximum_": "clamp_min_", "minimum_": "clamp_max_"}


def one_by_one(function: Any) -> Any:
    """What to call instead of ``function``: itself, unless it writes to a list of tensors."""
    name = getattr(function, "__name__", "")
    if not (name.startswith(_PREFIX) and name.endswith("_")):
        return function
    name = name.removeprefix(_PREFIX)
    method = getattr(Tensor, _OTHER_NAMES.get(name, name))

    @functools.wraps(function)
    def run(self: Sequence[Tensor], *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        for i, value in enumerate(self):
            own = [_own(argument, i) for argument in args]
            options = {key: _own(argument, i) for key, argument in kwargs.items()}
            if name in _SCALED and len(own) > 2:
                first, second, scale = own
                _add_scaled(value, first, second, scale[i] if isinstance(scale, Tensor) else scale, method)
            else:
                method(value, *own, **options)
        return self

    return run


def _add_scaled(value: Tensor, first: Tensor, second: Tensor, scale: Any, method: Any) -> None:
    """``addcmul_`` or ``addcdiv_``, which take no tensor as a scale."""
    if isinstance(scale, Tensor):
        value.add_(scale * (first * second if method is Tensor.addcmul_ else first / second))
    else:
        method(value, first, second, value=scale)


def _own(argument: Any, i: int) -> Any:
    """Of a list, what belongs to tensor ``i``."""
    return argument[i] if isinstance(argument, (list, tuple)) else argument
