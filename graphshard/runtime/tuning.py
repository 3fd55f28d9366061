"""What kernels that search their block sizes have found: Triton does so when one first runs at a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from graphshard.execution import ExecutionPlan, Kernel

_FUNCTIONS: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Of kernels that run in this process, by source."""


def note(kernel: Kernel, function: Callable[..., Any]) -> None:
    """The kernel is run by ``function``."""
    _FUNCTIONS[kernel.source] = function


def how(kernel: Kernel) -> str:
    """How the kernel was written, and what its searches have found so far in this process."""
    return "; ".join([kernel.how, *_found(kernel)])


def described(plan: ExecutionPlan) -> ExecutionPlan:
    """``plan`` with that said of each of its kernels."""
    return replace(plan, kernels={name: replace(k, how=how(k)) for name, k in plan.kernels.items()})


def _found(kernel: Kernel) -> Iterator[str]:
    names = getattr(_FUNCTIONS.get(kernel.source), "__globals__", {})
    for name in sorted(name for name in names if name.startswith(f"{kernel.name}_kernel")):
        value = names[name]
        for key, config in getattr(value, "cache", {}).items():
            # The key has the sizes that it is searched for, and then the types.
            sizes = ", ".join(f"{n}={size}" for n, size in zip(value.keys, key, strict=False)) or "any size"
            chosen = ", ".join(f"{option}={given}" for option, given in config.kwargs.items())
            yield f"{name} found {chosen}, {config.num_warps} warps for {sizes}"
