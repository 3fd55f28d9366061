"""Products of groups while a model is captured: torch's function and transformers' operator become ours.

Torch's has types for bfloat16 alone while it is traced, and libraries that know it have operators of their own for the
other precisions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FUNCTION: Any = torch._grouped_mm  # which F.grouped_mm calls
_OPERATORS = ("transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback.default")
"""By name, as an operator exists only once its library is imported."""


def of_groups(func: Any) -> Any:
    """What to call instead of a torch function: the function itself, unless it multiplies groups."""
    if func is _FUNCTION:
        return _grouped_mm
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and str(func) in _OPERATORS:
        return grouped_mm_fallback
    return func


def _grouped_mm(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch._grouped_mm``. Groups are along the dim that only one operand has, or, of two matrices, along that which
    both have and which is summed over; of three dims each, they are the first."""
    gs = torch.ops.graphshard
    plain = bias is None and out_dtype in (None, input.dtype) and input.dtype is mat2.dtype
    result: Tensor
    match input.dim(), mat2.dim(), offs is not None:
        case (2, 3, True) if plain and input.shape[1] == mat2.shape[1] and _ends(offs, mat2.shape[0]):
            result = gs.grouped_mm(input, mat2, offs)
        case (3, 2, True) if plain and input.shape[2] == mat2.shape[0] and _ends(offs, input.shape[0]):
            result = gs.grouped_mm(mat2.t(), input.mT, offs).t()
        case (2, 2, True) if plain and input.shape[1] == mat2.shape[0]:
            result = gs.grouped_outer(input.t(), mat2, offs)
        case (3, 3, False) if plain:
            result = torch.bmm(input, mat2)
        case _:
            result = _FUNCTION(input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)  # which says what is wrong
    return result


def _ends(offs: Tensor | None, groups: int) -> bool:
    return offs is not None and tuple(offs.shape) == (groups,)


def grouped_mm_fallback(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """``transformers::grouped_mm_fallback``."""
    result: Tensor = torch.ops.graphshard.grouped_mm(input, weight, offs)
    return result
