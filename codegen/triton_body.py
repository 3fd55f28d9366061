"""The statements of a kernel: each value of a region, computed at a position where it is needed.

Evaluation goes from results to inputs. A view changes the position, a pointwise operator becomes one statement, an
input becomes a load at an address that :mod:`graphshard.codegen.triton_index` has simplified. Nothing else is stored.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy
import torch
from sympy import Expr, Integer
from torch import Tensor, fx

from graphshard.codegen.triton_decompose import over_count, pick, softmax_stats
from graphshard.codegen.triton_helpers import HELPERS, TYPED, called
from graphshard.codegen.triton_index import (
    At,
    Div,
    Index,
    Rem,
    Sizes,
    contiguous,
    linear,
    position,
    positions_of,
    product,
    reshaped,
    text,
    unravel,
)
from graphshard.codegen.triton_ops import (
    CASTS,
    FILLS,
    SELECTS,
    SPLITS,
    TYPES,
    VIEWS,
    Pointwise,
    Unsupported,
    compute_type,
    constant,
    divided,
    literal,
    pointwise,
)
from graphshard.dataflow import arguments
from graphshard.random_ops import threshold

aten = torch.ops.aten
gs = torch.ops.graphshard

RESERVED = (
    *("tl", "triton", "torch", "math", "range", "float", "BLOCK", "ROWS", "COLS"),
    *("x", "x_ok", "row", "row_ok", "col", "col_ok", "block", "rows", "start"),
)
"""Names that the text of a kernel has for itself."""
REDUCTIONS = (aten.sum.dim_IntList, aten.amax.default, aten.amin.default, softmax_stats)


@dataclass(frozen=True)
class Buffer:
    """A tensor that a kernel reads or writes: a pointer argument."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[Expr, ...]
    dtype: torch.dtype
    extent: int  # elements from its first to behind its last


@dataclass(frozen=True)
class Tile:
    """A value in a kernel: its text, the type it is computed in, and whether it differs from column to column."""

    text: str
    dtype: torch.dtype
    inner: bool


@dataclass
class Lines:
    """Statements at one depth of indentation."""

    depth: int
    text: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.text.append("    " * self.depth + line)


@dataclass(frozen=True)
class Access:
    """A load or a store: of which buffer, and at which offset."""

    buffer: str
    address: Expr


class Body:
    """Emits the statements of one section of a kernel.

    ``out`` takes the statements; those that do not differ from column to column go to ``before``, ahead of the loop
    over columns while there is one. ``masks`` says by which condition each position of the kernel is valid.
    """

    def __init__(self, buffers: Mapping[fx.Node, Buffer], sizes: Sizes, depth: int, taken: Sequence[str]) -> None:
        self.buffers = buffers
        self.sizes = sizes
        self.out = self.before = Lines(depth)
        self.masks: dict[str, str] = {}
        self.columns: set[str] = set()  # positions that differ from column to column
        self.loads: list[Access] = []
        self.expressions: list[Expr] = []  # all that the text has, for the sizes in them
        self.helpers: set[str] = set()
        self.reduced: dict[fx.Node, Tile | tuple[Tile, ...]] = {}  # of the rows, by now
        self.row: Expr = Integer(0)
        self.policy = ""  # of the cache, for matrices that are read or written now; "": its own
        self.anchor: Expr = Integer(0)  # 0 in every valid place: gives a stored block its shape
        self._values: dict[tuple[fx.Node, Index], Tile] = {}
        self._names = {*taken, *HELPERS, *RESERVED, *keyword.kwlist}

    @contextmanager
    def loop(self, header: str) -> Iterator[None]:
        """Statements go into a loop over columns; what it computed is forgotten behind it."""
        outer, known = self.out, dict(self._values)
        self.before, self.out = outer, Lines(outer.depth + 1)
        yield
        body, self.out = self.out, outer
        rows = {key: tile for key, tile in self._values.items() if not tile.inner}
        self._values = known | rows
        outer.text += ["    " * outer.depth + header, *body.text]

    def name(self, wanted: str) -> str:
        """A name that nothing else has."""
        wanted = re.sub(r"\W", "_", wanted)
        name, count = wanted, 1
        while name in self._names:
            name, count = f"{wanted}_{count}", count + 1
        self._names.add(name)
        return name

    def spell(self, e: Expr) -> str:
        """The text of an index expression."""
        self.expressions.append(e)
        return text(e)

    def value(self, node: fx.Node, index: Index) -> Tile:
        """The value of ``node`` at ``index``, computed once."""
        key = (node, index)
        if key not in self._values:
            self._values[key] = self._evaluate(node, index)
        return self._values[key]

    def emit(self, name: str, text: str, dtype: torch.dtype, inner: bool) -> Tile:
        """A statement that gives ``text`` a name."""
        self.helpers |= called(text)
        name = self.name(name)
        (self.out if inner else self.before)(f"{name} = {_bare(text)}")
        return Tile(name, dtype, inner)

    def mask(self, e: Expr) -> str:
        """The condition under which a position is valid."""
        return " & ".join(self.masks[name] for name in sorted(positions_of(e)) if name in self.masks)

    def store(self, buffer: Buffer, index: Index, tile: Tile, offset: int = 0) -> Access:
        """Write a value to ``buffer`` at ``index``."""
        address = linear(index, buffer.strides) + offset + self.anchor
        mask = self.mask(address)
        value = self.cast(tile, buffer.dtype)
        pointer = f"{buffer.name} + {self.spell(address)}" if address != 0 else buffer.name
        self.out(f"tl.store({pointer}, {value}{', ' + mask if mask else ''}{self._cached(address)})")
        return Access(buffer.name, address)

    def cast(self, tile: Tile, dtype: torch.dtype) -> str:
        """The value as another type."""
        if tile.dtype is dtype:
            return tile.text
        if dtype is torch.bool:
            return f"({tile.text} != 0)"
        if tile.dtype is not torch.float32 and compute_type(dtype) is not dtype:  # as ATen: by way of float32
            return f"{tile.text}.to(tl.float32).to({TYPES[dtype]})"
        return f"{tile.text}.to({TYPES[dtype]})"

    def _evaluate(self, node: fx.Node, index: Index) -> Tile:
        target: Any = node.target
        if node in self.buffers:
            return self._load(node.name, self.buffers[node], index)
        if node in self.reduced:
            return self._of_row(node, index, self.reduced[node])
        if target in REDUCTIONS and is_trivial(node):
            return self._trivial(node, index)
        if target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if source in self.reduced:
                tiles = self.reduced[source]
                return self._of_row(source, index, tiles[int(node.args[1])])  # type: ignore[index, arg-type]
            if source.target in SPLITS:
                return self.value(*_split_source(source, int(node.args[1]), index))  # type: ignore[arg-type]
            raise _refusal(source.target)
        if target in VIEWS:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self.value(source, self._source_index(node, index))
        if target in FILLS:
            return self._fill(node)
        if target is aten.arange.default:
            (at,) = index
            inner = bool(positions_of(at) & self.columns)
            return self.emit(node.name, f"({self.spell(at)})", torch.int64, inner) if at != 0 else _number(0)
        if target is gs.dropout_mask.default:
            return self._dropout_mask(node, index)
        if target is over_count:
            return self._over_count(node, index)
        if target is pick:
            return self._pick(node, index)
        if target in SELECTS:
            return self._select(node, index)
        found = pointwise(target)
        if found is not None:
            return self._pointwise(node, found, index)
        raise _refusal(target)

    def _load(self, name: str, buffer: Buffer, index: Index) -> Tile:
        address = linear(index, buffer.strides)
        self.loads.append(Access(buffer.name, address))
        mask = self.mask(address)
        pointer = f"{buffer.name} + {self.spell(address)}" if address != 0 else buffer.name
        dtype = compute_type(buffer.dtype)
        options = self._cached(address)
        loaded = f"tl.load({pointer}, {mask}, other=0{options})" if mask else f"tl.load({pointer}{options})"
        if dtype is not buffer.dtype:
            loaded += f".to({TYPES[dtype]})"
        return self.emit(f"{name}_at", loaded, dtype, bool(positions_of(address) & self.columns))

    def _cached(self, address: Expr) -> str:
        """The option that says how long the cache keeps what is at ``address``."""
        is_matrix = {"row", "col"} <= positions_of(address)
        return f', eviction_policy="{self.policy}"' if self.policy and is_matrix else ""

    def _of_row(self, node: fx.Node, index: Index, tile: Any) -> Tile:
        value = first_value(node)
        at = linear(index, contiguous([self.sizes.of(n) for n in value.shape]))
        if at not in (self.row, self.row - self.anchor):
            raise Unsupported(f"{node.target}, a reduction, is read at another row than the one that computes it")
        assert isinstance(tile, Tile)
        return tile

    def _trivial(self, node: fx.Node, index: Index) -> Tile:
        """A reduction along dims of size 1."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape = tuple(node.meta["val"].shape)
        return self.value(source, reshaped(index, shape, source.meta["val"].shape, self.sizes))

    def _fill(self, node: fx.Node) -> Tile:
        value: Any = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1}.get(_packet(node.target))
        if value is None:
            value = node.args[0 if _packet(node.target) == "scalar_tensor" else 1]
        dtype = compute_type(node.meta["val"].dtype)
        return Tile(constant(value, dtype), dtype, False)

    def _dropout_mask(self, node: fx.Node, index: Index) -> Tile:
        """Dropout's mask. Where fours of columns are the words of one counter, their block is computed once."""
        given = arguments(node)
        shape = [self.sizes.of(size) for size in node.meta["val"].shape]
        at = linear(index, contiguous(shape))
        drawn = "drawn_in_fours" if self._runs_in_fours(at) else "drawn"
        seed = self._operand(node, given["seed"], index)
        limit = threshold(given["p"])
        kept = f">= {limit}" if limit < 2**32 else "< 0"  # none, by a number that a word can be compared with
        text = f"({drawn}({seed.text}, {self.spell(at)}) {kept})"
        return self.emit(node.name, text, torch.bool, bool(positions_of(at) & self.columns))

    def _runs_in_fours(self, at: Expr) -> bool:
        """Whether in each row the numbers ``at`` are consecutive and begin with a multiple of 4."""
        columns = [found for found in at.atoms(At) if found.args[0].name in self.columns]
        if len(columns) != 1 or self.sizes.value(columns[0].args[1]) < 4:
            return False
        begin = sympy.expand(at - columns[0])
        steps = [term.as_independent(At, Div, Rem)[0] for term in sympy.Add.make_args(begin)]
        return not positions_of(begin) & self.columns and all(self.sizes.value(step) % 4 == 0 for step in steps)

    def _pick(self, node: fx.Node, index: Index) -> Tile:
        source, chosen = node.args
        assert isinstance(source, fx.Node) and isinstance(chosen, fx.Node)
        at = self.value(chosen, index)
        if not at.text.isidentifier():
            at = self.emit(f"{node.name}_index", at.text, at.dtype, at.inner)
        if at.inner:
            self.columns.add(at.text)
        where = position(at.text, self.sizes.of(source.meta["val"].shape[-1]))
        return self.value(source, (*(index if source.meta["val"].dim() > 1 else ()), where))

    def _over_count(self, node: fx.Node, index: Index) -> Tile:
        tile = self._operand(node, node.args[0], index)
        sizes: Any = node.args[1]
        count = self.spell(product([self.sizes.of(size) for size in sizes]))
        return self.emit(
            node.name, divided(tile.text, f"tl.cast({count}, {TYPES[tile.dtype]})", tile.dtype), tile.dtype, tile.inner
        )

    def _select(self, node: fx.Node, index: Index) -> Tile:
        dtype = compute_type(node.meta["val"].dtype)
        if _packet(node.target) == "masked_fill":
            kept, mask, new = node.args
            arguments = (mask, new, kept)
        else:
            arguments = node.args  # type: ignore[assignment]
        mask_tile = self._operand(node, arguments[0], index)
        tiles = [self._operand(node, argument, index, dtype) for argument in arguments[1:]]
        spelled = ", ".join(self.cast(tile, dtype) for tile in tiles)
        inner = mask_tile.inner or any(tile.inner for tile in tiles)
        return self.emit(node.name, f"tl.where({self.cast(mask_tile, torch.bool)}, {spelled})", dtype, inner)

    def _pointwise(self, node: fx.Node, found: Pointwise, index: Index) -> Tile:
        value: Tensor = node.meta["val"]
        result = compute_type(value.dtype)
        operands = [argument for argument in node.args if isinstance(argument, fx.Node | int | float | bool)]
        if node.target in CASTS:
            return self._cast(node, index)
        dtype = result
        if found.by_operands:
            types: list[Any] = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operands]
            dtype = compute_type(
                torch.result_type(*types) if len(types) == 2 else reduce(torch.promote_types, [types[0].dtype])
            )
        formula = found.formula if isinstance(found.formula, str) else found.formula(node, dtype)
        exact = any(f"{helper}(" in formula for helper in TYPED)
        tiles = [self._operand(node, argument, index, dtype, exact) for argument in node.args]
        spelled = [self.cast(tile, dtype) for tile in tiles]
        if formula == "{0}":
            return tiles[0]
        inner = any(tile.inner for tile in tiles)
        return self.emit(node.name, formula.format(*spelled), torch.bool if found.by_operands else result, inner)

    def _cast(self, node: fx.Node, index: Index) -> Tile:
        """Rounds to the result's type, where a value that only passes through stays as precise as it is computed."""
        to = node.meta["val"].dtype
        source = node.args[0]
        tile = self._operand(node, source, index)
        wide = compute_type(to)
        same = isinstance(source, fx.Node) and source.meta["val"].dtype is to
        if same:
            return tile
        spelled = self.cast(tile, to)
        if wide is not to:
            spelled = f"{spelled}.to({TYPES[wide]})"
        return tile if spelled == tile.text else self.emit(node.name, spelled, wide, tile.inner)

    def _operand(
        self, node: fx.Node, argument: Any, index: Index, dtype: torch.dtype | None = None, exact: bool = True
    ) -> Tile:
        if isinstance(argument, fx.Node):
            shape = argument.meta["val"].shape
            return self.value(argument, _broadcast(index, shape))
        if isinstance(argument, bool | int | float) and dtype is not None:
            return Tile((constant if exact else literal)(argument, dtype), dtype, False)
        return Tile("", dtype or torch.int64, False)  # an option, which the formula reads from the node

    def _source_index(self, node: fx.Node, index: Index) -> Index:
        arguments: Any = node.args
        source = arguments[0]
        shape = tuple(source.meta["val"].shape)
        dims = len(shape)
        name = _packet(node.target)
        if name == "permute":
            order = [d % dims for d in arguments[1]]
            return tuple(index[order.index(d)] for d in range(dims))
        if name in ("transpose", "t"):
            if dims < 2:
                return index
            a, b = (0, 1) if name == "t" else (arguments[1] % dims, arguments[2] % dims)
            swapped = list(index)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            return tuple(swapped)
        if name == "expand":
            return _broadcast(index, shape)
        if name == "slice":
            given = dict(enumerate(arguments))
            dim, start, step = given.get(1, 0) % dims, given.get(2) or 0, given.get(4, 1)
            start = max(start + shape[dim], 0) if start < 0 else start
            moved = list(index)
            moved[dim] = moved[dim] * step + start
            return tuple(moved)
        if name == "select":
            dim, at = arguments[1] % dims, arguments[2]
            return (*index[:dim], Integer(at % shape[dim]), *index[dim:])
        return reshaped(index, tuple(node.meta["val"].shape), shape, self.sizes)


def start_index(flat: Expr, shape: Sequence[int], strides: Sequence[int], sizes: Sizes) -> Index:
    """The position whose number is ``flat`` when elements are counted in the order they have in memory."""
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    ordered = unravel(flat, [sizes.of(shape[d]) for d in order])
    return tuple(ordered[order.index(d)] for d in range(len(shape)))


def _bare(text: str) -> str:
    """Without parentheses around all of it."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:-1] if character == ")" and text.startswith("(") and at == len(text) - 1 else text
    return text


def is_trivial(node: fx.Node) -> bool:
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and node.target is not softmax_stats
        and source.meta["val"].numel() == node.meta["val"].numel()
    )


def _split_source(split: fx.Node, which: int, index: Index) -> tuple[fx.Node, Index]:
    arguments: Any = split.args
    source, how, *rest = arguments
    shape = source.meta["val"].shape
    dim = (rest[0] if rest else 0) % len(shape)
    start = which * how if isinstance(how, int) else sum(how[:which])
    return source, (*index[:dim], index[dim] + start, *index[dim + 1 :])


def _broadcast(index: Index, shape: Sequence[int]) -> Index:
    """The position in an operand of ``shape`` of what is at ``index`` of the result."""
    aligned = index[len(index) - len(shape) :]
    return tuple(Integer(0) if size == 1 else at for at, size in zip(aligned, shape, strict=True))


def first_value(node: fx.Node) -> Tensor:
    value: Any = node.meta["val"]
    first: Tensor = value[0] if isinstance(value, tuple) else value
    return first


def _refusal(target: Any) -> Unsupported:
    name = str(target)
    if name.startswith("graphshard.") and any(argument.name == "key" for argument in target._schema.arguments):
        return Unsupported(f"{name} draws from torch's generator, whose numbers a kernel cannot reproduce")
    return Unsupported(f"{name} is no operator that kernels have")


def _packet(target: Any) -> str:
    return str(target).split(".")[1]


def _number(value: int) -> Tile:
    return Tile(constant(value, torch.int64), torch.int64, False)
