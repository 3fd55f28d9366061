"""How a batch becomes micro-batches: which tensors are split, along which dim, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from graphshard.errors import BadBatchDims, BatchDoesNotSplit, UnsupportedInput

Shapes = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch's arguments, flattened: tensors and whatever else the user passed, in ``spec``'s order."""

    leaves: tuple[Any, ...]
    spec: TreeSpec
    dims: tuple[int | None, ...] = ()  # of each, the dim along which the batch was split; None: it was repeated

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the model takes them: (args, kwargs)."""
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        return args, kwargs

    def tensors(self) -> dict[str, torch.Tensor]:
        """BATCH slot name to tensor."""
        return {str(i): leaf for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)}

    def shapes(self) -> Shapes:
        """Of each argument that is a tensor, its shape; None for the others."""
        return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in self.leaves)

    def like(self, shapes: Shapes) -> MicroBatch:
        """One with tensors of other shapes, all zeros; this one where arguments are not tensors in the same places."""
        mine = self.shapes()
        if shapes == mine or [s is None for s in shapes] != [s is None for s in mine]:
            return self
        leaves = [
            leaf if shape is None or shape == tuple(leaf.shape) else leaf.new_zeros(shape)
            for leaf, shape in zip(self.leaves, shapes, strict=True)
        ]
        return replace(self, leaves=tuple(leaves))

    def rows(self) -> int | None:
        """How long the batch is; None where nothing of it was split."""
        pairs = zip(self.shapes(), self.dims, strict=True)
        return next((shape[dim] for shape, dim in pairs if shape is not None and dim is not None), None)

    def times(self, parts: int) -> Shapes:
        """The shapes of so many of these, joined."""
        return tuple(
            shape if shape is None or dim is None else (*shape[:dim], shape[dim] * parts, *shape[dim + 1 :])
            for shape, dim in zip(self.shapes(), self.dims, strict=True)
        )


def largest(given: Sequence[Shapes]) -> Shapes:
    """Those of most elements."""
    return max(given, key=lambda shapes: (sum(prod(shape) for shape in shapes if shape is not None), str(shapes)))


def check_batch(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: Mapping[int, int | None], has_values: bool
) -> None:
    """Refuse what could not be split, and what ``batch_dims`` says of arguments that are not there.

    Args:
        has_values: tensors must have values.

    Raises:
        UnsupportedInput: a tensor is sparse or nested, or has no values.
        BadBatchDims: ``batch_dims`` names an argument or a dim that the batch does not have.
    """
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            if leaf.layout is not torch.strided or leaf.is_nested:
                raise UnsupportedInput(index, f"{leaf.layout} tensor", "pass a dense tensor")
            if has_values and leaf.is_meta:
                raise UnsupportedInput(index, "tensor on the meta device", "pass one that has values")
    for index, dim in batch_dims.items():
        if index >= len(leaves):
            given = f"arguments 0 to {len(leaves) - 1}" if leaves else "no argument"
            raise BadBatchDims(index, dim, f"there is no argument {index}; the batch has {given}, in flattened order")


def split_batch(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    ranks: int,
    microbatches: int,
    batch_dims: Mapping[int, int | None],
) -> list[list[MicroBatch]]:
    """Micro-batches by data-parallel rank (outermost), then in order.

    Tensors whose dim 0 has the size of the first tensor's dim 0 are split along it; others are repeated. ``batch_dims``
    maps the index of a flattened argument to the dim to split instead, or to None to repeat it.

    Raises:
        BatchDoesNotSplit: a split dim is empty, or not a multiple of ``ranks * microbatches``.
        BadBatchDims: a tensor does not have the dim that ``batch_dims`` names.
    """
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    parts = ranks * microbatches
    size = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0), None)
    dims = [_dim(index, leaf, size, batch_dims) for index, leaf in enumerate(leaves)]
    pieces: list[list[Any]] = []
    for index, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is None:
            pieces.append([leaf] * parts)
            continue
        if leaf.shape[dim] % parts or (parts > 1 and not leaf.shape[dim]):
            raise BatchDoesNotSplit(index, tuple(leaf.shape), dim, ranks, microbatches)
        pieces.append(list(leaf.split(leaf.shape[dim] // parts, dim)))
    flat = [MicroBatch(tuple(piece[i] for piece in pieces), spec, tuple(dims)) for i in range(parts)]
    return [flat[r * microbatches : (r + 1) * microbatches] for r in range(ranks)]


def _dim(index: int, leaf: Any, size: int | None, batch_dims: Mapping[int, int | None]) -> int | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    if index in batch_dims:
        dim = batch_dims[index]
        if dim is not None and dim >= leaf.dim():
            dims = f"dims 0 to {leaf.dim() - 1}" if leaf.dim() else "no dim"
            raise BadBatchDims(index, dim, f"argument {index}, of shape {list(leaf.shape)}, has {dims}")
        return dim
    return 0 if leaf.dim() > 0 and leaf.shape[0] == size else None
