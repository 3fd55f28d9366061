"""Which kernels a region takes, and what each computes.

Sums over rows, sums of everything, packed buffers and scalar work that many elements share are **materialised**: one
launch makes them, and later ones read them. All else is computed where it is needed. The rest of a launch are
**sections**, each over one iteration space: elements in their order in memory, or rows and columns where a value is
reduced along its last dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphshard.codegen.triton_body import REDUCTIONS, first_value, is_trivial
from graphshard.codegen.triton_decompose import total
from graphshard.codegen.triton_ops import Unsupported

aten = torch.ops.aten
gs = torch.ops.graphshard

_ONE_PROGRAM = 4096
"""Elements that one program of a kernel sums as fast as many programs and another launch would."""

_LONG_ROW = 512
"""Columns of which blocks of their own are worth while, where all that elements share is something of their row."""

_CHEAP = frozenset(
    (
        *(aten.add, aten.sub, aten.rsub, aten.mul, aten.neg, aten.div, aten.sqrt, aten.rsqrt, aten.reciprocal),
        *(aten._to_copy, aten.where, aten.view, aten.clone, aten.clamp, aten.maximum, aten.minimum),
        *(aten.full, aten.scalar_tensor, aten.ones, aten.zeros, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
    )
)
"""Scalar operators that every program of a kernel may repeat."""


@dataclass(frozen=True)
class Work:
    """One thing that a section computes. ``kind``: ``store`` the value of ``node``; or add up its elements, all of them
    for a ``total``, each column for a ``column``. ``into`` is the materialised node or the output that it belongs to,
    ``offset`` the place of a packed part in it."""

    node: fx.Node
    kind: str
    into: fx.Node
    offset: int = 0


@dataclass(frozen=True)
class Section:
    """Work over one iteration space: ``space`` is (rows, columns), or None for elements, as many as the first has."""

    works: tuple[Work, ...]
    space: tuple[int, int] | None

    @property
    def numel(self) -> int:
        """Elements of the space."""
        return math.prod(self.space) if self.space else int(self.works[0].node.meta["val"].numel())


@dataclass(frozen=True)
class Split:
    """Launches in order, each of the sections of one wave, and the nodes whose values go through memory."""

    waves: tuple[tuple[Section, ...], ...]
    materialised: frozenset[fx.Node]


def split(graph: fx.Graph) -> Split:
    """How the decomposed graph of a region is computed.

    Raises:
        Unsupported: it reduces in a way that no kernel does.
    """
    outputs = list(dict.fromkeys(graph.output_node().args[0]))  # type: ignore[arg-type]
    outputs = [node for node in outputs if node.op != "placeholder"]
    needed = _reachable(outputs)
    nodes = [node for node in graph.nodes if node in needed and node.op == "call_function"]
    materialised = {node for node in nodes if _kind(node) in ("total", "column", "pack")}
    materialised |= _shared_scalars(nodes, materialised)
    waves: dict[fx.Node, int] = {}
    for node in nodes:
        waves[node] = max((waves.get(a, 0) + (a in materialised) for a in node.all_input_nodes), default=0)
    # Results that nothing reads may wait: those of one shape are then stored by one launch, which reads inputs once.
    late: dict[tuple[int, ...], int] = {}
    waiting = [n for n in outputs if n not in materialised and not row_reductions([n], materialised)]
    for node in waiting:
        shape = tuple(node.meta["val"].shape)
        late[shape] = max(late.get(shape, 0), waves[node])
    for node in waiting:
        if node.meta["val"].numel() > 1:
            waves[node] = late[tuple(node.meta["val"].shape)]
    works: dict[int, list[Work]] = {}
    for node in nodes:
        if node in materialised or node in outputs:
            works.setdefault(waves[node], []).extend(_works(node))
    return Split(tuple(tuple(_sections(works[wave], materialised)) for wave in sorted(works)), frozenset(materialised))


def space_of(node: fx.Node) -> tuple[int, int]:
    """The rows and columns of what a reduction reduces."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    cols = math.prod(source.meta["val"].shape[d] for d in _dims(node))
    return source.meta["val"].numel() // cols, cols


def row_reductions(nodes: Iterable[fx.Node], materialised: frozenset[fx.Node] | set[fx.Node]) -> list[fx.Node]:
    """The reductions along rows that ``nodes`` need, in order, those of other launches not counted."""
    found = _reachable(nodes, materialised)
    graph_order = next(iter(found)).graph.nodes if found else ()
    return [node for node in graph_order if node in found and _kind(node) == "row"]


def _kind(node: fx.Node) -> str:
    """What a node takes: ``row``, ``column`` or ``total`` for a reduction, ``pack``, or ``""``."""
    if node.target is total:
        return "total"
    if node.target is gs.pack.default:
        return "pack"
    if node.target not in REDUCTIONS or is_trivial(node):
        return ""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    large = [d for d in range(len(shape)) if shape[d] != 1]
    reduced = [d for d in large if d in _dims(node)]
    if source.meta["val"].numel() == 0:
        raise Unsupported(f"{node.target} of no elements")
    sums = node.target is aten.sum.dim_IntList
    if reduced == large and sums and source.meta["val"].numel() > _ONE_PROGRAM:
        return "total"
    if reduced == large[len(large) - len(reduced) :]:
        return "row"
    if reduced == large[: len(reduced)] and sums:
        return "column"
    raise Unsupported(
        f"{node.target} over dims {reduced} of {len(shape)}; kernels reduce the last dims or sum the first"
    )


def _dims(node: fx.Node) -> set[int]:
    source: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else ()
    count = source.meta["val"].dim()
    dims = [dims] if isinstance(dims, int) else dims or range(count)
    return {d % count for d in dims}


def _reachable(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """``nodes`` and what they are computed from; not what is behind the materialised ones among that."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    stops = set(stop)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [a for a in node.all_input_nodes if a not in stops]
    return found


def _shared_scalars(nodes: Sequence[fx.Node], materialised: set[fx.Node]) -> set[fx.Node]:
    """Scalars that larger values read and that are costly to compute: once, not once in every program."""
    costly: dict[fx.Node, bool] = {}
    for node in nodes:
        value = first_value(node)
        scalar = isinstance(value, torch.Tensor) and value.numel() == 1 and _kind(node) == ""
        inputs = node.all_input_nodes
        if scalar and all(a.op == "placeholder" or a in materialised or a in costly for a in inputs):
            small = all(first_value(a).numel() == 1 for a in inputs)
            if small:
                own = getattr(node.target, "overloadpacket", None) not in _CHEAP
                costly[node] = own or any(costly.get(a, False) for a in inputs)
    return {
        node
        for node, is_costly in costly.items()
        if is_costly and any(user in nodes and user not in costly for user in node.users)
    }


def _works(node: fx.Node) -> list[Work]:
    kind = _kind(node)
    arguments: Any = node.args
    if node.target is total:
        return [Work(part, "total", node) for part in arguments[0]]
    if kind == "pack":
        parts = zip(arguments[0], arguments[1], strict=True)
        return [Work(part, "store", node, offset) for part, offset in parts if part.meta["val"].numel()]
    if kind in ("total", "column"):
        return [Work(arguments[0], kind, node)]
    return [Work(node, "store", node)]


def _sections(works: Sequence[Work], materialised: set[fx.Node]) -> list[Section]:
    """Work that shares a space, and so its loads, goes into one section."""
    spaces: dict[tuple[int, int], list[Work]] = {}
    rest: list[Work] = []
    for work in works:
        found = {space_of(node) for node in row_reductions([work.node], materialised)}
        if work.kind == "column":
            found.add(_column_space(work))
        if len(found) > 1:
            raise Unsupported(f"{work.node.target} needs reductions of different shapes: {sorted(found)}")
        if found:
            rows, cols = found.pop()
            if work.node.meta["val"].numel() not in (rows, rows * cols):  # one element a row, spread over others
                raise Unsupported(f"{work.node.target} needs reductions of another shape: {(rows, cols)}")
            spaces.setdefault((rows, cols), []).append(work)
        else:
            rest.append(work)
    flat: dict[tuple[int, ...], list[Work]] = {}
    for work in rest:
        numel = work.node.meta["val"].numel()
        home = next((space for space in spaces if numel in (math.prod(space), space[0]) and numel > 1), None)
        if home is not None:
            spaces[home].append(work)
        elif numel:
            shape = tuple(work.node.meta["val"].shape)
            flat.setdefault(shape, []).append(work)
    return [
        *(Section(tuple(works), space) for space, works in spaces.items()),
        *(Section(tuple(works), _rows_of(works, materialised)) for works in flat.values()),
    ]


def _rows_of(works: Sequence[Work], materialised: set[fx.Node]) -> tuple[int, int] | None:
    """Rows and columns of elements that read something of their row: it is then read once for many of them, and no
    element asks by a division in which row it is. None: they read nothing of that kind."""
    values = [work.node.meta["val"] for work in works]
    *outer, cols = values[0].shape if values[0].dim() > 1 else (1, 1)
    rows = math.prod(outer)
    stored = all(work.kind == "store" and work.into is work.node for work in works)
    if rows == 1 or cols < _LONG_ROW or not stored or not all(value.is_contiguous() for value in values):
        return None
    read = [first_value(node) for node in _reachable([work.node for work in works], materialised)]
    by_row = any(isinstance(v, torch.Tensor) and v.numel() == rows and tuple(v.shape) != (cols,) for v in read)
    return (rows, cols) if by_row else None


def _column_space(work: Work) -> tuple[int, int]:
    rows, cols = space_of(work.into)
    return cols, rows  # what it sums are the rows
