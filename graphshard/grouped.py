"""``graphshard::grouped_mm``: products of groups of rows, each with a matrix of its own, as in a mixture of experts.

Where groups end is a tensor: shapes do not depend on it. Each of the two operators is the other's gradient. They choose
when they run: torch's kernel for groups where its conditions hold, else one product after the other, for which the host
reads the ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MM = "grouped_mm(Tensor x, Tensor w, Tensor offs) -> Tensor"
_OUTER = "grouped_outer(Tensor x, Tensor y, Tensor offs) -> Tensor"
_ALIGNED_BYTES = 16


def register(library: torch.library.Library) -> None:
    """Define both operators in ``library``."""
    for schema, run, types, differentiate in (
        (_MM, grouped_mm, _mm_types, _differentiate_mm),
        (_OUTER, grouped_outer, _outer_types, _differentiate_outer),
    ):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, run, "CompositeExplicitAutograd")
        library.impl(name, types, "Meta")
        torch.library.register_autograd(f"graphshard::{name}", differentiate, setup_context=_save, lib=library)


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Rows of ``x`` by the matrix of their group.

    Args:
        x: [rows, k].
        w: [groups, k, n].
        offs: [groups], integers that do not fall: group i is the rows from ``offs[i - 1]``, or 0, to ``offs[i]``.

    Returns:
        [rows, n], contiguous; zeros in rows behind the last group.
    """
    if _has_kernel(x, w):
        out = F.grouped_mm(x, w, offs=offs.to(torch.int32))
        unused = torch.arange(x.shape[0], device=x.device) >= offs[-1]
        return out.contiguous().masked_fill_(unused[:, None], 0)
    out, last = _mm_types(x, w, offs), 0
    for group, start, end in _groups(offs):
        torch.mm(x[start:end], w[group], out=out[start:end])
        last = end
    out[last:] = 0
    return out


def grouped_outer(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    """The sum over the rows of each group of outer products.

    Args:
        x: [rows, k].
        y: [rows, n].
        offs: [groups], as :func:`grouped_mm` has it; rows behind the last group are in no sum.

    Returns:
        [groups, k, n], contiguous; zeros for a group without rows.
    """
    if _has_kernel(x.t(), y):
        out = F.grouped_mm(x.t(), y, offs=offs.to(torch.int32))
        empty = offs.diff(prepend=offs.new_zeros(1)) == 0
        return out.contiguous().masked_fill_(empty[:, None, None], 0)
    out = _outer_types(x, y, offs).zero_()
    for group, start, end in _groups(offs):
        torch.mm(x[start:end].t(), y[start:end], out=out[group])
    return out


def _mm_types(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    assert x.dtype is w.dtype, f"{x.dtype} by {w.dtype}"
    return x.new_empty(x.shape[0], w.shape[2])


def _outer_types(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    assert x.dtype is y.dtype, f"{x.dtype} by {y.dtype}"
    return x.new_empty(offs.shape[0], x.shape[1], y.shape[1])


def _groups(offs: Tensor) -> Iterator[tuple[int, int, int]]:
    """The groups that have rows: number, begin and end."""
    start = 0
    for group, end in enumerate(offs.tolist()):
        if start < end:
            yield group, start, end
            start = end


def _has_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether torch's kernel computes products of these operands."""
    if a.device.type != "cuda" or a.dtype is not torch.bfloat16 or 0 in (*a.shape, *b.shape):
        return False
    return torch.cuda.get_device_capability(a.device) >= (8, 0) and _is_aligned(a) and _is_aligned(b)


def _is_aligned(x: Tensor) -> bool:
    """Whether matrices are dense by rows or by columns, and each of those begins at a multiple of 16 bytes."""
    (rows, columns), (down, across) = x.shape[-2:], x.stride()[-2:]
    by_rows, by_columns = across == 1 and down >= columns, down == 1 and across >= rows
    if not (by_rows or by_columns):
        return False
    steps = (*x.stride()[:-2], down if by_rows else across)
    return x.data_ptr() % _ALIGNED_BYTES == 0 and not any(s * x.itemsize % _ALIGNED_BYTES for s in steps)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_mm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offs = ctx.saved_tensors
    gs = torch.ops.graphshard
    of_x = gs.grouped_mm(grad, w.mT, offs) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return of_x, None, None
    # In the order of the weight's memory, as what is read transposed is stored.
    if w.mT.is_contiguous() and not w.is_contiguous():
        return of_x, gs.grouped_outer(grad, x, offs).mT, None
    return of_x, gs.grouped_outer(x, grad, offs), None


def _differentiate_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, offs = ctx.saved_tensors
    gs = torch.ops.graphshard
    of_x = gs.grouped_mm(y, grad.mT, offs) if ctx.needs_input_grad[0] else None
    of_y = gs.grouped_mm(x, grad, offs) if ctx.needs_input_grad[1] else None
    return of_x, of_y, None
