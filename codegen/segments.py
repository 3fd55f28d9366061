"""Segments as readable Python: each value is deleted after its last use, gradients are written where they belong.

A gradient has a destination: its view of the bucket's flat buffer. The first micro-batch overwrites it
(``mm(out=view)``), later ones accumulate into it (``view.addmm_``), so neither packing nor accumulating passes over
memory once more. Of an embedding's gradient only the rows that were looked up are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphshard.codegen.accumulation import Sums, adds_rows, placeable
from graphshard.codegen.blocks import blocks_of
from graphshard.codegen.expressions import arguments_of, call, out_variant, spell
from graphshard.codegen.idioms import FusedAdam, find_adam
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.overwrite import dying
from graphshard.codegen.workspace import Ledger, storage_bytes
from graphshard.communication import arrives
from graphshard.dataflow import has_floats, is_getitem, is_pointwise, is_view, resolve
from graphshard.execution import Kernel, Segment, type_of
from graphshard.products import BLOCK, LARGE_PRODUCT, part_rows
from graphshard.program import Section, Slot, val
from graphshard.region import Region, is_region, region_of, results_of
from graphshard.rewrite import list_arg
from graphshard.rows import space

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

PLACED_BYTES = 256
"""From this size on a result is written to memory that the caller has: for smaller ones that is not worth the words."""

_ELEMENTS_BEHIND_MEAN = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default,
    aten.soft_margin_loss.default,
)
"""Losses whose mean torch leaves in the storage of all elements' losses, which would live as long as the loss."""


@dataclass
class Code:
    """A segment, the nodes its arguments are, and the carries that it accumulates into (which ``first`` overwrites).

    ``reused``: results to the input whose storage they take.
    """

    segment: Segment
    inputs: list[fx.Node]
    accumulators: set[Slot]
    reused: dict[fx.Node, fx.Node]


def emit(
    name: str,
    nodes: list[fx.Node],
    outputs: list[fx.Node],
    section: Section,
    kernels: Kernels,
    *,
    sums: Sums | None = None,
    first: bool = False,
    watch: bool = False,
) -> Code:
    """Code for ``nodes``, in order, that returns ``outputs``.

    ``sums`` are done in place; ``first``: they overwrite. ``kernels`` takes what regions become. ``watch``: every
    floating-point value is shown to a function of that name.
    """
    return _Emitter(name, nodes, outputs, section, kernels, sums or Sums(), first, watch).run()


@dataclass
class _Destination:
    """A flat buffer that a pack fills: its own, or the carry that it is added to."""

    pack: fx.Node
    buffer: fx.Node
    overwrite: bool
    started: bool = False


@dataclass
class _Emitter:
    name: str
    nodes: list[fx.Node]
    outputs: list[fx.Node]
    section: Section
    kernels: Kernels
    sums: Sums
    first: bool
    watch: bool
    lines: list[str] = field(default_factory=list)
    reused: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self) -> Code:
        self.inside = set(self.nodes)
        self.accumulated = {node: node.all_input_nodes[0] for node in self.nodes if node in self.sums.slots}
        self.ahead = {node: self.sums.ahead[node] for node in self.nodes if node in self.sums.ahead}
        self.packs = self._destinations()
        self.placed = self._placements()
        self.folded = self._folded_casts()
        inputs = self._inputs()
        self.adams = self._updates(inputs)
        self.last_use = self._last_uses(inputs)
        self.ledger = Ledger(list(inputs))
        header = [f"def {self.name}(args, coordinates, device, memory):"]
        if inputs:
            self._line(f"({', '.join(n.name for n in inputs)}{',' if len(inputs) == 1 else ''}) = args")
            self._line("args.clear()")
        for node in filter(arrives, inputs):
            self._watch(node)
        for node in self.nodes:
            self._node(node)
            self._watch(node)
            dead = [n for n in self.last_use.get(node, []) if n in self.defined or n in inputs]
            if dead:
                self._line(f"del {', '.join(n.name for n in dead)}")
                self.ledger.drop(dead)
            self.ledger.advance()
        returned = ", ".join(self._expression(n) for n in self.outputs)
        self._line(f"return ({returned}{',' if len(self.outputs) == 1 else ''})")
        code = "\n".join(header + self.lines) + "\n"
        segment = Segment(
            self.name,
            code,
            tuple(n.name for n in inputs),
            tuple(n.name for n in self.outputs),
            tuple(type_of(val(n)) for n in inputs),
            tuple(type_of(val(n)) for n in self.outputs),
            self.ledger.workspace(),
            self.ledger.places(self.outputs),
            self.ledger.ends(),
            self.ledger.aliases(self.outputs),
        )
        if not self.first:
            self.reused |= self.accumulated
        summed = {self.section.inputs[carry] for carry in (*self.accumulated.values(), *self.ahead.values())}
        return Code(segment, list(inputs), summed, self.reused)

    # Analysis

    def _destinations(self) -> dict[fx.Node, _Destination]:
        """The buffer each pack writes to: the accumulator itself if the pack's only reader accumulates it, unless this
        is the first time, when the pack's buffer becomes the accumulator."""
        result: dict[fx.Node, _Destination] = {}
        for node in self.nodes:
            if node.target is not gs.pack.default:
                continue
            carry = self.accumulated.get(next(iter(node.users))) if len(node.users) == 1 else None
            if carry is not None and self._holds(carry):
                result[node] = _Destination(node, carry, self.first, started=True)
            else:
                result[node] = _Destination(node, node, overwrite=True)
        return result

    def _holds(self, carry: fx.Node) -> bool:
        """Whether the carry is there when the segment begins."""
        return not self.first or carry in self.sums.begun

    def _placements(self) -> dict[fx.Node, tuple[_Destination, int]]:
        """Parts that are written straight into a pack's buffer, of packs that are here or in later segments."""
        destinations = dict(self.packs)
        for part, carry in self.ahead.items():
            pack = next(iter(part.users))
            destinations.setdefault(pack, _Destination(pack, carry, self.first, self._holds(carry)))
        return {
            part: (destination, offset)
            for pack, destination in destinations.items()
            for part, offset in zip(list_arg(pack, 0), list_arg(pack, 1), strict=True)
            if part in self.inside and placeable(part, self.kernels.on_gpu)
        }

    def _folded_casts(self) -> dict[fx.Node, fx.Node]:
        """Casts that only a pack reads, to what they cast: writing to the pack's buffer casts by itself."""
        return {
            part: part.all_input_nodes[0]
            for pack in self.packs
            for part in list_arg(pack, 0)
            if part in self.inside and part.target is aten._to_copy.default and len(part.users) == 1
            if part.kwargs.keys() == {"dtype"} and part not in self.outputs and not self.watch
        }

    def _inputs(self) -> dict[fx.Node, None]:
        """What the segment reads, or accumulates into, in order."""
        inputs: dict[fx.Node, None] = {}
        for node in self.nodes:
            carry = self.accumulated.get(node) or self.ahead.get(node)
            sources = [source for source in node.all_input_nodes if source not in self.sums.ahead]
            for source in map(resolve, [*sources, *([carry] if carry is not None else [])]):
                if source not in self.inside and (source is not carry or self._holds(carry)):
                    inputs[source] = None
        return inputs

    def _updates(self, inputs: Mapping[fx.Node, None]) -> dict[fx.Node, FusedAdam]:
        """The regions that are an update for which torch has a kernel, where the scalars that it wants are at hand."""
        if self.kernels.on_gpu:
            return {}  # its own kernel is one, and takes what goes before and behind the update with it
        long = [n for n in self.nodes if isinstance(n.target, Region) and blocks_of(n.target) is not None]
        found = {node: adam for node in long if (adam := find_adam(node, self.section))}
        return {n: a for n, a in found.items() if all(s in self.inside or s in inputs for s in (a.step, a.lr))}

    def _last_uses(self, inputs: Mapping[fx.Node, None]) -> dict[fx.Node, list[fx.Node]]:
        """Which values are dead after each node."""
        last: dict[fx.Node, fx.Node] = {}
        self.defined: set[fx.Node] = set()
        for node in self.nodes:
            for source in node.all_input_nodes:
                last[resolve(source)] = node
                if source in self.folded:
                    last[resolve(self.folded[source])] = node
            last.setdefault(node, node)
            if node in self.adams:
                last |= dict.fromkeys((self.adams[node].step, self.adams[node].lr), node)
        aliases = {node: carry for node, carry in self.accumulated.items() if carry in inputs}
        kept = set(self.outputs) | {aliases[n] for n in self.outputs if n in aliases}
        result: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last.items():
            if value not in kept and value not in self.placed:
                result.setdefault(node, []).append(value)
        return result

    # Code

    def _line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def _define(self, node: fx.Node, expression: str) -> None:
        self.defined.add(node)
        self._line(f"{node.name} = {expression}")

    def _node(self, node: fx.Node) -> None:
        if node in self.placed:
            self._place(node, *self.placed[node])
        elif node in self.packs:
            self._pack(self.packs[node])
        elif node in self.folded:
            pass
        elif node in self.accumulated:
            self._accumulate(node)
        elif isinstance(node.target, Region):
            self._region(node, node.target)
        elif is_getitem(node) and is_region(node.all_input_nodes[0]):
            pass  # the region has defined it
        elif node.target is gs.local_shard.default:
            flat, _, axis = node.args
            size = val(node).numel()
            self._define(node, f"{self._expression(flat)}.narrow(0, coordinates[{axis!r}] * {size}, {size})")
            self.ledger.shares(node, resolve(flat))  # type: ignore[arg-type]
        elif node.target in _ELEMENTS_BEHIND_MEAN and not val(node).dim():
            self._define(node, f"{self._call(node)}.clone()")
            self.ledger.temporary(storage_bytes(val(node.args[0])))  # type: ignore[arg-type]
            self.ledger.result(node)
        elif (alone := self._alone(node)) is not None:
            region, in_place = alone
            self._kernel(node, self.kernels.add(region, in_place), in_place)
        else:
            self._define(node, self._call(node))
            self.ledger.result(node)

    def _memory(self, node: fx.Node) -> str:
        """Where the result of ``node``, which the next line defines, is to be written; "": the operator is to say."""
        value = val(node)
        if (
            self.kernels.on_gpu
            or not self.kernels.placed
            or not isinstance(value, torch.Tensor)
            or value.nbytes < PLACED_BYTES
        ):
            return ""
        # Elements that share memory, as an expanded value's do, cannot be written each by itself.
        return f"memory({self.ledger.ask(node)})" if storage_bytes(value) == value.nbytes else ""

    def _watch(self, node: fx.Node) -> None:
        if self.watch and has_floats(node):
            value = node.name
            if node in self.placed:
                destination, offset = self.placed[node]
                value = self._view(destination, node, offset)
            elif node in self.packs:
                value = self.packs[node].buffer.name
            self._line(f"watch({node.name!r}, {value})")

    def _alone(self, node: fx.Node) -> tuple[Region, dict[int, int]] | None:
        """An operator that may write its result over a long operand, as a region, and which; None: it may not."""
        if self.watch or self.kernels.on_gpu or isinstance(val(node), tuple) or is_view(node) or space(node) is None:
            return None
        region = region_of([node], node.all_input_nodes, [node])
        in_place = self.kernels.overwrites(node, region, self.section)
        return (region, in_place) if in_place else None

    def _region(self, node: fx.Node, region: Region) -> None:
        adam = self.adams.get(node)
        if adam is None:
            in_place = self.kernels.overwrites(node, region, self.section)
            self._kernel(node, self.kernels.add(region, in_place), in_place)
        else:
            in_place = self.kernels.overwrites_update(node, region, adam, self.section)
            kernel = self.kernels.add_update(region, adam, dying(node, self.section), in_place)
            self._kernel(node, kernel, in_place, [adam.step, adam.lr])

    def _kernel(
        self, node: fx.Node, kernel: Kernel, in_place: Mapping[int, int], scalars: Sequence[fx.Node] = ()
    ) -> None:
        """Call the kernel of ``node``, with ``scalars`` behind its operands."""
        results = results_of(node)
        names = [results[index].name if index in results else "_" for index in range(_count(node))]
        arguments = [self._name(operand) for operand in (*node.all_input_nodes, *scalars)]
        made = [(index, result) for index, result in results.items() if index not in in_place]
        arguments += [f"out{index}={memory}" for index, result in made if (memory := self._memory(result))]
        self._line(f"{', '.join(names)} = kernels.{kernel.name}({', '.join(arguments)})")
        self.ledger.temporary(kernel.workspace_bytes)
        for index, result in results.items():
            self.defined.add(result)
            if index in in_place:
                self.reused[result] = node.all_input_nodes[in_place[index]]
                self.ledger.shares(result, self.reused[result])
            else:
                self.ledger.makes(result)

    def _name(self, node: fx.Node) -> str:
        return resolve(node).name

    def _call(self, node: fx.Node) -> str:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # Some results, as of layer norm's backward, have other strides than torch told when it was traced.
            return f"{self._name(node.all_input_nodes[0])}.reshape({self._expression(node.args[1])})"
        if is_getitem(node) or is_view(node):
            return call(node, self._name)
        arguments = arguments_of(node, self._name)
        if self._chooses_library(node):
            assert isinstance(node.target, torch._ops.OpOverload)
            self.ledger.temporary(_parts_bytes(node))
            if memory := self._memory(node):
                arguments += f", out=lambda: {memory}"
            return f"products.{node.target._schema.name.removeprefix('aten::')}({arguments})"
        if _copies(node):
            memory = self._memory(node)
            return f"{memory}.copy_({self._expression(node.args[0])})" if memory else call(node, self._name)
        if (variant := out_variant(node.target)) is not None and (memory := self._memory(node)):
            if not (is_pointwise(node) or val(node).is_contiguous()):
                # Softmax, for one, writes as if memory were contiguous; pointwise operators follow its strides.
                self.ledger.temporary(storage_bytes(val(node)))
                return f"{memory}.copy_({call(node, self._name)})"
            overload, out = variant
            return f"torch.ops.{overload}({arguments}, {out}={memory})"
        return call(node, self._name)

    def _chooses_library(self, node: fx.Node) -> bool:
        """Whether the runtime chooses the library that computes ``node``; see products.py. A GPU has one."""
        return not self.kernels.on_gpu and _is_large_product(node)

    def _start(self, destination: _Destination) -> None:
        """Allocate a pack's buffer before the first write; what no part covers is zero."""
        if destination.started:
            return
        destination.started = True
        pack, buffer = destination.pack, destination.buffer
        value = val(buffer)
        made = f"torch.empty({value.numel()}, dtype={value.dtype}, device=device)"
        self._define(buffer, self._memory(buffer) or made)
        self.ledger.makes(buffer)
        end = 0
        placed = zip(list_arg(pack, 0), list_arg(pack, 1), strict=True)
        for part, offset in sorted(placed, key=lambda item: item[1]):
            if offset > end:
                self._line(f"{buffer.name}[{end}:{offset}].zero_()")
            end = offset + val(part).numel()
        if end < value.numel():
            self._line(f"{buffer.name}[{end}:].zero_()")

    def _view(self, destination: _Destination, part: fx.Node, offset: int) -> str:
        shape = tuple(val(part).shape)
        flat = f"{destination.buffer.name}[{offset}:{offset + math.prod(shape)}]"
        return flat if len(shape) == 1 else f"{flat}.view({list(shape)})"

    def _place(self, node: fx.Node, destination: _Destination, offset: int) -> None:
        self._start(destination)
        view = self._view(destination, node, offset)
        if adds_rows(node):
            self._add_rows(node, view, destination.overwrite)
            return
        left, right = (self._expression(a) for a in node.args)
        if self._chooses_library(node):
            self.ledger.temporary(_parts_bytes(node))
            self._line(f"products.{'mm_into' if destination.overwrite else 'add_mm'}({view}, {left}, {right})")
        elif destination.overwrite:
            self._line(f"torch.mm({left}, {right}, out={view})")
        else:
            self._line(f"{view}.addmm_({left}, {right})")

    def _add_rows(self, node: fx.Node, view: str, overwrite: bool) -> None:
        """An embedding's gradient is zero in rows that were not looked up, and in the one for padding."""
        gradient, indices, _, padding = node.args[:4]
        rows, name = self._expression(gradient), self._expression(indices)
        pads = isinstance(padding, int) and padding >= 0
        if pads:
            rows = f"{rows}.masked_fill(({name} == {padding}).unsqueeze(-1), 0)"
        if pads or not val(gradient).is_contiguous():  # type: ignore[arg-type]
            self.ledger.temporary(storage_bytes(val(gradient)))  # type: ignore[arg-type]
        if overwrite:
            self._line(f"{view}.zero_()")
        self._line(f"{view}.index_add_(0, {name}.reshape(-1), {rows}.reshape(-1, {val(node).shape[1]}))")

    def _pack(self, destination: _Destination) -> None:
        self._start(destination)
        pack = destination.pack
        for part, offset in zip(pack.args[0], pack.args[1], strict=True):  # type: ignore[arg-type]
            if part not in self.placed and part not in self.sums.ahead:
                method = "copy_" if destination.overwrite else "add_"
                value = self._expression(self.folded.get(part, part))
                self._line(f"{self._view(destination, part, offset)}.{method}({value})")

    def _accumulate(self, node: fx.Node) -> None:
        carry, value = node.all_input_nodes
        if not self._holds(carry):
            # The value becomes the accumulator, which later micro-batches write to: nobody else may hold it.
            shared = len(value.users) > 1 or is_view(value) or is_getitem(value) or value.op == "placeholder"
            self._define(node, f"{self._expression(value)}.clone()" if shared else self._expression(value))
            if shared:
                self.ledger.makes(node)
            else:
                self.ledger.shares(node, resolve(value))
            return
        destination = self.packs.get(value)
        if destination is None or destination.buffer is not carry:
            self._line(f"{carry.name}.add_({self._expression(value)})")
        self._define(node, carry.name)
        self.ledger.shares(node, carry)

    def _expression(self, value: Any) -> str:
        return spell(value, self._name)


def _count(node: fx.Node) -> int:
    """How many results the node has."""
    return len(val(node)) if isinstance(val(node), tuple) else 1


def _copies(node: fx.Node) -> bool:
    """Whether the node copies its operand to where, and in which dtype, its result is."""
    options: dict[Any, set[str]] = {aten._to_copy.default: {"dtype"}, aten.clone.default: {"memory_format"}}
    return node.target in options and node.kwargs.keys() <= options[node.target]


def _is_large_product(node: fx.Node) -> bool:
    """Whether ``node`` is a product in float32 of which it matters what computes it."""
    if node.target not in (aten.mm.default, aten.addmm.default) or val(node).dtype is not torch.float32:
        return False
    *bias, left, _ = (val(source) for source in node.args)  # type: ignore[arg-type]
    if bias and (node.kwargs or bias[0].shape != val(node).shape[1:]):
        return False
    return bool(val(node).numel() * left.shape[1] >= LARGE_PRODUCT)


def _parts_bytes(node: fx.Node) -> int:
    """The most that a large product takes besides its result: a part of it, and of the right matrix where its columns
    lie together."""
    product, right = val(node), val(node.args[-1])  # type: ignore[arg-type]
    inner, columns = right.shape
    copied = BLOCK * columns if inner > BLOCK and not right.is_contiguous() else 0
    return int((min(product.shape[0], part_rows(columns)) * columns + copied) * product.itemsize)
