"""The ``graphshard::`` operators: what ATen and the functional collectives cannot say.

Each has a reference meaning for a single process, used for types, for checking and by the code generator.
``cast`` is a cast of the model's own, between capture and the precision pass.
Operators over a mesh axis (``local_shard``, ``stage_sum``, ``stage_broadcast``, ``transfer``) have types only: what
they do depends on the rank, and executors carry them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphshard import attention, grouped, random_ops

_lib = torch.library.Library("graphshard", "DEF")


def _define(schema: str) -> None:
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


_define("transfer(Tensor x, int src, int dst) -> Tensor")
_define("offload(Tensor x, str to) -> Tensor")
_define("reload(Tensor x, str from) -> Tensor")
_define("pack(Tensor[] parts, int[] offsets, int numel) -> Tensor")
_define("local_shard(Tensor flat, int parts, str axis) -> Tensor")
_define("cast(Tensor x, ScalarType dtype, Tensor? like=None) -> Tensor")
_define("sq_norm(Tensor[] parts) -> Tensor")
_define("nonfinite(Tensor[] parts) -> Tensor")
_define("stage_sum(Tensor[] parts, str axis) -> Tensor")
_define("stage_broadcast(Tensor x, int src, str axis) -> Tensor")


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)  # preserve_format: a transfer keeps the strides of a dense tensor


def _pack_meta(parts: Sequence[Tensor], offsets: Sequence[int], numel: int) -> Tensor:
    return parts[0].new_empty([numel])


def _pack(parts: Sequence[Tensor], offsets: Sequence[int], numel: int) -> Tensor:
    flat = parts[0].new_zeros([numel])
    for part, offset in zip(parts, offsets, strict=True):
        flat[offset : offset + part.numel()].view(part.shape).copy_(part)
    return flat


def _cast_meta(x: Tensor, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype if like is None else like.dtype)


def _cast(x: Tensor, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """A copy of ``x`` in ``dtype``, or in that of ``like``, which a pass may change, where it is given."""
    return x.to(dtype if like is None else like.dtype, copy=True)


def _cast_setup(ctx: Any, inputs: tuple[Tensor, torch.dtype, Tensor | None], output: Tensor) -> None:
    ctx.x = inputs[0].detach()  # not saved: of its precision alone it does not matter that it is written to later


def _cast_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """As autograd of a cast: the gradient in the precision of what was cast."""
    return torch.ops.graphshard.cast(grad, ctx.x.dtype, ctx.x), None, None


def _sq_norm(parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=_sq_norm_meta(parts).dtype, device=parts[0].device)
    for part in map(_real, parts):
        flat = part.reshape(-1).to(total.dtype)
        total = total + torch.dot(flat, flat)
    return total


def _sq_norm_meta(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty([], dtype=torch.promote_types(parts[0].dtype.to_real(), torch.float32))


def _real(value: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _nonfinite(parts: Sequence[Tensor]) -> Tensor:
    """How many of ``parts`` hold NaN or infinity: the smallest or the largest element then is not finite."""
    total = torch.zeros((), dtype=torch.float32, device=parts[0].device)
    for part in map(_real, parts):
        if part.numel():
            low, high = torch.aminmax(part)
            total = total + (~(low.isfinite() & high.isfinite())).to(total.dtype)
    return total


_lib.impl("transfer", lambda x, src, dst: _like(x), "Meta")
_lib.impl("cast", _cast_meta, "Meta")
_lib.impl("cast", _cast, "CompositeExplicitAutograd")
torch.library.register_autograd("graphshard::cast", _cast_backward, setup_context=_cast_setup, lib=_lib)
for _move in ("offload", "reload"):
    _lib.impl(_move, lambda x, home: _like(x), "Meta")
    _lib.impl(_move, lambda x, home: x.clone(), "CompositeExplicitAutograd")
_lib.impl("pack", _pack_meta, "Meta")
_lib.impl("pack", _pack, "CompositeExplicitAutograd")
_lib.impl("local_shard", lambda flat, parts, axis: flat.new_empty([flat.numel() // parts]), "Meta")
_lib.impl("sq_norm", _sq_norm_meta, "Meta")
_lib.impl("sq_norm", _sq_norm, "CompositeExplicitAutograd")
_lib.impl("nonfinite", lambda parts: parts[0].new_empty([], dtype=torch.float32), "Meta")
_lib.impl("nonfinite", _nonfinite, "CompositeExplicitAutograd")
_lib.impl("stage_sum", lambda parts, axis: _like(parts[0]), "Meta")
_lib.impl("stage_broadcast", lambda x, src, axis: _like(x), "Meta")
attention.register(_lib)
grouped.register(_lib)
random_ops.register(_lib)
