"""Bring a captured program to one form: no operations without effect, one view where there were several, weight views
derived anew in each phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphshard import fake
from graphshard.analysis import weight_views
from graphshard.carried import keep_for_later
from graphshard.dataflow import is_pointwise, is_view, owns_memory
from graphshard.pipeline import Context
from graphshard.program import Level, Phase, Program, Section, info, set_info, val
from graphshard.rewrite import call, clone, drop_dead, retype, retype_behind

aten = torch.ops.aten

_SAME_VALUE = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.view.default,
    aten._to_copy.default,
    aten._unsafe_view.default,
)
"""Operators whose result has the elements of their input: without effect where its type is the same too."""

_RESHAPES = (
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_PERMUTES = (aten.t.default, aten.transpose.int, aten.permute.default)
_SPLITS = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
_NOTED: dict[Any, Any] = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}
_JOINS = (aten.cat.default, aten.stack.default)
_ONE = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Normalize:
    """Rewrites to a fixed point in one sweep per graph, then duplicates weight views into the backward."""

    name: ClassVar[str] = "normalize"
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is not Level.CAPTURED:
            return program
        before = _neighbours(program.body)
        for section in program.sections().values():
            changed = set[fx.Node]()
            for node in list(section.nodes()):
                retype_behind(node, changed)  # rules compare types
                for rule in _RULES:
                    node = rule(node, changed)
            drop_dead(section)
        _derive_weight_views(program.body)
        keep_for_later(program.body, "normalize")  # a rule may have dropped the copy
        for section in program.sections().values():
            _share_views(section)
            drop_dead(section)
        _follow_dropped(program.body, before)
        return program


def _neighbours(body: Section) -> list[tuple[str, str, str]]:
    """Origins of each forward operation, of the first one that reads it, and of the first one that it reads."""
    result = []
    for node in body.nodes():
        if info(node).phase is Phase.FORWARD:
            reader = next(
                (info(u).origin for u in node.users if u.op != "output" and info(u).phase is Phase.FORWARD), ""
            )
            source = next((info(s).origin for s in node.all_input_nodes if s.op != "placeholder"), "")
            result.append((info(node).origin, reader, source))
    return result


def _follow_dropped(body: Section, neighbours: list[tuple[str, str, str]]) -> None:
    """What differentiated an operation that is gone now follows the one that read it, or else the one that it read."""
    left = {info(node).origin for node in body.nodes() if info(node).phase is Phase.FORWARD}
    follows: dict[str, str] = {}
    for origin, reader, _ in reversed(neighbours):
        follows[origin] = origin if origin in left else follows.get(reader, "")
    for origin, _, source in neighbours:
        follows[origin] = follows[origin] or follows.get(source, "")
    for node in body.nodes():
        if info(node).forward:
            set_info(node, forward=follows.get(info(node).forward, ""))


def _type(node: fx.Node) -> tuple[Any, ...]:
    value = val(node)
    return (tuple(value.shape), value.stride(), value.dtype, value.device)


def _become(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], changed: set[fx.Node]) -> fx.Node:
    """Turn ``node`` into ``target(*args)``."""
    before = _type(node)
    node.target, node.args, node.kwargs = target, args, {}
    retype([node])
    if _type(node) != before:
        changed.add(node)
    return node


def _canonical(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """``_unsafe_view`` and aliasing ``reshape`` are ``view``, whose size holds no -1; ``unsafe_split`` is ``split``."""
    if node.target in _SPLITS:
        node.target = _SPLITS[node.target]
        return node
    if node.target not in (aten._unsafe_view.default, aten.reshape.default, aten.view.default):
        return node
    size = list(val(node).shape)
    if node.target is aten.view.default and list(node.args[1]) == size:  # type: ignore[arg-type]
        return node
    if not _can_view(node.args[0], size, node):
        return node
    return _become(node, aten.view.default, (node.args[0], size), changed)


def _physical(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """A conjugate or negative that is only noted on a view is computed: no copy that would, no transfer and no memory
    of the plan's keeps the note. Twice is nothing."""
    target = _NOTED.get(node.target)
    if target is None:
        return node
    source: Any = node.args[0]
    if source.target is target and _type(source.args[0]) == _type(node):
        node.replace_all_uses_with(source.args[0])
        return source.args[0]  # type: ignore[no-any-return]
    return _become(node, target, (source,), changed)


def _can_view(source: Any, size: list[int], like: fx.Node) -> bool:
    """Whether ``view(source, size)`` exists and has the type of ``like``."""
    mode = fake.mode_of([val(source)])
    assert mode is not None
    try:
        result = fake.infer(mode, aten.view.default, (source, size), {})
    except (RuntimeError, ValueError):  # strides that no view can join
        return False
    return bool(result.stride() == val(like).stride())


def _merge_reshapes(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """A view of a view is a view of the first one's input."""
    inner = node.args[0] if node.target in _RESHAPES else None
    if not isinstance(inner, fx.Node) or inner.target not in _RESHAPES:
        return node
    source, size = inner.args[0], list(val(node).shape)
    if not _can_view(source, size, node):
        return node
    return _become(node, aten.view.default, (source, size), changed)


def _merge_permutes(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """A permutation of a permutation is one, or nothing."""
    inner = node.args[0] if node.target in _PERMUTES else None
    if not isinstance(inner, fx.Node) or inner.target not in _PERMUTES:
        return node
    source: Any = inner.args[0]
    first, second = _permutation(inner), _permutation(node)
    total = [first[i] for i in second]
    moved = [i for i, j in enumerate(total) if i != j]
    if not moved:
        node.replace_all_uses_with(source)
        return source  # type: ignore[no-any-return]
    if len(total) == 2:
        return _become(node, aten.t.default, (source,), changed)
    if len(moved) == 2:
        return _become(node, aten.transpose.int, (source, *moved), changed)
    return _become(node, aten.permute.default, (source, total), changed)


def _permutation(node: fx.Node) -> list[int]:
    """Which dim of the input each dim of the result is."""
    rank = val(node).dim()
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    order = list(range(rank))
    if rank > 1:
        i, j = (0, 1) if node.target is aten.t.default else node.args[1:3]
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return order


def _transposed_product(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """``t(mm(t(a), b))`` is ``mm(t(b), a)``: the gradient of a weight that was read transposed."""
    inner = node.args[0] if node.target is aten.t.default else None
    if not isinstance(inner, fx.Node) or inner.target is not aten.mm.default or len(inner.users) > 1:
        return node
    left, right = inner.args
    if not isinstance(left, fx.Node) or left.target is not aten.t.default or not isinstance(right, fx.Node):
        return node
    if all(user.target in _PERMUTES and _permutation(user) == [1, 0] for user in node.users):
        return node  # they cancel, and the product stays as it is
    record = info(inner)
    with node.graph.inserting_before(node):
        turned = _merge_permutes(call(node.graph, aten.t.default, (right,), record), changed)
        product = call(node.graph, aten.mm.default, (turned, left.args[0]), record)
    node.replace_all_uses_with(product)
    changed.add(product)
    return product


def _joined_in_order(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """A copy of joined tensors in another order of dims joins them in that order: the gradient of queries, keys and
    values that one product made."""
    turned = node.args[0] if node.target is aten.clone.default else None
    if not isinstance(turned, fx.Node) or turned.target not in _PERMUTES or len(turned.users) > 1:
        return node
    joined: Any = turned.args[0]
    if joined.target not in _JOINS or len(joined.users) > 1 or not val(node).is_contiguous():
        return node
    parts, order = joined.args[0], _permutation(turned)
    along = joined.args[1] % len(order) if len(joined.args) > 1 else 0
    inner = order
    if joined.target is aten.stack.default:
        inner = [dim - (dim > along) for dim in order if dim != along]
    elif any(val(part).dim() != len(order) for part in parts):
        return node  # cat takes empty tensors of one dim
    record = info(joined)
    with node.graph.inserting_before(node):
        if inner != sorted(inner):
            turns = [call(node.graph, aten.permute.default, (part, inner), record) for part in parts]
            parts = [_merge_permutes(turn, changed) for turn in turns]
        result = call(node.graph, joined.target, (list(parts), order.index(along)), record)
    node.replace_all_uses_with(result)
    changed.add(result)
    return result


def _without_effect(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """Drop an operation that returns its input, type included."""
    source = node.args[0] if node.args else None
    if node.target is aten.copy.default:
        source = node.args[1]  # written over all of the first argument
    elif node.target not in _SAME_VALUE and not (node.target in _ONE and node.args[1] == 1):
        return node
    if node.target is aten.clone.default and any(user.op == "output" for user in node.users):
        return node  # a result that must own its memory
    if not isinstance(source, fx.Node) or _type(source) != _type(node):
        return node
    if any(user.op == "output" for user in node.users) and not owns_memory(source):
        return _become(node, aten.clone.default, (source,), changed)  # as when a buffer takes another one's value
    node.replace_all_uses_with(source)
    return source


def _spread_last(node: fx.Node, changed: set[fx.Node]) -> fx.Node:
    """What is computed of a spread-out value is computed of that value, where the operation spreads it by itself: the
    gradient of a mean is one number a row, which no memory holds for each element."""
    if not is_pointwise(node) or len(node.all_input_nodes) < 2:
        return node
    before = _type(node)
    for operand in node.all_input_nodes:
        chain = _chain_from_expand(operand)
        if chain is None:
            continue
        spread, *rest = chain
        small: Any = spread.args[0]
        dims = val(operand).dim()
        if val(small).dim() != dims or val(node).dim() != dims:
            continue  # a tensor without dims has less to say in the type of a result
        with node.graph.inserting_before(node):
            for step in rest:
                small = clone(step, {step.all_input_nodes[0]: small}.__getitem__)
                retype([small])
        kept = node.args
        node.args = tuple(small if argument is operand else argument for argument in node.args)
        retype([node])
        if _type(node) != before:
            node.args = kept
            retype([node])
    return node


def _chain_from_expand(node: fx.Node) -> list[fx.Node] | None:
    """An ``expand`` to more elements and the operations with numbers between it and ``node``, which is the last."""
    chain = [node]
    while chain[-1].target is not aten.expand.default:
        last = chain[-1]
        if not is_pointwise(last) or len(last.all_input_nodes) != 1 or len(last.users) > 1:
            return None
        chain.append(last.all_input_nodes[0])
    source: Any = chain[-1].args[0]
    return chain[::-1] if val(source).numel() < val(chain[-1]).numel() else None


_RULES = (
    *(_physical, _canonical, _merge_reshapes, _merge_permutes, _transposed_product, _joined_in_order),
    *(_without_effect, _spread_last),
)


def _derive_weight_views(body: Section) -> None:
    """Copy views and casts of parameters that the backward reads into the backward, from the parameter on."""
    views = weight_views(body)
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        """The backward's copy of a forward view; anything else is itself."""
        if node not in views or info(node).phase is not Phase.FORWARD:
            return node
        return copies[node]

    readers = [n for n in body.nodes() if info(n).phase is not Phase.FORWARD]
    for reader in readers:
        for source in _chain(reader, views):
            if source not in copies:
                with reader.graph.inserting_before(reader):
                    copies[source] = clone(source, copied, phase=Phase.BACKWARD, made_by="normalize")
        for source in reader.all_input_nodes:
            if copied(source) is not source:
                reader.replace_input_with(source, copied(source))


def _chain(reader: fx.Node, views: set[fx.Node]) -> list[fx.Node]:
    """The forward weight views that ``reader`` depends on, in order."""
    found: set[fx.Node] = set()
    pending = [reader]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in views and info(source).phase is Phase.FORWARD and source not in found:
                found.add(source)
                pending.append(source)
    return sorted(found)


def _share_views(section: Section) -> None:
    """One node for equal views of one value in one phase."""
    seen: dict[tuple[Any, ...], fx.Node] = {}
    for node in section.nodes():
        if is_view(node):
            key = (node.target, repr(node.args), repr(node.kwargs), info(node).phase)
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
