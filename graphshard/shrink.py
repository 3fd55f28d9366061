"""A program of the same structure with small dims and few ranks: what can be run in one process in little time.

Translation validation is about structure: which value is gathered, reduced, sent, added to which. That is the same for
a width of 8 as for one of 4096, as long as passes do not decide by size; ``Compiled.verify`` says where one did. Where
small sizes do not type or do not run (a table that is looked up beyond its end), those of that operator stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from graphshard import fake
from graphshard.check import require_fits
from graphshard.dataflow import is_pointwise
from graphshard.errors import NodeFailed
from graphshard.mesh import Mesh
from graphshard.program import Program, tensors, val
from graphshard.reference import run
from graphshard.reference_inputs import random_inputs
from graphshard.rewrite import copied
from graphshard.sizes import choose, constraints, sizes_of

_RANKS = 3  # along an axis: of two, the other rank is always the neighbour, and sizes divide too easily
_MICROBATCHES = 2  # the first one and a later one


class _DoesNotFit(Exception):
    def __init__(self, node: fx.Node) -> None:
        self.node = node


def shrunk(program: Program, limit_gb: float) -> Program:
    """A smaller program of the structure of ``program``, a captured one: dims, micro-batches, data-parallel ranks.

    The number of stages stays, because a cut for fewer is another program.

    Raises:
        TooLargeToCheck: it still takes more than ``limit_gb`` times 10^9 bytes to run.
        NodeFailed: ``program`` itself cannot be run on random inputs.
    """
    mesh = Mesh(tuple((axis, size if axis == "pp" else min(size, _RANKS)) for axis, size in program.mesh.axes))
    given = constraints(program)
    fixed: frozenset[int] = frozenset()
    trouble: fx.Node | None = None  # what the alternatives are tried for
    alternatives: list[frozenset[int]] = []
    while True:
        tried = alternatives.pop(0) if alternatives else fixed
        to = choose(given, tried)
        try:
            result = _resized(program, to)
            result.mesh, result.microbatches = mesh, min(program.microbatches, _MICROBATCHES)
            require_fits(result, limit_gb)
            _try(result, program)
            return result
        except _DoesNotFit as conflict:
            if conflict.node is trouble and alternatives:
                continue
            changed = sorted(size for size in sizes_of(conflict.node) if to[size] != size)
            if not changed:
                raise conflict.__cause__ or conflict from None
            fixed, trouble = tried, conflict.node
            alternatives = [fixed | {size} for size in changed] + [fixed | set(changed)]


def _try(small: Program, program: Program) -> None:
    """Raises _DoesNotFit with the node of ``program`` whose twin in ``small`` cannot be run."""
    try:
        run(small, random_inputs(small, steps=1))
    except NodeFailed as failed:
        section = next(s for s in small.sections().values() if failed.node.graph is s.graph)
        name = next(name for name, s in small.sections().items() if s is section)
        index = list(section.graph.nodes).index(failed.node)
        raise _DoesNotFit(list(program.sections()[name].graph.nodes)[index]) from failed


def _resized(program: Program, to: Mapping[int, int]) -> Program:
    """``program`` with every size replaced by what ``to`` gives, types derived anew.

    Raises:
        _DoesNotFit: with the node of ``program`` whose operator refuses the sizes, or gives others.
    """
    result = copied(program)
    mode = fake.new_mode()
    for name, section in result.sections().items():
        for old, node in zip(program.sections()[name].graph.nodes, section.graph.nodes, strict=True):
            if node.op == "placeholder":
                node.meta["val"] = _fake(mode, val(old), to)
            elif node.op == "call_function":
                if not is_pointwise(node):
                    node.args, node.kwargs = tree_map_only(int, lambda n: _number(n, to), (node.args, node.kwargs))
                node.meta["val"] = _typed(mode, node, old, to)
    result.params = {name: replace(p, shape=_shape(p.shape, to)) for name, p in program.params.items()}
    result.constants = {name: _constant(value, to) for name, value in program.constants.items()}
    return result


def _number(number: int, to: Mapping[int, int]) -> int:
    return number if isinstance(number, bool) else to.get(number, number)


def _shape(shape: tuple[int, ...], to: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(to.get(size, size) for size in shape)


def _fake(mode: fake.FakeTensorMode, value: torch.Tensor, to: Mapping[int, int]) -> torch.Tensor:
    """A tensor of the new size whose dims lie in memory in the same order."""
    shape = _shape(tuple(value.shape), to)
    stride, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (value.stride(d), -d)):
        stride[dim], step = step, step * shape[dim]
    return fake.tensor(mode, shape, value.dtype, stride, value.device)


def _typed(mode: fake.FakeTensorMode, node: fx.Node, old: fx.Node, to: Mapping[int, int]) -> Any:
    try:
        with fake.quiet():
            value = fake.infer(mode, node.target, node.args, dict(node.kwargs))
    except Exception as error:  # operators refuse sizes by whatever exception they like
        raise _DoesNotFit(old) from error
    expected = [_shape(tuple(before.shape), to) for before in tensors(val(old))]
    if [tuple(new.shape) for new in tensors(value)] != expected:
        raise _DoesNotFit(old)
    return value


def _constant(value: torch.Tensor, to: Mapping[int, int]) -> torch.Tensor:
    """The beginning of a lifted tensor. What of it may be an index points into the beginning of a table."""
    part = value[tuple(slice(to.get(size, size)) for size in value.shape)]
    cut = part.shape != value.shape and value.dtype not in (torch.bool,) and not value.dtype.is_floating_point
    return part.clamp(max=1) if cut else part.clone()
