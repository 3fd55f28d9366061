"""In-place operators on views whose dims are in another order than their memory's.

Of ``t.masked_fill_`` AOTAutograd makes ``masked_fill``, and of its result what ``t`` is a view of. That result is
contiguous: where ``t`` is a transposed view, what is behind it gets other strides than in eager code, of which
``as_strided`` reads other elements and which ``view`` refuses. Written to a copy that is copied back, they stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from graphshard.trace.operators import written

aten = torch.ops.aten


class KeptLayout(TorchDispatchMode):
    """Has operators that write to permuted tensors write to copies of them, which are copied back."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        permuted = [] if _keeps_strides(func) else [v for v in written(func, args, kwargs) if _is_permuted(v)]
        if not permuted:
            return func(*args, **kwargs)
        copies = {id(value): value.clone() for value in permuted}
        args, kwargs = tree_map_only(Tensor, lambda value: copies.get(id(value), value), (args, kwargs))
        result = func(*args, **kwargs)
        for value in permuted:
            value.copy_(copies[id(value)])
        originals = {id(copies[id(value)]): value for value in permuted}
        return tree_map_only(Tensor, lambda value: originals.get(id(value), value), result)


def _keeps_strides(func: Any) -> bool:
    """Whether what it makes of a permuted tensor is permuted alike, or it writes no elements."""
    if not func._schema.is_mutable or func is aten.copy_.default:
        return True
    return not _IN_ORDER.isdisjoint(func.tags) and func is not aten.mvlgamma_.default


def _is_permuted(value: Tensor) -> bool:
    """Whether its dims are in another order than its memory's; only what AOTAutograd makes functional matters."""
    strides = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
    return isinstance(value, FunctionalTensor) and strides != sorted(strides, reverse=True)


_IN_ORDER = {torch.Tag.pointwise, torch.Tag.inplace_view}
