"""Composite operators of a region as pointwise operators and reductions, accumulated in float32 or more: by rules of
ours, or, what has neither rule nor form, by torch's own decompositions.

Operators of ours appear, which ATen does not have: :func:`softmax_stats`, which a kernel computes in one pass over a
row however long it is, :func:`pick`, one element of each row, :func:`total` and :func:`over_count`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

import graphshard.ops  # noqa: F401 - defines graphshard::sq_norm
from graphshard.codegen.triton_expand import expanded
from graphshard.codegen.triton_ops import Unsupported, compute_type, has_form
from graphshard.region import Region

aten = torch.ops.aten
gs = torch.ops.graphshard


def softmax_stats(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum along ``dim``, kept, and the sum of exp(x - maximum)."""
    top = x.amax(dim, keepdim=True)
    return top, (x - top).exp().sum(dim, keepdim=True)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]``: of the last dim of ``x`` [*, n], the element that ``index`` [*] names; or ``x`` [n]."""
    return x[index] if x.dim() == 1 else x.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def over_count(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """``x`` divided by the product of ``sizes``, which are those of dims."""
    return x / math.prod(sizes)


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all elements of all ``parts``, which have one dtype."""
    return sum((part.sum() for part in parts[1:]), parts[0].sum())


def decomposed(region: Region) -> fx.Graph:
    """The region's graph without composite operators; values at ``meta["val"]`` as before.

    Raises:
        Unsupported: an operator is used in a way that no kernel has.
    """
    return _Decomposer().run(region)


class _Decomposer:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.row_sums: dict[fx.Node, fx.Node] = {}  # one-hot gradients of a loss, and what they sum to along a row

    def run(self, region: Region) -> fx.Graph:
        made: dict[fx.Node, Any] = {}
        for node in region.inputs:
            made[node] = self.graph.placeholder(node.name)
            made[node].meta["val"] = _typed(node.meta["val"])
        self.follow(region.graph, made)
        self.graph.output(tuple(self.result(made[node], node) for node in region.outputs))
        return self.graph

    def follow(self, graph: fx.Graph, made: dict[fx.Node, Any]) -> None:
        """Compute here what the operations of ``graph`` do: ``made`` has its inputs, and gets all else."""
        for node in graph.nodes:
            if node.op == "call_function":
                args = fx.map_arg(node.args, made.__getitem__)
                kwargs = fx.map_arg(node.kwargs, made.__getitem__)
                if node.target is operator.getitem and not isinstance(args[0], fx.Node):
                    made[node] = args[0][args[1]]
                else:
                    made[node] = self.operation(node.target, args, kwargs, _typed(node.meta["val"]))

    def operation(self, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
        """The results, typed ``like`` this, of an operator of the region: by its rule, its form or torch's own."""
        if target in _RULES:
            return _RULES[target](self, like, *args, **kwargs)
        graph = None if has_form(target) else expanded(target, (args, kwargs), _RULES)
        if graph is None:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["val"] = like
            return node
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Node)]
        made: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
        self.follow(graph, made)
        return fx.map_arg(graph.output_node().args[0], made.__getitem__)

    def result(self, made: fx.Node, node: fx.Node) -> fx.Node:
        """The result with the strides that the region gives it, and memory of its own unless it is an input there."""
        if node.op == "placeholder":
            return made
        if made.op != "placeholder" and made.meta["val"].stride() == node.meta["val"].stride():
            return made
        copied = self(aten.clone.default, made)
        copied.meta["val"] = _typed(node.meta["val"])
        return copied

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, its value computed from those of its arguments."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if x.meta["val"].dtype is dtype else self(aten._to_copy.default, x, dtype=dtype)

    def wide(self, x: fx.Node) -> fx.Node:
        return self.cast(x, compute_type(x.meta["val"].dtype))

    def sum(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        return self(aten.sum.dim_IntList, x, list(dims), True)

    def mean(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        shape = x.meta["val"].shape
        return self(over_count, self.sum(x, dims), [shape[d] for d in dims])


def _typed(value: Any) -> Any:
    """The types alone, on the meta device: operators then take them outside of any fake mode."""
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), value
    )


def _mean(do: _Decomposer, like: Tensor, x: fx.Node, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> fx.Node:
    value = x.meta["val"]
    dims = list(range(value.dim())) if not dims else [d % value.dim() for d in dims]
    result = do.mean(do.cast(x, compute_type(like.dtype)), dims)
    return do.cast(result if keepdim else do(aten.view.default, result, list(like.shape)), like.dtype)


def _layer_norm(
    do: _Decomposer, like: Any, x: fx.Node, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[fx.Node, ...]:
    dims = _trailing(x, shape)
    wide = do.wide(x)
    mean = do.mean(wide, dims)
    rest = do(aten.sub.Tensor, wide, mean)
    variance = do.mean(do(aten.mul.Tensor, rest, rest), dims)
    rstd = do(aten.rsqrt.default, do(aten.add.Scalar, variance, eps))
    out = do(aten.mul.Tensor, rest, rstd)
    if weight is not None:
        out = do(aten.mul.Tensor, out, do.wide(weight))
    if bias is not None:
        out = do(aten.add.Tensor, out, do.wide(bias))
    return do.cast(out, like[0].dtype), mean, rstd  # which ATen has in float32 on a GPU, whatever it says of a CPU


def _layer_norm_backward(
    do: _Decomposer,
    like: Any,
    grad: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    mean: fx.Node,
    rstd: fx.Node,
    weight: Any,
    bias: Any,
    mask: Sequence[bool],
) -> tuple[fx.Node | None, ...]:
    # x̂ = (x - mean)·rstd, g = dy·w: dx = rstd·(g - mean(g) - x̂·mean(g·x̂)), dw = Σ dy·x̂, db = Σ dy over the rows.
    dims = _trailing(x, shape)
    rstd = do.wide(rstd)
    normal = do(aten.mul.Tensor, do(aten.sub.Tensor, do.wide(x), do.wide(mean)), rstd)
    grad = do.wide(grad)
    rows = [d for d in range(normal.meta["val"].dim()) if d not in dims]
    results: list[fx.Node | None] = [None, None, None]
    if mask[0]:
        g = grad if weight is None else do(aten.mul.Tensor, grad, do.wide(weight))
        inner = do.mean(do(aten.mul.Tensor, g, normal), dims)
        rest = do(aten.sub.Tensor, do(aten.sub.Tensor, g, do.mean(g, dims)), do(aten.mul.Tensor, normal, inner))
        results[0] = do(aten.mul.Tensor, rest, rstd)
    if mask[1] and weight is not None:
        results[1] = _summed(do, do(aten.mul.Tensor, grad, normal), rows)
    if mask[2]:
        results[2] = _summed(do, grad, rows)
    return tuple(
        None if result is None else do.cast(result, value.dtype) for result, value in zip(results, like, strict=True)
    )


def _summed(do: _Decomposer, x: fx.Node, rows: Sequence[int]) -> fx.Node:
    return do(aten.sum.dim_IntList, x, list(rows), False) if rows else x


def _variance(do: _Decomposer, like: Any, x: fx.Node, dims: Any = None, **kwargs: Any) -> fx.Node:
    return _var_mean(do, (like, None), x, dims, **kwargs)[0]


def _var_mean(
    do: _Decomposer,
    like: Any,
    x: fx.Node,
    dims: Any = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[fx.Node, fx.Node]:
    value = x.meta["val"]
    dims = list(range(value.dim())) if not dims else [d % value.dim() for d in dims]
    count = math.prod(value.shape[d] for d in dims)
    wide = do.wide(x)
    mean = do.mean(wide, dims)
    rest = do(aten.sub.Tensor, wide, mean)
    squares = do.sum(do(aten.mul.Tensor, rest, rest), dims)
    variance = do(aten.div.Scalar, squares, max(count - (1 if correction is None else correction), 0))
    shape = list(like[0].shape)
    results = [do(aten.view.default, r, shape) if not keepdim else r for r in (variance, mean)]
    return do.cast(results[0], value.dtype), do.cast(results[1], value.dtype)


def _stats(do: _Decomposer, x: fx.Node, dim: int) -> tuple[fx.Node, fx.Node]:
    both = do(softmax_stats, x, dim)
    return do(operator.getitem, both, 0), do(operator.getitem, both, 1)


def _softmax(do: _Decomposer, like: Tensor, x: fx.Node, dim: int, half_to_float: bool) -> fx.Node:
    wide = do.wide(x)
    top, sums = _stats(do, wide, dim)
    shares = do(aten.exp.default, do(aten.sub.Tensor, wide, top))
    if like.dtype.itemsize > 2:
        return do.cast(do(aten.div.Tensor, shares, sums), like.dtype)
    # A division of each element takes longer than moving its two bytes, whose rounding hides what a product is off.
    return do.cast(do(aten.mul.Tensor, shares, do(aten.reciprocal.default, sums)), like.dtype)


def _log_softmax(do: _Decomposer, like: Tensor, x: fx.Node, dim: int, half_to_float: bool) -> fx.Node:
    wide = do.wide(x)
    top, sums = _stats(do, wide, dim)
    return do.cast(do(aten.sub.Tensor, do(aten.sub.Tensor, wide, top), do(aten.log.default, sums)), like.dtype)


def _logsumexp(do: _Decomposer, like: Tensor, x: fx.Node, dims: Sequence[int], keepdim: bool = False) -> fx.Node:
    (dim,) = dims
    top, sums = _stats(do, do.wide(x), dim)
    result = do(aten.add.Tensor, top, do(aten.log.default, sums))
    return do.cast(result if keepdim else do(aten.view.default, result, list(like.shape)), like.dtype)


def _softmax_backward(
    do: _Decomposer, like: Tensor, grad: fx.Node, out: fx.Node, dim: int, dtype: torch.dtype
) -> fx.Node:
    product = do(aten.mul.Tensor, do.wide(grad), do.wide(out))
    return do.cast(do(aten.sub.Tensor, product, do(aten.mul.Tensor, do.wide(out), do.sum(product, [dim]))), like.dtype)


def _log_softmax_backward(
    do: _Decomposer, like: Tensor, grad: fx.Node, out: fx.Node, dim: int, dtype: torch.dtype
) -> fx.Node:
    wide = do.wide(grad)
    sums = do.row_sums.get(grad)  # a gradient of one element a row needs no pass over it
    if sums is None:
        sums = do.sum(wide, [dim])
    share = do(aten.exp.default, do.wide(out))
    return do.cast(do(aten.sub.Tensor, wide, do(aten.mul.Tensor, share, sums)), like.dtype)


def _targets(do: _Decomposer, x: fx.Node, target: fx.Node, weight: Any, ignore: int) -> tuple[fx.Node, fx.Node, Any]:
    """Which rows count, their targets, 0 elsewhere, and the weights of those."""
    if x.meta["val"].dim() != 2:
        raise Unsupported(f"aten.nll_loss of {x.meta['val'].dim()} dims; 2 is what kernels have")
    counts = do(aten.ne.Scalar, target, ignore)
    safe = do(aten.where.ScalarOther, counts, target, 0)
    return counts, safe, None if weight is None else do(pick, do.wide(weight), safe)


def _nll_loss(
    do: _Decomposer, like: Any, x: fx.Node, target: fx.Node, weight: Any, reduction: int, ignore: int
) -> tuple[fx.Node, fx.Node]:
    counts, safe, weights = _targets(do, x, target, weight, ignore)
    loss = do(aten.neg.default, do(pick, do.wide(x), safe))
    if weights is not None:
        loss = do(aten.mul.Tensor, loss, weights)
    loss = do(aten.where.ScalarOther, counts, loss, 0.0)
    dtype = like[0].dtype
    if reduction == 0:
        return do.cast(loss, dtype), do(aten.zeros.default, [], dtype=like[1].dtype)
    ones = do.cast(counts, loss.meta["val"].dtype)
    share = ones if weights is None else do(aten.where.ScalarOther, counts, weights, 0.0)
    sums = do(total, [loss])
    weigh = do(total, [share])
    return do.cast(sums if reduction == 2 else do(aten.div.Tensor, sums, weigh), dtype), do.cast(weigh, like[1].dtype)


def _nll_loss_backward(
    do: _Decomposer,
    like: Tensor,
    grad: fx.Node,
    x: fx.Node,
    target: fx.Node,
    weight: Any,
    reduction: int,
    ignore: int,
    total_weight: fx.Node,
) -> fx.Node:
    counts, safe, weights = _targets(do, x, target, weight, ignore)
    value = do(aten.neg.default, do.wide(grad))
    if reduction == 1:
        value = do(aten.div.Tensor, value, do.wide(total_weight))
    if weights is not None:
        value = do(aten.mul.Tensor, value, weights)
    value = do(aten.unsqueeze.default, do(aten.where.ScalarOther, counts, value, 0.0), 1)
    columns = do(aten.arange.default, like.shape[1], device=like.device)
    here = do(aten.eq.Tensor, columns, do(aten.unsqueeze.default, safe, 1))
    result = do.cast(do(aten.where.ScalarOther, here, value, 0.0), like.dtype)
    do.row_sums[result] = value
    return result


def _sq_norm(do: _Decomposer, like: Tensor, parts: Sequence[fx.Node]) -> fx.Node:
    wide = [do.cast(part, like.dtype) for part in parts if part.meta["val"].numel()]
    return do(total, [do(aten.mul.Tensor, part, part) for part in wide])


def _copy(do: _Decomposer, like: Tensor, into: fx.Node, source: fx.Node, non_blocking: bool = False) -> fx.Node:
    return do.cast(do(aten.expand.default, source, list(like.shape)), like.dtype)


def _sum_all(do: _Decomposer, like: Tensor, x: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
    return do.cast(do(total, [do.cast(x, compute_type(like.dtype))]), like.dtype)


def _mean_all(do: _Decomposer, like: Tensor, x: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
    sums = do(total, [do.cast(x, compute_type(like.dtype))])
    return do.cast(do(over_count, sums, list(x.meta["val"].shape)), like.dtype)


def _sum(
    do: _Decomposer, like: Tensor, x: fx.Node, dims: Any, keepdim: bool = False, dtype: torch.dtype | None = None
) -> fx.Node:
    wide = do.cast(x, compute_type(like.dtype))
    return do.cast(do(aten.sum.dim_IntList, wide, list(dims or range(x.meta["val"].dim())), keepdim), like.dtype)


def _extreme(target: Any) -> Callable[..., fx.Node]:
    def rule(do: _Decomposer, like: Tensor, x: fx.Node, dims: Any = (), keepdim: bool = False) -> fx.Node:
        return do.cast(do(target, do.wide(x), list(dims or range(x.meta["val"].dim())), keepdim), like.dtype)

    return rule


def _trailing(x: fx.Node, shape: Sequence[int]) -> list[int]:
    dim = x.meta["val"].dim()
    return list(range(dim - len(shape), dim))


_RULES: dict[Any, Callable[..., Any]] = {
    aten.mean.dim: _mean,
    aten.mean.default: _mean_all,
    aten.sum.default: _sum_all,
    aten.sum.dim_IntList: _sum,
    aten.amax.default: _extreme(aten.amax.default),
    aten.amin.default: _extreme(aten.amin.default),
    aten.var.correction: _variance,
    aten.var_mean.correction: _var_mean,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten.logsumexp.default: _logsumexp,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss_backward.default: _nll_loss_backward,
    gs.sq_norm.default: _sq_norm,
    aten.copy.default: _copy,
}
