"""In-place operators on lists of tensors (``torch._foreach_mul_``) while a model is captured: autograd would leave them
out of the gradient of a view, so that each tensor is written to by itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_PREFIX = "_foreach_"
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
            if name in ("addcmul_", "addcdiv_") and len(own) > 2:
                options["value"] = own.pop()
            method(value, *own, **options)
        return self

    return run


def _own(argument: Any, i: int) -> Any:
    """Of a list, what belongs to tensor ``i``."""
    return argument[i] if isinstance(argument, (list, tuple)) else argument
