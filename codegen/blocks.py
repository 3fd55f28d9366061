"""A region as Python with torch's operators, block by block: what lies between two operators stays in cache.

Blocks are of rows, or, where nothing looks at rows, of elements in memory order. What is summed over all rows is kept
row by row, and summed behind the last block: to the bit what the operator gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphshard.codegen.expressions import arguments_of, call, out_variant, spell
from graphshard.dataflow import arguments, is_getitem, is_pointwise, is_view
from graphshard.program import tensors, val
from graphshard.region import Region
from graphshard.rows import Extent, Space, is_reduction, space, sums_rows

gs = torch.ops.graphshard

BLOCK = 65536
"""Elements per block: a dozen live temporaries of float32 fit a core's second-level cache."""


@dataclass(frozen=True)
class Blocks:
    """How a region is cut: ``step`` of ``count`` rows at a time, or elements if it has no rows."""

    space: Space
    rows: bool

    @property
    def count(self) -> int:
        return self.space.rows if self.rows else self.space.numel

    @property
    def step(self) -> int:
        return max(1, BLOCK // self.space.length) if self.rows else BLOCK

    @property
    def unit(self) -> str:
        return f"{self.step} {'rows' if self.rows else 'elements'}"

    def extent(self, node: fx.Node) -> Extent | None:
        """FULL or ROW for a value that each block has its part of; None for one that every block sees whole."""
        value = val(node)
        found = self.space.extent(value) if isinstance(value, Tensor) else None
        return found if found in (Extent.FULL, Extent.ROW) else None

    def nbytes(self, node: fx.Node) -> int:
        """Bytes of a block of what an operator makes."""
        per_step = {Extent.FULL: self.space.length if self.rows else 1, Extent.ROW: 1}
        extents = [(value, self.space.extent(value)) for value in tensors(val(node))]
        return sum(self.step * per_step.get(e or Extent.SCALAR, 0) * v.dtype.itemsize for v, e in extents)


def blocks_of(region: Region) -> Blocks | None:
    """How to cut the region; None: it is one block, or an operator of it is not computed row by row."""
    operations = [node for node in region.operations if not is_getitem(node)]
    spaces = [space(node) for node in operations]
    if None in spaces:
        return None
    whole = max((found for found in spaces if found is not None), key=lambda found: found.numel)
    values = [value for node in (*region.inputs, *region.operations) if isinstance(value := val(node), Tensor)]
    extents = [whole.extent(value) for value in values]
    if None in extents:
        return None
    blocks = Blocks(whole, any(map(is_reduction, operations)) or not {Extent.ROW, Extent.COLUMN}.isdisjoint(extents))
    return blocks if whole.numel > BLOCK and blocks.count > blocks.step else None


def keeps_to_itself(region: Region, blocks: Blocks) -> bool:
    """Whether it makes a long value that is no result, which computed whole would pass through memory."""
    results = set(region.outputs)
    inner = (node for node in region.operations if node not in results and not is_view(node))
    return any(blocks.extent(node) is Extent.FULL for node in inner)


@dataclass(frozen=True)
class Code:
    """Lines that leave the results in their variables; ``workspace_bytes``: what they take beside those."""

    lines: tuple[str, ...]
    workspace_bytes: int


def blocked_code(
    region: Region, names: Mapping[fx.Node, str], blocks: Blocks, in_place: Mapping[int, int], outs: Mapping[str, str]
) -> Code:
    """Code for inputs in the variables ``names``; ``in_place``: results to the input, of as many elements of their
    dtype, that they overwrite, by position. ``outs``: by variable of a result one that holds memory for it, or None."""
    lines: list[str] = []
    totals = [node for node in region.operations if sums_rows(node)]
    picked = [node for node in region.operations if is_getitem(node) and sums_rows(node.all_input_nodes[0])]
    for index, node in enumerate(region.outputs):
        if node in picked:
            continue
        value = val(node)
        made = f"torch.empty({list(value.shape)}, dtype={value.dtype}, device=device)"
        if index in in_place:
            old = region.inputs[in_place[index]]
            made = names[old] + ("" if val(old).shape == value.shape else f".view({list(value.shape)})")
        elif out := outs.get(names[node]):
            made += f" if {out} is None else {out}"
        lines.append(f"{names[node]} = {made}")
    inputs = [node for node in region.inputs if blocks.extent(node)]
    outputs = [node for node in region.outputs if node not in picked]
    lines += [f"{names[n]}_all = {names[n]}{_flattened(blocks, n)}" for n in (*inputs, *outputs)]
    lines += [f"{names[n]} = {names[n]}.view([-1])" for n in region.inputs if n not in inputs and val(n).dim() > 1]
    lines += [line for node in totals for line in _kept_rows(names[node], node, blocks)]
    lines.append(f"for at in range(0, {blocks.count}, {blocks.step}):")
    part = f"_all[at : at + {blocks.step}]"

    def name(node: fx.Node) -> str:
        while node.target is torch.ops.aten.view.default:
            (node,) = node.all_input_nodes  # a block of rows is the same for both
        return names[node] if node.op == "placeholder" and not blocks.extent(node) else f"{names[node]}_b"

    direct = _written_where_they_go(region, blocks, in_place)
    lives = _Lives(region, blocks, direct)
    inside = [f"{name(n)} = {names[n]}{part}" for n in inputs]
    for node in region.operations:
        if node in totals:
            inside += _kept_block(names[node], node, name, f"[at : at + {blocks.step}]")
        elif node.target is gs.dropout_mask.default:
            inside += _masked_elements(node, name, blocks)
        elif node.target is not torch.ops.aten.view.default and node not in picked:
            change = _last_dim if blocks.rows and is_reduction(node) else None
            if node in direct:
                inside += [f"{name(node)} = {names[node]}{part}", _call_into(node, name, change)]
            else:
                inside.append(f"{name(node)} = {call(node, name, change)}")
        ended = [n for n in lives.ending(node) if n.target is not torch.ops.aten.view.default]
        inside += _deletes([name(n) for n in ended if n not in totals and n not in picked])
    inside += [f"{names[n]}{part} = {name(n)}" for n in outputs if n not in direct]
    inside += _deletes([name(n) for n in outputs])
    behind = [_of_kept_rows(names[node], node) for node in totals]
    behind += [f"{names[node]} = {call(node, names.__getitem__)}" for node in picked]
    kept = sum(blocks.space.rows * (_summed_dtype(node).itemsize + torch.int64.itemsize) for node in totals)
    return Code((*lines, *(f"    {line}" for line in inside), *behind), lives.peak + kept)


def _written_where_they_go(region: Region, blocks: Blocks, in_place: Mapping[int, int]) -> set[fx.Node]:
    """The results of which a block's operator can write its part itself, into the whole."""
    found = set()
    for index, node in enumerate(region.outputs):
        if not blocks.extent(node) or sums_rows(node) or not (_is_cast(node) or out_variant(node.target)):
            continue
        if index in in_place:
            # What it is written over must not be read any more; a sum over a row may be read when it is half written.
            old = region.inputs[in_place[index]]
            if not is_pointwise(node) or any(node < reader for reader in _readers(old)):
                continue
        found.add(node)
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """The operations of a region that read ``node``, or a view of it."""
    users = [user for user in node.users if user.op != "output"]
    return [reader for user in users for reader in (_readers(user) if is_view(user) else [user])]


def _is_cast(node: fx.Node) -> bool:
    return node.target is torch.ops.aten._to_copy.default and node.kwargs.keys() == {"dtype"}


def _call_into(node: fx.Node, name: Callable[[fx.Node], str], change: Callable[[str, Any], Any] | None) -> str:
    """``node`` as a call that writes to its variable."""
    if _is_cast(node):
        return f"{name(node)}.copy_({name(node.all_input_nodes[0])})"
    variant = out_variant(node.target)
    assert variant is not None
    overload, out = variant
    return f"torch.ops.{overload}({arguments_of(node, name, change)}, {out}={name(node)})"


def _masked_elements(node: fx.Node, named: Callable[[fx.Node], str], blocks: Blocks) -> list[str]:
    """A block of dropout's mask, which knows the number of its first element."""
    count = f"min({blocks.step}, {blocks.count} - at)"
    size, first = (f"{count}, {blocks.space.length}", f"at * {blocks.space.length}") if blocks.rows else (count, "at")
    given = f"{named(node.all_input_nodes[0])}, [{size}], {arguments(node)['p']!r}, {first}"
    return [f"{named(node)} = torch.ops.{node.target}({given})"]


def _kept_rows(name: str, node: fx.Node, blocks: Blocks) -> list[str]:
    """Room for what each row adds to a sum over all rows, and for whether it counts."""
    rows = blocks.space.rows
    return [
        f"{name}_rows = torch.empty([{rows}], dtype={_summed_dtype(node)}, device=device)",
        f"{name}_counts = torch.empty([{rows}], dtype=torch.int64, device=device)",
    ]


def _kept_block(name: str, node: fx.Node, named: Callable[[fx.Node], str], part: str) -> list[str]:
    """A block of rows of ``nll_loss_forward``: its operator, without the sum."""
    given = arguments(node) | {"reduction": 0}
    of_rows = ", ".join(spell(value, named) for value in given.values())
    return [
        f"{name}_rows{part} = torch.ops.{node.target}({of_rows})[0]",
        f"{name}_counts{part} = {named(given['target'])} != {given['ignore_index']}",
    ]


def _of_kept_rows(name: str, node: fx.Node) -> str:
    """The sum, by the operator itself: of rows of one class, where -1 says that a row does not count."""
    reduction = arguments(node)["reduction"]
    return f"{name} = torch.ops.{node.target}(-{name}_rows.view(-1, 1), {name}_counts - 1, None, {reduction}, -1)"


def _summed_dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = val(node)[0].dtype
    return dtype


class _Lives:
    """Follows, operation by operation, which values a block still needs, and the most bytes they take beside those that
    are written ``direct``ly to where they go. Views and picked results live as long as what they are of."""

    def __init__(self, region: Region, blocks: Blocks, direct: Collection[fx.Node]) -> None:
        self._blocks, self._direct, self._held, self.peak = blocks, direct, 0, 0
        self._members: dict[fx.Node, list[fx.Node]] = {}
        last: dict[fx.Node, fx.Node] = {}
        for node in region.operations:
            self._members.setdefault(_root(node), []).append(node)
            for source in (node, *node.all_input_nodes):
                last[_root(source)] = node
        returned = {_root(node) for node in region.outputs}
        self._ending: dict[fx.Node, list[fx.Node]] = {}
        for root, node in last.items():
            if root not in returned and root.op != "placeholder":
                self._ending.setdefault(node, []).append(root)

    def _nbytes(self, node: fx.Node) -> int:
        return 0 if node in self._direct else self._blocks.nbytes(node)

    def ending(self, node: fx.Node) -> list[fx.Node]:
        """The next operation, ``node``, has run: the values that nothing reads from here on."""
        if _root(node) is node:
            self._held += self._nbytes(node)
            self.peak = max(self.peak, self._held)
        ended = self._ending.get(node, [])
        self._held -= sum(map(self._nbytes, ended))
        return [member for root in ended for member in self._members[root]]


def _root(node: fx.Node) -> fx.Node:
    """The operation, or the input, whose result ``node`` shows or picks."""
    while node.op != "placeholder" and (is_getitem(node) or is_view(node)):
        node = node.all_input_nodes[0]
    return node


def _flattened(blocks: Blocks, node: fx.Node) -> str:
    """From a whole value to one whose first dim is cut into blocks."""
    shape, space = list(val(node).shape), blocks.space
    if not blocks.rows:
        wanted = [space.numel]
    elif blocks.extent(node) is Extent.FULL:
        wanted = [space.rows, space.length]
    else:
        wanted = [space.rows, 1] if len(shape) > 1 and shape[-1] == 1 else [space.rows]
    return "" if shape == wanted else f".view({wanted})"


def _last_dim(argument: str, value: Any) -> Any:
    """A block of rows has one dim before the last, however many the whole has."""
    if argument != "dim":
        return value
    return [-1] if isinstance(value, (list, tuple)) else -1


def _deletes(names: list[str]) -> list[str]:
    return [f"del {', '.join(names)}"] if names else []
