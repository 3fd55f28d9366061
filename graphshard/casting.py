"""Casts in a body: every operation in its precision (autocast.py), gradients in that of the values they belong to.

Forward operations decide; an operation of the backward computes in the precision of the forward one it differentiates.
A cast is made once per value; one that widens, which a byte per element more makes cheap to repeat, once per phase, so
that the narrow value alone is kept for the backward. So is one of a parameter, which must not outlive its phase.

What the model says itself comes first: its own casts (``graphshard.cast``) become casts where a value is not in that
precision already, and where it has turned autocast off operations compute in what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate, map_arg

from graphshard.analysis import is_complex, weight_views
from graphshard.autocast import FLOATS, HALVES, backward_island, island, promotes
from graphshard.dataflow import is_getitem, is_view
from graphshard.program import NodeInfo, Phase, Role, Section, info, val
from graphshard.rewrite import call, retype

aten = torch.ops.aten
gs = torch.ops.graphshard

_MOVES = (aten.clone.default, aten.slice_backward.default, aten.select_backward.default)
"""Copies, which like views compute nothing that more precision could improve."""

_NUMBERS = (aten.scalar_tensor.default, aten.full.default)


def _extremes(lower: torch.dtype) -> dict[float, float]:
    wide, narrow = torch.finfo(torch.float32), torch.finfo(lower)
    return {wide.max: narrow.max, wide.min: narrow.min, wide.tiny: narrow.tiny}


_EXTREMES = {lower: _extremes(lower) for lower in HALVES.values()}


@dataclass(frozen=True)
class _Forward:
    """What the backward of a forward operation needs to know of it."""

    node: fx.Node
    dtype: torch.dtype | None  # what it computes in; None: no floats
    is_island: bool  # in float32 whatever it is given
    narrow: frozenset[tuple[int, ...]]  # shapes that inputs of the lower precision have, and others do not


class Caster:
    """Rewrites one body in place; ``changed`` are placeholders whose types are others than before."""

    def __init__(self, body: Section, lower: torch.dtype, changed: set[fx.Node]) -> None:
        self.body, self.lower = body, lower
        self.changed = set(changed)
        self.forward: dict[str, _Forward] = {}  # by origin
        self.casts: dict[tuple[fx.Node, torch.dtype, Phase | None], fx.Node] = {}
        # A gradient that an island makes in float32 of a narrower value: autograd casts it back.
        self.due: dict[fx.Node, torch.dtype] = {}
        self.totals: set[fx.Node] = set()
        self.narrow_of: dict[fx.Node, fx.Node] = {}  # by a widening cast of the model, what it is of
        # To the model they are in float32, whatever they are stored in.
        self.weights = {n for n, slot in body.inputs.items() if slot.role is Role.PARAM} | weight_views(body)

    def run(self, accumulated: dict[fx.Node, torch.dtype]) -> None:
        """Cast; ``accumulated``: the sums ``add(carry, value)`` by what they are kept in."""
        self.totals = _totals(accumulated)
        for node in list(self.body.nodes()):
            if node.target is gs.cast.default:
                self._settle(node)
            elif is_getitem(node):
                self._retype(node)
                self._note_gradient(node)
            elif node in accumulated:
                self._set_args(node, partial(self._cast, dtype=accumulated[node], reader=node))
                self._retype(node)
            elif info(node).phase is Phase.FORWARD:
                self._forward(node)
            else:
                self._backward(node)

    # Operations

    def _forward(self, node: fx.Node) -> None:
        floats = [source for source in node.all_input_nodes if _dtype(source) in FLOATS]
        narrow = {_shape(source) for source in floats if self._narrow(source)}
        narrow -= {_shape(source) for source in floats if not self._narrow(source)}
        exact = any(_dtype(source) is torch.float64 for source in node.all_input_nodes)
        fixed = None if exact or info(node).as_given else island(node, self.lower)
        wanted = fixed or self._widest(node)
        if wanted is not None:
            self._set_args(node, lambda n: self._cast(n, wanted, node) if self._casts(node, n) else n)
        self._fit(node)
        self._retype(node)
        computed = fixed or next((t for t in _dtypes(val(node)) if t in FLOATS), None)
        if info(node).origin:
            made = _Forward(node, computed, fixed is torch.float32, frozenset(narrow))
            self.forward.setdefault(info(node).origin, made)

    def _backward(self, node: fx.Node) -> None:
        of = self.forward.get(info(node).forward)
        wide = backward_island(node) or info(node).as_given  # a hook has the gradient of a float32 parameter
        wanted = torch.float32 if wide else None if of is None else of.dtype
        if wanted is None:  # it adds gradients up, or is a constant
            if node not in self.totals:
                self._set_args(node, lambda n: self._as_due(n, node))
            if (widest := self._widest(node)) is not None:
                self._set_args(node, partial(self._cast, dtype=widest, reader=node))
        else:
            self._set_args(node, self._operand(node, wanted, of))
        self._fit(node)
        self._retype(node)
        self._note_gradient(node)

    def _operand(self, node: fx.Node, wanted: torch.dtype, of: _Forward | None) -> Callable[[fx.Node], fx.Node]:
        """How a backward operation that computes in ``wanted`` reads its inputs."""
        sources = node.all_input_nodes
        gradients = [s for s in sources if s.op == "call_function" and info(s).phase is not Phase.FORWARD]
        # Where a gradient is in float32 already, a pointwise operation widens what it reads besides by itself.
        itself = promotes(node) and any(val(s).dim() for s in gradients if isinstance(val(s), torch.Tensor))
        moves = (is_view(node) or node.target in _MOVES) and not is_complex(node)  # which no narrow value can be

        def read(source: fx.Node) -> fx.Node:
            source = self.narrow_of.get(source, source)  # which alone is kept
            maker = source.args[0] if is_getitem(source) else source
            if of is not None and maker is of.node and source not in self.body.inputs:
                return source  # statistics, a log-sum-exp: as the forward operation made them
            stays = (moves and not (of and of.is_island)) or (itself and source not in gradients)
            if wanted is torch.float32 and self._narrow(source) and stays:
                return source
            return self._cast(source, wanted, node)

        return read

    def _casts(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a forward operation's input is cast: an added mask is not, attention reads it as it is."""
        return not (node.target is torch.ops.graphshard.attention.default and source in node.args[3:4])

    def _note_gradient(self, node: fx.Node) -> None:
        """If an island or a promotion made ``node``, the gradient of a narrow value, in float32, it is due a cast."""
        of = self.forward.get(info(node).forward)
        if info(node).phase is Phase.FORWARD or of is None or _dtype(node) is not torch.float32:
            return
        if _shape(node) in of.narrow:
            self.due[node] = self.lower

    def _as_due(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        return self._cast(source, self.due[source], reader) if source in self.due else source

    # Numbers

    def _fit(self, node: fx.Node) -> None:
        """To the model all is in float32: what ``torch.finfo`` says of a value's type becomes what it says of the lower
        precision, where that is what ``node`` computes in."""
        floats = [source for source in node.all_input_nodes if _dtype(source) in FLOATS and val(source).dim()]
        if floats and all(map(self._narrow, floats)):
            fitted: Any = map_aggregate((node.args, node.kwargs), partial(self._fitted, reader=node))
            node.args, node.kwargs = fitted

    def _fitted(self, value: Any, reader: fx.Node) -> Any:
        """An argument of ``reader``, a number or a constant of no dims."""
        if isinstance(value, float):
            return _EXTREMES[self.lower].get(value, value)
        if not (isinstance(value, fx.Node) and value.target in _NUMBERS and not val(value).dim()):
            return value
        args = tuple(_EXTREMES[self.lower].get(a, a) if isinstance(a, float) else a for a in value.args)
        if args == value.args:
            return value
        with reader.graph.inserting_before(reader):
            return call(reader.graph, value.target, args, info(value), **value.kwargs)

    # Casts

    def _settle(self, node: fx.Node) -> None:
        """The model's own cast, or autograd's of the gradient of one, becomes a cast or nothing."""
        source: Any = node.args[0]
        wanted = self._wanted(node)
        # A gradient is widened where it is read; the backward's own copy of a cast of a weight is none.
        is_gradient = info(node).phase is not Phase.FORWARD and source not in self.weights
        if _dtype(source) is wanted or (is_gradient and wanted is not self.lower):
            self._drop(node, source)
            return
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": wanted}
        self.changed.add(source)
        self._retype(node)
        if wanted is torch.float32:
            self.narrow_of[node] = source
        if not is_gradient and info(node).origin:
            self.forward.setdefault(info(node).origin, _Forward(node, wanted, False, frozenset()))

    def _wanted(self, cast: fx.Node) -> Any:
        """What it casts to: the precision of the value it names, if that is not a weight, or else what it says."""
        like = cast.args[2] if len(cast.args) > 2 else None
        named = isinstance(like, fx.Node) and like not in self.weights and _dtype(like) in FLOATS
        return _dtype(like) if named else cast.args[1]  # type: ignore[arg-type]

    def _drop(self, node: fx.Node, source: fx.Node) -> None:
        """``source`` in place of a cast without effect; a result has memory of its own."""
        if any(user.op == "output" for user in node.users):
            node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
            self._retype(node)
            return
        node.replace_all_uses_with(source)
        if val(source).dtype is not val(node).dtype:
            self.changed.add(source)
        node.graph.erase_node(node)

    def _cast(self, source: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """``source`` in ``dtype``, by a cast in front of ``reader`` if there is none yet."""
        if _dtype(source) not in FLOATS or _dtype(source) is dtype:
            return source
        if (narrow := self.narrow_of.get(source)) is not None and _dtype(narrow) is dtype:
            return narrow
        # What a gradient is due is cast where it is made, so that it travels narrow.
        record = info(source if self.due.get(source) is dtype else reader)
        apart = dtype is torch.float32 or source in self.weights
        key = (source, dtype, record.phase if apart else None)
        if key not in self.casts:
            made = NodeInfo(record.phase, record.module, forward=record.forward, made_by="precision")
            with reader.graph.inserting_before(reader):
                self.casts[key] = call(reader.graph, aten._to_copy.default, (source,), made, dtype=dtype)
        return self.casts[key]

    def _widest(self, node: fx.Node) -> torch.dtype | None:
        """What to compute in where an operator does not promote and its floats differ; None for any other."""
        floats = {_dtype(source) for source in node.all_input_nodes} & set(FLOATS)
        return torch.float32 if len(floats) > 1 and not promotes(node) else None

    def _narrow(self, node: fx.Node) -> bool:
        return _dtype(node) is self.lower

    # Nodes

    def _set_args(self, node: fx.Node, read: Callable[[fx.Node], fx.Node]) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), read)
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs = args, kwargs
            self.changed.update(source for source in node.all_input_nodes)

    def _retype(self, node: fx.Node) -> None:
        if any(source in self.changed for source in node.all_input_nodes):
            before = _dtypes(val(node))
            retype([node])
            if _dtypes(val(node)) != before:
                self.changed.add(node)


def _totals(accumulated: Iterable[fx.Node]) -> set[fx.Node]:
    """Sums of parts of a parameter's gradient that only its accumulator reads: they lose nothing on their way there."""
    found: set[fx.Node] = set()
    pending = list(accumulated)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.target is aten.add.Tensor and not info(source).forward and len(source.users) == 1:
                found.add(source)
                pending.append(source)
    return found


def _dtypes(value: Any) -> list[torch.dtype]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [item.dtype for item in values if isinstance(item, torch.Tensor)]


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = val(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(val(node).shape)
