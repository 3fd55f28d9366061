"""The shapes that one kernel can compute together: tensors of the same rows, and what broadcasts to them.

A space is ``rows`` x ``length``: a tensor [..., length] has as many rows as its other dims multiply to. Within a space
a value is *full* (an element each), *row* (one for each row: [..., 1] or [...]), *column* ([length], for every row) or
*scalar*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

import graphshard.ops  # noqa: F401  defines the graphshard operators
from graphshard.dataflow import is_getitem, is_pointwise
from graphshard.program import val

aten = torch.ops.aten
gs = torch.ops.graphshard


class Extent(StrEnum):
    """What part of its space a value covers."""

    FULL = "full"
    ROW = "row"
    COLUMN = "column"
    SCALAR = "scalar"


@dataclass(frozen=True)
class Space:
    """So many rows of so many elements."""

    rows: int
    length: int

    @property
    def numel(self) -> int:
        return self.rows * self.length

    def extent(self, value: Tensor) -> Extent | None:
        """What ``value`` covers; None: it does not fit, or its rows do not lie one after the other in memory."""
        shape = tuple(value.shape)
        if value.numel() == 1:
            return Extent.SCALAR
        if shape and shape[-1] == self.length and value.numel() == self.numel:
            return Extent.FULL if value.is_contiguous() else None
        if not value.is_contiguous():
            return None
        if shape and shape[-1] == value.numel() == self.length:
            return Extent.COLUMN  # of as many rows as elements: what has one for each row is [..., 1]
        return Extent.ROW if value.numel() == self.rows else None


def common(one: Space, other: Space) -> Space | None:
    """The space in which both may be computed: values with one element a row fit any of as many rows."""
    if one == other or (other.length == 1 and one.rows == other.rows):
        return one
    return other if one.length == 1 and one.rows == other.rows else None


def space_of(value: Tensor) -> Space:
    """The space in which ``value``, of at least one dim, is full."""
    return Space(prod(value.shape[:-1]), value.shape[-1])


def space(node: fx.Node) -> Space | None:
    """The space that the operation belongs to, if it is one that a kernel can compute row by row: pointwise, a
    reduction along the last dim, or a sum of what each row gives. Every operand then fits the space, and so does the
    result."""
    found = None
    if is_pointwise(node):
        found = _pointwise(node)
    elif (rule := _ALONG_ROWS.get(node.target) or _OVER_ROWS.get(node.target)) is not None:
        found = rule(node)
    elif node.target is aten.view.default:
        found = _view(node)
    elif node.target is gs.dropout_mask.default and val(node).dim():
        found = space_of(val(node))
    if found is None or found.numel <= 1 or any(_operand(found, source) is None for source in node.all_input_nodes):
        return None
    return found


def column_space(node: fx.Node) -> Space | None:
    """The space of what gives one element for each column, a sum over all rows, which kernels of a GPU alone have."""
    rule = _OF_COLUMNS.get(node.target)
    found = None if rule is None else rule(node)
    fits = found is not None and found.numel > 1 and all(_operand(found, source) for source in node.all_input_nodes)
    return found if fits else None


def is_reduction(node: fx.Node) -> bool:
    """Whether the node reads whole rows of its operands."""
    return node.target in _ALONG_ROWS or sums_rows(node)


def sums_rows(node: fx.Node) -> bool:
    """Whether the results are sums over all rows: known behind the last row, and to none of them."""
    return node.target in _OVER_ROWS


def _operand(space: Space, source: fx.Node) -> Extent | None:
    value = val(source)
    return space.extent(value) if isinstance(value, Tensor) else None


def _pointwise(node: fx.Node) -> Space | None:
    """All operands have the result's shape, or broadcast along rows or columns as a whole."""
    value = val(node)
    if not isinstance(value, Tensor) or value.numel() <= 1 or not value.is_contiguous():
        return None
    shape = tuple(value.shape)
    for source in node.all_input_nodes:
        other = tuple(val(source).shape)
        broadcast = other[-1:] == shape[-1:] and prod(other) == shape[-1]  # a column
        if not (other in (shape, (*shape[:-1], 1)) or prod(other) == 1 or broadcast):
            return None
    return space_of(value)


def _view(node: fx.Node) -> Space | None:
    value, source = val(node), val(node.all_input_nodes[0])
    same_rows = source.dim() and value.dim() and source.shape[-1] == value.shape[-1] and source.is_contiguous()
    return space_of(value) if same_rows else None


def _reduces(node: fx.Node) -> Space | None:
    value = val(node.all_input_nodes[0])
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or not value.dim() or [d % value.dim() for d in dims] != [value.dim() - 1]:
        return None
    found, result = space_of(value), val(node)
    if found.length == 1 and result.shape[-1:] != (1,):
        return None  # beside as many elements a row as there are rows it would be a column
    return found if found.extent(result) is not Extent.COLUMN else None


def _softmax(position: int) -> Callable[[fx.Node], Space | None]:
    def rule(node: fx.Node) -> Space | None:
        value, dim = val(node), node.args[position]
        return space_of(value) if value.dim() and dim in (-1, value.dim() - 1) else None

    return rule


def _layer_norm(node: fx.Node) -> Space | None:
    value = val(node.all_input_nodes[0])
    return space_of(value) if node.args[1] == [value.shape[-1]] else None


def _sums_columns(node: fx.Node) -> Space | None:
    value, dims = val(node.all_input_nodes[0]), node.args[1]
    over_rows = isinstance(dims, list | tuple) and {d % value.dim() for d in dims} == set(range(value.dim() - 1))
    return space_of(value) if value.dim() > 1 and over_rows and value.is_contiguous() else None


def _layer_norm_backward(node: fx.Node) -> Space | None:
    value = val(node.all_input_nodes[0])
    return space_of(value) if node.args[2] == [value.shape[-1]] else None


def _nll_backward(node: fx.Node) -> Space | None:
    """The gradient of a mean or a sum: a row's is its own, given how many rows count."""
    value = val(node)
    return _nll_space(value, node.args[3], node.args[4])


def _nll_forward(node: fx.Node) -> Space | None:
    """A mean or a sum of what the targets pick, one from each row."""
    return _nll_space(val(node.all_input_nodes[0]), node.args[2], node.args[3])


def _nll_space(value: Tensor, weight: Any, reduction: Any) -> Space | None:
    if value.dim() != 2 or value.shape[0] == value.shape[1]:
        return None  # which of both the targets are for could not be told
    return space_of(value) if weight is None and reduction in (1, 2) else None


_ALONG_ROWS: Mapping[Any, Callable[[fx.Node], Space | None]] = {
    aten.sum.dim_IntList: _reduces,
    aten.mean.dim: _reduces,
    aten.amax.default: _reduces,
    aten.amin.default: _reduces,
    aten.logsumexp.default: _reduces,
    aten._softmax.default: _softmax(1),
    aten._log_softmax.default: _softmax(1),
    aten._softmax_backward_data.default: _softmax(2),
    aten._log_softmax_backward_data.default: _softmax(2),
    aten.native_layer_norm.default: _layer_norm,
    aten.nll_loss_backward.default: _nll_backward,
}
"""Operators that compute each row by itself."""

_OVER_ROWS: Mapping[Any, Callable[[fx.Node], Space | None]] = {aten.nll_loss_forward.default: _nll_forward}
"""Operators that add up what each row gives by itself."""

_OF_COLUMNS: Mapping[Any, Callable[[fx.Node], Space | None]] = {
    aten.sum.dim_IntList: _sums_columns,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}
"""Operators that add up what all rows give, for each column."""


def picks(node: fx.Node) -> bool:
    """Whether the node picks a result of an operator that belongs to a space."""
    return is_getitem(node) and node.all_input_nodes[0].target in (*_ALONG_ROWS, *_OF_COLUMNS)
