"""Checks of values that Python code makes: left out while a model is captured, as nothing in a graph depends on them.

Those that operators make are left out by :class:`graphshard.trace.operators.Operators`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributions import Distribution

from graphshard.trace.errors import calling_line, describe
from graphshard.trace.meanwhile import meanwhile

_NO_DIMS = torch.Size()


@contextlib.contextmanager
def checks_left_out(unchecked: set[str]) -> Iterator[None]:
    """Meanwhile torch checks of no fake tensor that all of it is true, nor arguments and samples of distributions;
    lines of the model that have it do so are added to ``unchecked``."""
    with meanwhile(
        (torch, "_assert", _unless_fake(0, torch._assert, unchecked)),
        (torch, "_check_tensor_all_with", _unless_fake(1, torch._check_tensor_all_with, unchecked)),
        (Distribution, "_validate_args", False),
        (Distribution, "__init__", _unvalidated(Distribution.__init__, Distribution._validate_args, unchecked)),
    ):
        yield


def _unless_fake(at: int, check: Callable[..., None], unchecked: set[str]) -> Callable[..., None]:
    """``check``, whose condition is argument ``at``, of all but fake tensors."""

    def run(*args: Any, **kwargs: Any) -> None:
        condition = args[at] if at < len(args) else kwargs.get("cond", kwargs.get("condition"))
        if isinstance(condition, (FakeTensor, FunctionalTensor)):
            unchecked.add(describe(calling_line()))
        else:
            check(*args, **kwargs)

    return run


def _unvalidated(init: Callable[..., None], default: bool, unchecked: set[str]) -> Callable[..., None]:
    """``Distribution.__init__`` without validation; ``default``: whether there is any where none is asked for."""

    def run(
        made: Distribution,
        batch_shape: torch.Size = _NO_DIMS,
        event_shape: torch.Size = _NO_DIMS,
        validate_args: bool | None = None,
    ) -> None:
        if default if validate_args is None else validate_args:
            unchecked.add(describe(calling_line()))
        init(made, batch_shape, event_shape, validate_args=False)

    return run
