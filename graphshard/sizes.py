"""Smaller sizes for a program's dims, such that every operator still fits: a small constraint problem over integers.

A program captured at one shape holds numbers: 4096 is the width, 128 a head, 64 half of one, 2048 the sequence. A view
says that 4096 is 32 times 128, a concatenation that 128 is 64 and 64. Any numbers that obey these relations make a
program of the same structure. They are searched in ascending order, each by what it is made of, where that is known
already, else the smallest that leaves a solution (depth first, with a limit on the attempts).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from graphshard.dataflow import arguments, is_pointwise
from graphshard.program import Program, tensors, val
from graphshard.rewrite import list_arg

SMALL = 8
"""Numbers up to this one stay: they may be indices of dims, counts of heads or flags, and are small enough."""

_FREE = 8  # choices for a size that nothing determines
_ATTEMPTS = 20_000
_HUGE = 2**31  # "to the end" of a slice


@dataclass(frozen=True)
class Relation:
    """The product of ``left`` is that of ``right``; their sums, if ``additive``."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    additive: bool = False

    def holds(self, to: Mapping[int, int]) -> bool:
        """Whether it holds of the sizes that ``to`` gives; those it does not name stand for themselves."""
        combine = sum if self.additive else math.prod
        return combine(to.get(n, n) for n in self.left) == combine(to.get(n, n) for n in self.right)

    def solved(self, size: int, to: Mapping[int, int]) -> int | None:
        """What ``size`` must become, if it occurs once and all others are known; 0 where nothing would do."""
        if self.left.count(size) + self.right.count(size) != 1:
            return None
        mine, others = (self.left, self.right) if size in self.left else (self.right, self.left)
        rest = [to.get(n, n) for n in mine if n != size]
        whole = [to.get(n, n) for n in others]
        if self.additive:
            return max(sum(whole) - sum(rest), 0)
        quotient, remainder = divmod(math.prod(whole), math.prod(rest))
        return 0 if remainder else quotient


@dataclass(frozen=True)
class Constraints:
    """``sizes``: all that occur, ascending. ``fixed``: those of them that must stay."""

    sizes: tuple[int, ...]
    relations: tuple[Relation, ...]
    fixed: frozenset[int]


def constraints(program: Program) -> Constraints:
    """What the operators of ``program`` say of its sizes; not all they say: types derived anew show the rest."""
    sizes: set[int] = set()
    relations: dict[Relation, None] = {}
    fixed: set[int] = set()
    for section in program.sections().values():
        for node in section.graph.nodes:
            if node.op == "output":
                continue
            sizes.update(sizes_of(node))
            if node.op == "call_function":
                fixed.update(_windows(node))
                for relation in _relations(node):
                    cancelled = _cancelled(relation)
                    if cancelled is not None:
                        relations[cancelled] = None
                        sizes.update(n for n in cancelled.left + cancelled.right if n > SMALL)
    return Constraints(tuple(sorted(sizes)), tuple(relations), frozenset(fixed & sizes))


def sizes_of(node: fx.Node) -> set[int]:
    """The sizes above :data:`SMALL` of a node's results and inputs, and among its arguments."""
    values = [val(node), *(val(source) for source in node.all_input_nodes)]
    shapes = {size for t in tensors(values) for size in t.shape}
    return {n for n in shapes | set(_numbers(node)) if SMALL < n < _HUGE}


def choose(given: Constraints, fixed: Collection[int] = ()) -> dict[int, int]:
    """A smaller size for each, as far as the relations allow; the sizes themselves if none are found."""
    stay = given.fixed | set(fixed)
    ready: dict[int, list[Relation]] = {size: [] for size in given.sizes}
    for relation in given.relations:
        ready[max(n for n in relation.left + relation.right if n > SMALL)].append(relation)
    found: dict[int, int] = {}
    attempts = iter(range(_ATTEMPTS))

    def search(index: int) -> bool:
        if index == len(given.sizes):
            return True
        size = given.sizes[index]
        for candidate in _candidates(size, given.sizes[:index], ready[size], found, stay):
            if next(attempts, None) is None:
                return False
            found[size] = candidate
            if all(relation.holds(found) for relation in ready[size]) and search(index + 1):
                return True
            del found[size]
        return False

    return found if search(0) else {size: size for size in given.sizes}


def _candidates(
    size: int, smaller: Sequence[int], relations: list[Relation], to: Mapping[int, int], stay: Collection[int]
) -> Iterator[int]:
    if size in stay:
        yield size
        return
    for relation in relations:
        if (solved := relation.solved(size, to)) is not None:
            if 2 <= solved <= size:
                yield solved
            return
    # Ascending with the size, where that works: tables stay longer than the positions that look things up in them.
    least = max((to[n] for n in smaller if n not in stay), default=2)
    for candidate in (*range(least, least + _FREE), *range(2, least), size):
        if candidate <= size:
            yield candidate


def _cancelled(relation: Relation) -> Relation | None:
    """Without what both sides have; None if no size is left, or if the operator means something else by its numbers."""
    left, right = list(relation.left), list(relation.right)
    for size in relation.left:
        if size in right:
            left.remove(size)
            right.remove(size)
    if all(n <= SMALL for n in left + right) or not relation.holds({}):
        return None
    return Relation(tuple(left), tuple(right), relation.additive)


def _relations(node: fx.Node) -> Iterator[Relation]:
    if not isinstance(node.target, torch._ops.OpOverload) or is_pointwise(node):
        return
    sources, results = _shapes([val(n) for n in node.all_input_nodes]), _shapes(val(node))
    name = node.target._schema.name.rpartition("::")[2]
    given = arguments(node)
    if name in ("slice", "slice_backward", "slice_scatter"):
        yield from _slice(given, sources, results, name)
    elif name.removeprefix("unsafe_") in ("split", "split_with_sizes", "cat"):
        dim = given.get("dim", 0)
        whole, parts = sources[0], results
        if name == "cat":  # of a tensor with itself, too
            whole, parts = results[0], _shapes([val(n) for n in list_arg(node, 0)])
        # A vector without elements may be among the parts of anything.
        yield Relation(tuple(part[dim] for part in parts if part != (0,)), (whole[dim],), additive=True)
    elif name == "constant_pad_nd":
        for dim, (before, after) in enumerate(zip(sources[0], results[0], strict=True)):
            more = _padding(given["pad"], len(sources[0]) - 1 - dim)
            yield Relation((before, more), (after,), additive=True)
    elif name == "arange" and given.get("step", 1) == 1 and isinstance(given["end"], int):
        yield Relation((given.get("start", 0), results[0][0]), (given["end"],), additive=True)
    else:
        yield from _products(node, sources, results)


def _slice(
    given: Mapping[str, Any], sources: list[tuple[int, ...]], results: list[tuple[int, ...]], name: str
) -> Iterator[Relation]:
    dim = given.get("dim", 0)
    whole = (sources[0] if name == "slice" else results[0])[dim]
    part = {"slice": results[0], "slice_backward": sources[0], "slice_scatter": sources[-1]}[name][dim]
    start, end = given.get("start") or 0, given.get("end")
    start = start + whole if start < 0 else start
    end = whole if end is None or end > whole else end + whole if end < 0 else end
    if given.get("step", 1) == 1:
        yield Relation((part, start), (end,), additive=True)


def _padding(pad: Sequence[int], from_last: int) -> int:
    pair = pad[2 * from_last : 2 * from_last + 2]
    return sum(pair)


def _products(node: fx.Node, sources: list[tuple[int, ...]], results: list[tuple[int, ...]]) -> Iterator[Relation]:
    """Views keep the number of elements; other numbers among the arguments are products of neighbouring dims."""
    if len(sources) == len(results) == 1 and math.prod(sources[0]) == math.prod(results[0]):
        yield from _aligned(sources[0], results[0])
    shapes = sources + results
    dims = {size for shape in shapes for size in shape}
    for number in _numbers(node):
        if SMALL < number < _HUGE and number not in dims and (run := _run(number, shapes)):
            yield Relation((number,), run)


def _aligned(a: Sequence[int], b: Sequence[int]) -> Iterator[Relation]:
    """The shortest runs of dims of two shapes that hold as many elements."""
    left, right = [n for n in reversed(a) if n != 1], [n for n in reversed(b) if n != 1]
    while left and right:
        mine, theirs = [left.pop()], [right.pop()]
        while math.prod(mine) != math.prod(theirs):
            shorter, rest = (mine, left) if math.prod(mine) < math.prod(theirs) else (theirs, right)
            shorter.append(rest.pop())
        yield Relation(tuple(mine), tuple(theirs))


def _run(number: int, shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    for shape in shapes:
        for begin in range(len(shape)):
            for end in range(begin + 2, len(shape) + 1):
                if math.prod(shape[begin:end]) == number:
                    return shape[begin:end]
    return None


def _windows(node: fx.Node) -> set[int]:
    """The spatial dims of operators that slide a window: how many places it takes is no product."""
    name = str(node.target)
    if not any(word in name for word in ("conv", "pool", "upsample", "im2col")):
        return set()
    values = [val(node), *(val(source) for source in node.all_input_nodes)]
    return {size for shape in _shapes(values) for size in shape[2:]}


def _numbers(node: fx.Node) -> list[int]:
    if node.op != "call_function" or is_pointwise(node):
        return []
    leaves = tree_flatten((node.args, node.kwargs))[0]
    return [leaf for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)]


def _shapes(values: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors(values)]
