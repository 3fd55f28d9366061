"""The ATen operators that a model's forward calls, where AOTAutograd alone would not make a graph of them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from graphshard.trace_errors import calling_line, describe


class Operators(TorchDispatchMode):
    """Leaves out checks.

    Args:
        unchecked: lines of the model whose checks were left out are added to it.
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
        return func(*args, **(kwargs or {}))


def _is_check(func: Any) -> bool:
    """Whether it gives nothing and writes nothing: a check of values (of F.one_hot, torch.linalg.inv, torch._assert),
    which nothing in a graph could depend on."""
    return func.namespace == "aten" and not func._schema.returns and not func._schema.is_mutable
