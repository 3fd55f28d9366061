"""The statements of one section of a kernel: its positions, its loops over rows and columns, its reductions and stores.

A section of rows and columns holds a row in one block where the registers of a program have room for it, and else loops
over blocks of it: one pass for each level of reductions, and one that stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr, Integer
from torch import fx

from graphshard.codegen.triton_body import Access, Body, Buffer, Tile, start_index
from graphshard.codegen.triton_decompose import softmax_stats
from graphshard.codegen.triton_index import Index, position, positions_of, product, reshaped, variable
from graphshard.codegen.triton_ops import TYPES, Unsupported, compute_type, constant
from graphshard.codegen.triton_split import Section, Work, row_reductions

aten = torch.ops.aten

REGISTER_ELEMENTS = 49152
"""Float32 numbers that the blocks of one program may hold at once, of the 65,536 registers of a multiprocessor."""

AHEAD_BYTES = 16384
"""Of blocks that a program loads ahead, at most."""


@dataclass(frozen=True)
class Places:
    """Where a kernel finds its values: ``buffers`` those that exist, ``results`` what each materialised node or
    output is stored to, ``partials`` what the programs of a sum leave their parts in."""

    buffers: Mapping[fx.Node, Buffer]
    results: Mapping[fx.Node, Buffer]
    partials: Mapping[fx.Node, Buffer]


@dataclass(frozen=True)
class Emitted:
    """A section's statements and what the launcher must know of them."""

    body: Body
    stores: tuple[Access, ...]
    blocks: int  # tiles of full size that are live at once, at most
    passes: int  # over a row, where it does not fit a block
    counts: tuple[Expr, Expr]  # of rows and columns, or of one row of all elements


def emit_elements(body: Body, section: Section, places: Places, first: str) -> Emitted:
    """Elements in the order they have in memory; ``first`` is the text of the block's number."""
    shape_of = section.works[0].node.meta["val"]
    count = _sizes(body, shape_of.shape)
    x = position("x", count)
    wide = is_wide(places, shape_of.numel())
    if count != 1:
        body.masks["x"] = "x_ok"
        body.columns.add("x")
        body.out(f"x = {first}{'.to(tl.int64)' if wide else ''} * BLOCK + tl.arange(0, BLOCK)")
        body.out(f"x_ok = x < {body.spell(count)}")
    index = start_index(x, shape_of.shape, shape_of.stride(), body.sizes)
    stores: list[Access] = []
    sums: dict[fx.Node, list[str]] = {}
    # Values first: a result may be stored over what another one reads.
    for work, tile in [(work, body.value(work.node, index)) for work in section.works]:
        if work.kind == "store":
            stores.append(_store(body, work, places, index, tile))
        else:
            part = f"tl.sum(tl.where(x_ok, {tile.text}, 0))" if count != 1 else tile.text
            sums.setdefault(work.into, []).append(part)
    for node, parts in sums.items():
        body.out(f"tl.store({places.partials[node].name} + tl.program_id(0), {' + '.join(parts)})")
    return Emitted(body, tuple(stores), len(body.loads) + 1, 1, (Integer(1), count))


def emit_rows(body: Body, section: Section, places: Places, materialised: frozenset[fx.Node], single: bool) -> Emitted:
    """Rows and columns; ``single``: a row in one block.

    Raises:
        Unsupported: a sum over rows in a section whose rows do not fit a block.
    """
    return _Rows(body, section, places, materialised, single).emit()


class _Rows:
    def __init__(
        self, body: Body, section: Section, places: Places, materialised: frozenset[fx.Node], single: bool
    ) -> None:
        assert section.space is not None
        self.body, self.section, self.places, self.single = body, section, places, single
        self.rows, self.cols = section.space
        first = row_reductions([work.node for work in section.works], materialised)
        self.reductions = first
        self.by_columns = any(work.kind == "column" for work in section.works)
        if self.by_columns and not single:
            raise Unsupported(f"a sum over rows of {self.cols} columns: they do not fit one block")
        row_count, col_count = self._counts()
        self.row, self.col = variable("row", row_count), position("col", col_count)
        body.row = self.row
        if self.rows == 1:  # no address has it, but the blocks that are stored still do
            body.anchor = self.row
        self.row_count, self.col_count = row_count, col_count
        self.full: Index = (self.row, self.col)
        self.sums: dict[tuple[fx.Node, bool], str] = {}  # by what is summed, and whether over columns too
        self.stores: list[Access] = []
        self.passes = 0

    def emit(self) -> Emitted:
        body = self.body
        body.masks["row"] = "row_ok"
        body.masks["col"] = "col_ok"
        body.columns.add("col")
        if self.single:
            body.out("col = tl.arange(0, COLS)[None, :]")
            body.out(f"col_ok = col < {body.spell(self.col_count)}")
        self._accumulators()
        if self.by_columns:
            begin = len(body.out.text)
            body.out.depth += 1
            self._row_lines("block")
            self._columns()
            body.out.depth -= 1
            limits = f"tl.program_id(0), tl.cdiv({body.spell(self.row_count)}, ROWS), tl.num_programs(0)"
            stages = f", num_stages={1 + ahead}" if (ahead := self._blocks_ahead()) else ""
            body.out(f"for block in {'tl.range' if stages else 'range'}({limits}{stages}):")
            body.out.text.insert(begin, body.out.text.pop())
        else:
            self._row_lines("tl.program_id(0)")
            self._columns()
        self._finish()
        distinct = {access for access in body.loads if "col" in positions_of(access.address)}
        blocks = len(distinct) + 1 + sum(work.kind == "column" for work in self.section.works)
        return Emitted(body, tuple(self.stores), blocks, self.passes, (self.row_count, self.col_count))

    def _counts(self) -> tuple[Expr, Expr]:
        """Sizes of the space, from the dims of something in it."""
        of = self.body.sizes.of
        for node in (*self.reductions, *(work.into for work in self.section.works if work.kind == "column")):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            shape = source.meta["val"].shape
            for cut in range(len(shape) + 1):
                if math.prod(shape[:cut]) == self.rows and math.prod(shape[cut:]) == self.cols:
                    return _sizes(self.body, shape[:cut]), _sizes(self.body, shape[cut:])
        return of(self.rows), of(self.cols)

    def _blocks_ahead(self) -> int:
        """How many blocks of short rows are loaded ahead of the one that is added up, where too few programs run beside
        each other for all that memory could bring meanwhile. Long rows need the registers."""
        padded = max(1 << (self.cols - 1).bit_length(), 1024)
        sizes = {buffer.name: buffer.dtype.itemsize for buffer in self.places.buffers.values()}
        nbytes = padded * sum(sizes[name] for name in matrices_of(self.body.loads))
        return min(AHEAD_BYTES // nbytes, 4) if 0 < nbytes <= AHEAD_BYTES * 3 // 4 else 0

    def _row_lines(self, block: str) -> None:
        wide = ".to(tl.int64)" if is_wide(self.places, self.rows * self.cols) else ""
        self.body.out(f"row = ({block} * ROWS + tl.arange(0, ROWS)){wide}[:, None]")
        self.body.out(f"row_ok = row < {self.body.spell(self.row_count)}")

    def _columns(self) -> None:
        """The reductions, level by level, then what is stored."""
        levels = self._levels()
        full = [work for work in self.section.works if self._is_full(work)]
        last = max(levels.values(), default=0)
        for level in range(1, last + 1):
            here = [node for node in self.reductions if levels[node] == level]
            self._pass([_REDUCERS[node.target](self, node) for node in here], level == last and not full)
        if full:
            self._pass([lambda: self._work(full)], True)
        self._work([work for work in self.section.works if not self._is_full(work)])

    def _pass(self, steps: Sequence[Callable[[], Any]], last: bool) -> None:
        """Run the steps over all columns; what a step returns is run behind the loop. Every other pass goes backwards:
        it begins with what the one before it has read last, and the cache still has."""
        if self.single:
            after = [step() for step in steps]
        else:
            count = self.body.spell(self.col_count)
            backwards = self.passes % 2 == 1
            self.passes += 1
            if self.passes > 1 or not last:  # read more than once in all
                self.body.policy = "evict_first" if last else "evict_last"
            with self.body.loop(f"for start in range(0, {count}, COLS):"):
                start = f"(tl.cdiv({count}, COLS) - 1) * COLS - start" if backwards else "start"
                self.body.out(f"col = {start} + tl.arange(0, COLS)[None, :]")
                self.body.out(f"col_ok = col < {count}")
                after = [step() for step in steps]
            self.body.policy = ""
        for finish in after:
            if finish is not None:
                finish()

    def _levels(self) -> dict[fx.Node, int]:
        levels: dict[fx.Node, int] = {}
        for node in self.reductions:
            behind = row_reductions(node.all_input_nodes, self._stop())
            levels[node] = 1 + max((levels[other] for other in behind), default=0)
        return levels

    def _stop(self) -> frozenset[fx.Node]:
        return frozenset(self.places.buffers)

    def _is_full(self, work: Work) -> bool:
        return bool(work.node.meta["val"].numel() == self.rows * self.cols) and self.cols > 1

    def _index(self, work: Work) -> Index:
        shape = tuple(work.node.meta["val"].shape)
        if self._is_full(work):
            return self._at(shape)
        return reshaped((self.row,), (self.rows,), shape, self.body.sizes)

    def _at(self, shape: Sequence[int]) -> Index:
        return reshaped(self.full, (self.rows, self.cols), shape, self.body.sizes)

    def _accumulators(self) -> None:
        for work in self.section.works:
            key = (work.into, self._is_full(work))
            if work.kind != "store" and key not in self.sums:
                dtype = TYPES[compute_type(work.node.meta["val"].dtype)]
                name = self.body.name(f"{work.into.name}_sum")
                shape = "(ROWS, COLS)" if key[1] else "(ROWS, 1)"
                self.body.out(f"{name} = tl.zeros({shape}, {dtype})")
                self.sums[key] = name

    def _work(self, works: Sequence[Work]) -> None:
        """All values, then what becomes of them: a result may be stored over what another one reads."""
        indices = [self._index(work) for work in works]
        tiles = [self.body.value(work.node, index) for work, index in zip(works, indices, strict=True)]
        for work, index, tile in zip(works, indices, tiles, strict=True):
            if work.kind == "store":
                self.stores.append(_store(self.body, work, self.places, index, tile))
                continue
            full = self._is_full(work)
            mask = "row_ok & col_ok" if full else "row_ok"
            self.body.out(f"{self.sums[work.into, full]} += tl.where({mask}, {tile.text}, 0)")

    def _finish(self) -> None:
        kinds = {work.into: work.kind for work in self.section.works if work.kind != "store"}
        for node, kind in kinds.items():
            partial = self.places.partials[node]
            names = [name for (into, _), name in self.sums.items() if into is node]
            if kind == "total":
                summed = " + ".join(f"tl.sum({name})" for name in names)
                self.body.out(f"tl.store({partial.name} + tl.program_id(0), {summed})")
            else:
                at = f"{partial.name} + tl.program_id(0) * {self.body.spell(self.col_count)} + col"
                self.body.out(f"tl.store({at}, tl.sum({names[0]}, 0, keep_dims=True), col_ok)")

    def source(self, node: fx.Node) -> Tile:
        """What a reduction reduces, at each column."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return self.body.value(source, self._at(tuple(source.meta["val"].shape)))


def _sum(rows: _Rows, node: fx.Node) -> Callable[[], Any]:
    body = rows.body
    dtype = compute_type(node.meta["val"].dtype)
    if rows.single:

        def whole() -> None:
            tile = rows.source(node)
            summed = f"tl.sum(tl.where(col_ok, {tile.text}, 0), 1, keep_dims=True)"
            body.reduced[node] = body.emit(node.name, summed, dtype, False)

        return whole
    lanes = body.name(f"{node.name}_lanes")
    body.out(f"{lanes} = tl.zeros((ROWS, COLS), {TYPES[dtype]})")

    def finish() -> None:
        body.reduced[node] = body.emit(node.name, f"tl.sum({lanes}, 1, keep_dims=True)", dtype, False)

    def step() -> Callable[[], None]:
        body.out(f"{lanes} += tl.where(col_ok, {rows.source(node).text}, 0)")
        return finish

    return step


def _extreme(rows: _Rows, node: fx.Node) -> Callable[[], Any]:
    body = rows.body
    dtype = compute_type(node.meta["val"].dtype)
    most = node.target is aten.amax.default
    neutral = _neutral(dtype, most)
    name, combine = ("max", "largest") if most else ("min", "smallest")

    def reduced(x: str) -> None:
        text = f"tl.{name}({x}, 1, keep_dims=True)"
        if dtype.is_floating_point:  # as ATen: NaN if there is one, which the GPU's own instruction passes over
            missing = f"tl.max(({x} != {x}).to(tl.int32), 1, keep_dims=True)"
            text = f'tl.where({missing} > 0, float("nan"), {text})'
        body.reduced[node] = body.emit(node.name, text, dtype, False)

    if rows.single:

        def whole() -> None:
            masked = f"tl.where(col_ok, {rows.source(node).text}, {neutral})"
            reduced(body.emit(f"{node.name}_x", masked, dtype, True).text)

        return whole
    lanes = body.name(f"{node.name}_lanes")
    body.out(f"{lanes} = tl.zeros((ROWS, COLS), {TYPES[dtype]}) + {neutral}")

    def step() -> Callable[[], None]:
        body.helpers.add(combine)
        body.out(f"{lanes} = {combine}({lanes}, tl.where(col_ok, {rows.source(node).text}, {neutral}))")
        return lambda: reduced(lanes)

    return step


def _softmax_stats(rows: _Rows, node: fx.Node) -> Callable[[], Any]:
    body = rows.body
    dtype = compute_type(node.meta["val"][0].dtype)
    low = 'float("-inf")'
    # A NaN may be missing in the maximum: it is in the sum, and with that in the whole row.
    if rows.single:

        def whole() -> None:
            x = rows.source(node).text
            top = body.emit(
                f"{node.name}_top", f"tl.max(tl.where(col_ok, {x}, {low}), 1, keep_dims=True)", dtype, False
            )
            shares = f"tl.where(col_ok, tl.exp({x} - {top.text}), 0)"
            summed = body.emit(f"{node.name}_sum", f"tl.sum({shares}, 1, keep_dims=True)", dtype, False)
            body.reduced[node] = (top, summed)

        return whole
    # Milakov and Gimelshein 2018, in each lane: sums are of exp(x - top so far). A lane takes four columns, which lie
    # in one thread, so that it scales its sum once for four exponentials. One that has seen -inf alone has 0.
    tops, sums, new, base = (body.name(f"{node.name}_{part}") for part in ("tops", "sums", "new", "base"))
    body.out(f"{tops} = tl.full((ROWS, COLS // 4), {low}, {TYPES[dtype]})")
    body.out(f"{sums} = tl.zeros((ROWS, COLS // 4), {TYPES[dtype]})")

    def finish() -> None:
        top = body.emit(f"{node.name}_top", f"tl.max({tops}, 1, keep_dims=True)", dtype, False)
        scaled = f"tl.where({tops} == {top.text}, {sums}, {sums} * tl.exp({tops} - {top.text}))"
        summed = body.emit(f"{node.name}_sum", f"tl.sum({scaled}, 1, keep_dims=True)", dtype, False)
        body.reduced[node] = (top, summed)

    def step() -> Callable[[], None]:
        masked = f"tl.where(col_ok, {rows.source(node).text}, {low})"
        x = body.emit(f"{node.name}_x", f"tl.reshape({masked}, (ROWS, COLS // 4, 4))", dtype, True).text
        body.out(f"{new} = tl.maximum({tops}, tl.max({x}, 2))")
        body.out(f"{base} = tl.where({new} == {low}, 0, {new})")
        body.out(f"{sums} = {sums} * tl.exp({tops} - {base}) + tl.sum(tl.exp({x} - {base}[:, :, None]), 2)")
        body.out(f"{tops} = {new}")
        return finish

    return step


_REDUCERS: dict[Any, Callable[[_Rows, fx.Node], Callable[[], Any]]] = {
    aten.sum.dim_IntList: _sum,
    aten.amax.default: _extreme,
    aten.amin.default: _extreme,
    softmax_stats: _softmax_stats,
}


def _neutral(dtype: torch.dtype, most: bool) -> str:
    if dtype.is_floating_point:
        return constant(float("-inf") if most else float("inf"), dtype)
    if dtype is torch.bool:
        return constant(not most, dtype)
    limits = torch.iinfo(dtype)
    return constant(limits.min if most else limits.max, dtype)


def _store(body: Body, work: Work, places: Places, index: Index, tile: Tile) -> Access:
    buffer = places.results[work.into]
    if work.into is not work.node:  # a part of a packed buffer, in the order of its own elements
        shape = tuple(work.node.meta["val"].shape)
        index = reshaped(index, shape, (work.node.meta["val"].numel(),), body.sizes)
    return body.store(buffer, index, tile, work.offset)


def matrices_of(loads: Sequence[Access]) -> set[str]:
    """Names of buffers of which each row and column is read."""
    return {access.buffer for access in loads if {"row", "col"} <= positions_of(access.address)}


def _sizes(body: Body, shape: Sequence[int]) -> Expr:
    return product([body.sizes.of(size) for size in shape])


def is_wide(places: Places, numel: int) -> bool:
    """Whether offsets exceed 32 bits."""
    buffers = (*places.buffers.values(), *places.results.values())
    return max(numel, *(buffer.extent for buffer in buffers)) >= 1 << 31
