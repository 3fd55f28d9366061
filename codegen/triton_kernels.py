"""Kernels and their launcher as Python source: what a file of generated code holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sympy import Expr, Integer
from torch import fx

from graphshard.codegen.triton_body import RESERVED, Access, Body, Buffer
from graphshard.codegen.triton_helpers import HELPERS
from graphshard.codegen.triton_index import Sizes, positions_of, product, symbols_of, text
from graphshard.codegen.triton_ops import compute_type
from graphshard.codegen.triton_sections import (
    REGISTER_ELEMENTS,
    Emitted,
    Places,
    emit_elements,
    emit_rows,
    is_wide,
    matrices_of,
)
from graphshard.codegen.triton_split import Section, Split

BLOCK = 1024  # elements a program: 8 a thread, so that loads and stores are 16 bytes wide or more
LOOP_COLS = 4096  # columns a step, where a row does not fit the registers
AGAIN_BYTES = 128 << 10  # of a row that is read again: so many programs as two on each multiprocessor share the cache
MAX_PROGRAMS = 256  # of a kernel that sums over rows: two for each multiprocessor, each writing one row of partial sums
LOOPS = ((1024, 8), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32))  # columns and warps to try
TWICE_COLS = 4096  # columns of a sum over rows of which a multiprocessor has registers for two programs
SECTIONS = 8  # spaces that one kernel serves: its programs look up theirs one by one

_LAUNCHER = frozenset(("programs", "cols", "rows", "meta"))
"""Names that lines of the launcher have for themselves."""
_DERIVED = re.compile(r"(n|end_)\d+|.*_(s\d+|out|partial\d*s?)")
"""Names of sizes and of the ends of spaces, and those made of others': strides, results and parts of sums."""


@dataclass
class Launch:
    """One kernel, as text, and the lines that launch it."""

    kernel: str
    lines: list[str]
    choice: str
    loads: list[tuple[int, Access]] = field(default_factory=list)  # by number of section
    stores: list[tuple[int, Access, bool]] = field(default_factory=list)  # and whether each thread owns what it stores


class Writer:
    """Writes the file of one region."""

    def __init__(self, name: str, graph: fx.Graph, plan: Split, in_place: Mapping[int, int], autotune: bool) -> None:
        self.name, self.graph, self.plan, self.autotune = name, graph, plan, autotune
        self.sizes = Sizes()
        self.helpers: set[str] = set()
        self.outputs: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.names = _names(self.inputs)
        self.overwritten: dict[fx.Node, fx.Node] = {}
        for at, source in in_place.items():
            self.overwritten.setdefault(self.outputs[at], self.inputs[source])
        self.copied: set[fx.Node] = set()  # overwritten by a copy behind the kernels, since other loads come later

    def source(self) -> tuple[str, str]:
        """The file, and what was chosen."""
        launches = self._launches()
        late = self._unsafe(launches)
        while late:  # those get a tensor of their own first
            self.copied |= late
            launches = self._launches()
            late = self._unsafe(launches)
        header = f'"""Region {self.name}: what graphshard fused into {_count(len(launches), "kernel")}."""\n'
        imports = "\nimport torch\nimport triton\nimport triton.language as tl\n"
        helpers = "".join("\n" + HELPERS[name] for name in HELPERS if name in self.helpers)
        kernels = "".join(f"\n\n{launch.kernel}" for launch in launches)
        launcher = "\n".join(self._launcher(launches))
        choice = "; ".join(launch.choice for launch in launches)
        return f"{header}{imports}{helpers}{kernels}\n\n{launcher}\n", choice

    def _launches(self) -> list[Launch]:
        self.sizes = Sizes()
        self.helpers = set()
        for node in self.inputs:
            if isinstance(node.meta["val"], torch.Tensor):
                self.sizes.learn(self.names[node], node.meta["val"].shape)
        self.buffers = {
            node: self._buffer(node, self.names[node], given=True)
            for node in self.inputs
            if isinstance(node.meta["val"], torch.Tensor)
        }
        self.results: dict[fx.Node, Buffer] = {}
        self.joined: dict[str, tuple[fx.Node, ...]] = {}  # sums whose parts lie in one tensor, by its name
        self.allocations: list[str] = []
        launches = []
        number = 0
        for wave in self.plan.waves:
            made: dict[fx.Node, None] = {}  # in order, or the source would not be the same every time
            flat = [section for section in wave if section.space is None]
            groups = [[section] for section in wave if section.space is not None]
            groups += [flat[at : at + SECTIONS] for at in range(0, len(flat), SECTIONS)]
            partials: dict[fx.Node, list[str]] = {}
            for group in groups:
                launches.append(self._launch(group, number, partials))
                made |= dict.fromkeys(work.into for section in group for work in section.works)
                number += 1
            launches[-1].lines += self._finished(partials)
            self.buffers |= {node: self.results[node] for node in made if node in self.plan.materialised}
        return launches

    def _launch(self, group: Sequence[Section], number: int, partials: dict[fx.Node, list[str]]) -> Launch:
        kernel = f"{self.name}_kernel{number}" if number else f"{self.name}_kernel"
        lines: list[str] = []
        own: dict[fx.Node, Buffer] = {}
        for section in group:
            for work in section.works:
                if work.kind == "store":
                    lines += self._allocate(work.into)
                elif work.into not in own:
                    partial = f"{_identifier(work.into.name)}_partial{number or ''}"
                    value = work.into.meta["val"]
                    own[work.into] = Buffer(partial, (), (), compute_type(value.dtype), 0)
                    partials.setdefault(work.into, []).append(partial)
        places = Places(self.buffers, self.results, own)
        if group[0].space is not None:
            return self._rows(group[0], kernel, places, lines)
        return self._elements(group, kernel, places, lines)

    def _elements(self, group: Sequence[Section], kernel: str, places: Places, lines: list[str]) -> Launch:
        counts = [self._count(section) for section in group]
        body_lines: list[str] = []
        emitted: list[Emitted] = []
        expressions: list[Expr] = []
        for at, section in enumerate(group):
            alone = len(group) == 1
            body = Body(self.buffers, self.sizes, 1 if alone else 2, self._taken())
            first = "tl.program_id(0)" if alone or at == 0 else f"(tl.program_id(0) - end_{at - 1})"
            emitted.append(emit_elements(body, section, places, first))
            if not alone:
                ends = f"end_{at - 1} + " if at else ""
                body_lines.insert(at, f"    end_{at} = {ends}tl.cdiv({text(counts[at])}, BLOCK)")
                keyword = (
                    f"{'if' if at == 0 else 'elif'} tl.program_id(0) < end_{at}:" if at < len(group) - 1 else "else:"
                )
                body_lines.append(f"    {keyword}")
                expressions.append(counts[at])
            body_lines += body.out.text
        if len(group) > 1:
            del body_lines[len(group) - 1]  # the last one ends where the grid does
        scalar = all(count == 1 for count in counts)
        grid = " + ".join(f"triton.cdiv({text(count)}, {{block}})" for count in counts)
        block = 32 if scalar else BLOCK
        warps = 1 if scalar else 4
        lines += self._partial_lines(places, "programs", "(programs,)", group)
        options = {"BLOCK": str(block)} if any("BLOCK" in line for line in body_lines) else {}
        launch = self._assemble(kernel, body_lines, emitted, expressions, places, options, warps)
        programs = str(len(group)) if scalar else grid.replace("{block}", str(block))
        tuned = self.autotune and not scalar and not places.partials
        if tuned:
            meta = grid.replace("{block}", 'meta["BLOCK"]')
            configs = [({"BLOCK": b}, w) for b in (512, 1024, 2048, 4096) for w in (4, 8)]
            self._tune(launch, configs)
            lines.append(self._call(kernel, launch, f"lambda meta: ({meta},)", {}, None))
        else:
            if places.partials:
                lines.insert(len(lines) - len(places.partials), f"programs = {programs}")
            target = "(programs,)" if places.partials else f"({programs},)"
            lines.append(self._call(kernel, launch, target, options, str(warps)))
        launch.lines = lines
        what = _count(len(group), "space") + ", " if len(group) > 1 else ""
        fixed = _count(len(group), "program") if scalar else f"blocks of {block} elements, {warps} warps"
        launch.choice = f"{kernel}: {what}{'autotuned' if tuned else fixed}"
        for at, one in enumerate(emitted):
            launch.loads += [(at, access) for access in one.body.loads]
            launch.stores += [(at, access, scalar or counts[at] != 1) for access in one.stores]
        return launch

    def _rows(self, section: Section, kernel: str, places: Places, lines: list[str]) -> Launch:
        assert section.space is not None
        rows, cols = section.space
        padded = 1 << (cols - 1).bit_length()
        single = self._emit_rows(section, places, single=True)
        by_columns = any(work.kind == "column" for work in section.works)
        double = any(buffer.dtype is torch.float64 for buffer in self.buffers.values())
        fits = padded * single.blocks * (2 if double else 1) <= REGISTER_ELEMENTS
        emitted = single if fits else self._emit_rows(section, places, single=False)
        row_count, col_count = emitted.counts
        step, looping_warps = self._steps(emitted, cols)
        options, warps = {"ROWS": "1", "COLS": str(step)}, str(looping_warps)
        if fits:
            lines.append(f"cols = triton.next_power_of_2({text(col_count)})")
            lines.append("rows = max(1, 1024 // cols)")
            options, warps = {"ROWS": "rows", "COLS": "cols"}, "min(max(rows * cols // 512, 4), 16)"
        programs = f"triton.cdiv({text(row_count)}, rows)" if fits else text(row_count)
        if by_columns:
            programs = f"min({programs}, {MAX_PROGRAMS if padded <= TWICE_COLS else MAX_PROGRAMS // 2})"
        if places.partials:
            lines.append(f"programs = {programs}")
            columns = {work.into for work in section.works if work.kind == "column"}
            shapes = {n: f"programs, {text(col_count)}" if n in columns else "programs," for n in places.partials}
            lines += self._partials(places, shapes)
            programs = "programs"
        body_lines = emitted.body.out.text
        launch = self._assemble(kernel, body_lines, [emitted], [], places, options, 0)
        tuned = self.autotune and not places.partials
        if tuned:
            self._tune_rows(launch, rows, padded, fits)
            grid = f'lambda meta: (triton.cdiv({text(row_count)}, meta["ROWS"]),)'
            lines[:] = [line for line in lines if not line.startswith("rows = ")]
            lines.append(self._call(kernel, launch, grid, {"COLS": "cols"} if fits else {}, None))
        else:
            lines.append(self._call(kernel, launch, f"({programs},)", options, warps))
        launch.lines = lines
        shape = f"a row of {cols} in one block" if fits else f"a row of {cols} in steps of {step}"
        launch.choice = f"{kernel}: {'autotuned, ' if tuned else ''}{shape}, {rows} rows"
        if not tuned:
            group = max(1, 1024 // padded) if fits else 1
            used = min(max(group * padded // 512, 4), 16) if fits else looping_warps
            launch.choice += f", {group} a program, {used} warps"
        launch.loads = [(0, access) for access in emitted.body.loads]
        launch.stores = [(0, access, "col" in positions_of(access.address)) for access in emitted.stores]
        return launch

    def _steps(self, emitted: Emitted, cols: int) -> tuple[int, int]:
        """Columns a step and warps of a program that loops over a row. What is read once is hidden best behind many
        programs. What is read again is still in the cache if few run at once: two of as many warps as there may be on
        each multiprocessor, or, by the registers that longer steps take, one."""
        if emitted.passes < 2:
            return LOOP_COLS, 8
        sizes = {buffer.name: buffer.dtype.itemsize for buffer in self.buffers.values()}
        row_bytes = cols * sum(sizes[name] for name in matrices_of(emitted.body.loads))
        return LOOP_COLS * (2 if row_bytes <= AGAIN_BYTES else 4), 32

    def _emit_rows(self, section: Section, places: Places, single: bool) -> Emitted:
        body = Body(self.buffers, self.sizes, 1, self._taken())
        return emit_rows(body, section, places, self.plan.materialised, single)

    def _assemble(
        self,
        kernel: str,
        lines: Sequence[str],
        emitted: Sequence[Emitted],
        expressions: Sequence[Expr],
        places: Places,
        options: Mapping[str, str],
        warps: int,
    ) -> Launch:
        body = "\n".join(lines)
        numel = max(int(self.sizes.value(one.counts[0] * one.counts[1])) for one in emitted)
        needed = [e for one in emitted for e in one.body.expressions]
        pointers = [name for name in self._pointers(places) if re.search(rf"\b{name}\b", body)]
        symbols = [symbol.name for symbol in symbols_of([*needed, *expressions])]
        self.helpers |= {name for one in emitted for name in one.body.helpers}
        if is_wide(places, numel):  # a product of sizes then needs more bits than each has
            body = "\n".join([*(f"    {name} = tl.cast({name}, tl.int64)" for name in symbols), body])
        parameters = [*pointers, *symbols, *(f"{option}: tl.constexpr" for option in options)]
        text = f"@triton.jit\ndef {kernel}({', '.join(parameters)}):\n{body}\n"
        launch = Launch(text, [], "")
        self._arguments = [*pointers, *symbols]
        return launch

    def _call(self, kernel: str, launch: Launch, grid: str, options: Mapping[str, str], warps: str | None) -> str:
        # Products are not fused with sums: an operator then gives the same bits in whichever region it lands.
        chosen = [*(f"{key}={value}" for key, value in options.items())]
        if warps is not None:
            chosen.append(f"num_warps={warps}")
        return f"{kernel}[{grid}]({', '.join([*self._arguments, *chosen, 'enable_fp_fusion=False'])})"

    def _tune(self, launch: Launch, configs: Sequence[tuple[dict[str, int], int]]) -> None:
        written = sorted({access.buffer for _, access, _ in launch.stores} & {b.name for b in self.buffers.values()})
        names = [name for name in self._arguments if name in {s.name for s in self.sizes.values}]
        lines = [f"        triton.Config({options}, num_warps={warps})," for options, warps in configs]
        restore = f", restore_value={written}" if written else ""
        head = [
            "@triton.autotune(",
            "    configs=[",
            *lines,
            "    ],",
            f"    key={names}{restore},",
            "    cache_results=True,",
            ")",
        ]
        launch.kernel = "\n".join(head) + "\n" + launch.kernel

    def _tune_rows(self, launch: Launch, rows: int, padded: int, fits: bool) -> None:
        if fits:
            groups = [g for g in (1, 2, 4, 8) if g * padded <= 8192] or [1]
            configs = [({"ROWS": g}, w) for g in groups for w in (4, 8, 16)]
        else:
            configs = [({"ROWS": 1, "COLS": c}, w) for c, w in LOOPS]
        self._tune(launch, configs)

    def _partials(self, places: Places, shapes: Mapping[fx.Node, str]) -> list[str]:
        """Where the programs of a kernel leave parts of sums; those of one type lie in one tensor, for one sum."""
        first, *others = places.partials.values()
        if not others or len(set(shapes.values())) > 1 or any(p.dtype is not first.dtype for p in others):
            return [self._empty(partial, f"({shapes[node]})") for node, partial in places.partials.items()]
        joined = f"{first.name}s"
        names = ", ".join(partial.name for partial in places.partials.values())
        self.joined[joined] = tuple(places.partials)
        make = f"torch.empty(({len(shapes)}, {shapes[next(iter(shapes))]}), {self._options(first.dtype)})"
        return [f"{joined} = {make}", f"{names} = {joined}.unbind()"]

    def _finished(self, partials: Mapping[fx.Node, Sequence[str]]) -> list[str]:
        """Sums of the programs' parts: small, and a sum is what ATen does well."""
        lines = []
        alone = {node for node, names in partials.items() if len(names) == 1}
        summed: set[fx.Node] = set()
        for joined, nodes in self.joined.items():
            if alone.issuperset(nodes):
                parts = [name for node in nodes for name in partials[node]]
                lines.append(f"{', '.join(parts)} = {joined}.sum(1).unbind()")
                summed |= set(nodes)
        self.joined.clear()
        for node, names in partials.items():
            value = node.meta["val"]
            columns = any(
                work.kind == "column" and work.into is node
                for wave in self.plan.waves
                for section in wave
                for work in section.works
            )
            result = " + ".join(name if node in summed else f"{name}.sum({'0' if columns else ''})" for name in names)
            shape = self._shape(value.shape)
            result = f"({result})" if len(names) > 1 else result
            target = self._result_name(node)
            view = "" if not columns and value.dim() == 0 else f".view({shape})"
            lines.append(f"{target} = {result}{view}")
            self.results[node] = self._buffer(node, target, given=False, contiguous=True)
        return lines

    def _allocate(self, node: fx.Node) -> list[str]:
        """Where the node is stored: the input that it overwrites, or a new tensor."""
        if node in self.results:
            return []
        home = self.overwritten.get(node)
        if home is not None and node not in self.copied:
            self.results[node] = self.buffers[home]
            return []
        name = self._result_name(node)
        buffer = self._buffer(node, name, given=False)
        self.results[node] = buffer
        value = node.meta["val"]
        if node.target is torch.ops.graphshard.pack.default:
            parts: Any = node.args[0]
            packed = sum(part.meta["val"].numel() for part in parts)
            make = "empty" if packed == value.numel() else "zeros"  # gaps are zero
            return [f"{name} = torch.{make}({self._shape(value.shape)}, {self._options(buffer.dtype)})"]
        if value.is_contiguous():
            return [f"{name} = torch.empty({self._shape(value.shape)}, {self._options(buffer.dtype)})"]
        strides = _tuple([text(self._exact(s)) for s in value.stride()])
        return [f"{name} = torch.empty_strided({self._shape(value.shape)}, {strides}, {self._options(buffer.dtype)})"]

    def _exact(self, stride: int) -> Expr:
        return self.sizes.of(stride) if stride > 1 else Integer(stride)

    def _empty(self, partial: Buffer, shape: str) -> str:
        return f"{partial.name} = torch.empty({shape}, {self._options(partial.dtype)})"

    def _partial_lines(self, places: Places, programs: str, shape: str, group: Sequence[Section]) -> list[str]:
        lines = []
        for node, partial in places.partials.items():
            everywhere = all(any(work.into is node for work in section.works) for section in group)
            make = "empty" if everywhere else "zeros"
            lines.append(f"{partial.name} = torch.{make}({shape}, {self._options(partial.dtype)})")
        return lines

    def _options(self, dtype: torch.dtype) -> str:
        like = next(self.names[node] for node in self._tensors())
        return f"dtype={dtype}, device={like}.device"

    def _tensors(self) -> list[fx.Node]:
        """The inputs, those of more than one element first: scalars may be on another device."""
        tensors = [node for node in self.inputs if isinstance(node.meta["val"], torch.Tensor)]
        return sorted(tensors, key=lambda node: node.meta["val"].numel() <= 1)

    def _shape(self, shape: Sequence[int]) -> str:
        return _tuple([text(self.sizes.of(size)) for size in shape])

    def _buffer(self, node: fx.Node, name: str, given: bool, contiguous: bool = False) -> Buffer:
        value = node.meta["val"]
        stride = torch.empty(value.shape, device="meta").stride() if contiguous else value.stride()
        dtype = value.dtype
        strides = self.sizes.strides(name, value.shape, stride, given)
        extent = 1 + sum((size - 1) * step for size, step in zip(value.shape, stride, strict=True))
        return Buffer(name, tuple(value.shape), strides, dtype, extent)

    def _result_name(self, node: fx.Node) -> str:
        return f"{_identifier(node.name)}_out"

    def _taken(self) -> list[str]:
        buffers = [b.name for b in (*self.buffers.values(), *self.results.values())]
        return [*buffers, *(symbol.name for symbol in self.sizes.values)]

    def _pointers(self, places: Places) -> list[str]:
        buffers = (*places.buffers.values(), *places.results.values(), *places.partials.values())
        return list(dict.fromkeys(buffer.name for buffer in buffers))

    def _count(self, section: Section) -> Expr:
        return product([self.sizes.of(n) for n in section.works[0].node.meta["val"].shape])

    def _unsafe(self, launches: Sequence[Launch]) -> set[fx.Node]:
        """Outputs that may not overwrite their input within a kernel: somebody else reads it at that time or later."""
        found = set()
        for node, home in self.overwritten.items():
            if node in self.copied or node not in self.results:
                continue
            name = self.names[home]
            writes = [
                (k, s, access, owned)
                for k, launch in enumerate(launches)
                for s, access, owned in launch.stores
                if access.buffer == name
            ]
            for k, launch in enumerate(launches):
                for s, access in launch.loads:
                    if access.buffer != name:
                        continue
                    for k2, s2, write, owned in writes:
                        same = (k, s) == (k2, s2) and owned and access.address == write.address
                        if not (k < k2 or same):
                            found.add(node)
        return found

    def _launcher(self, launches: Sequence[Launch]) -> list[str]:
        body: list[str] = [line for launch in launches for line in launch.lines]
        results = []
        for node in self.outputs:
            home = self.overwritten.get(node)
            if node.op == "placeholder":
                results.append(self.names[node])
            elif home is not None and self.results[node].name == self.names[home]:
                results.append(self.names[home])
            else:
                results.append(self.results[node].name)
        for node, home in self.overwritten.items():
            value = self.names[node] if node.op == "placeholder" else self.results[node].name
            if value != self.names[home]:
                body.append(f"{self.names[home]}.copy_({value})")
                results = [self.names[home] if n is node else r for n, r in zip(self.outputs, results, strict=True)]
        used = "\n".join(body)
        sizes = [
            f"{symbol.name} = {where}"
            for symbol, where in self.sizes.sources.items()
            if re.search(rf"\b{symbol.name}\b", used)
        ]
        result = ", ".join(results)
        lines = [f"def {self.name}({', '.join(self.names.values())}):"]
        return [*lines, *(f"    {line}" for line in (*sizes, *body, f"return {result}"))]


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _names(inputs: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """A parameter for each input, after the node, that neither a kernel nor the launcher has for something else."""
    names: dict[fx.Node, str] = {}
    for node in inputs:
        name = _identifier(node.name)
        while name in {*names.values(), *RESERVED, *HELPERS, *_LAUNCHER} or _DERIVED.fullmatch(name):
            name = f"{name}_in"
        names[node] = name
    return names


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")
