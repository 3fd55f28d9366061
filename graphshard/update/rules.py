"""From the recorded operators of an update to a section of the IR: pure ATen operators on tensors.

Numbers that the step computes from tensors (``alpha=-lr``) are symbols in the record. Here they are the 0-dim tensors
they were read from, and an operator that takes them as a number becomes one that takes a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_map_only

from graphshard import fake
from graphshard.errors import OptimizerNotTraceable
from graphshard.program import NodeInfo, Phase, Role, Section, Slot, empty_section
from graphshard.rewrite import add_input, call, drop_dead, set_outputs
from graphshard.update.trace import COUNTER, StateTypes, Trace

aten = torch.ops.aten

PARAM = Slot(Role.PARAM, "param")
GRADIENT = Slot(Role.CARRY, "grad")
LR = Slot(Role.LR, "lr")
_SYMBOLS = (torch.SymFloat, torch.SymInt)
_SAME = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default)
_SCALARS: Mapping[Any, Callable[..., Any]] = {
    operator.neg: aten.neg.default,
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.pow: aten.pow.Tensor_Tensor,
}


def state_slot(key: str) -> Slot:
    """The slot of optimizer state in a template."""
    return Slot(Role.STATE, "state", key)


def template(optimizer: str, trace: Trace, like: torch.Tensor, state: StateTypes) -> Section:
    """The update of one parameter, with slots ``PARAM``, ``GRADIENT``, ``LR`` and :func:`state_slot`; ``like`` is the
    parameter's fake value and ``state`` what the trace was given.

    Raises:
        OptimizerNotTraceable: a number that a value decides is used where the IR needs a constant.
    """
    return _Lowering(optimizer, trace, like).run(state)


class _Lowering:
    def __init__(self, optimizer: str, trace: Trace, like: torch.Tensor) -> None:
        self.optimizer, self.trace, self.like = optimizer, trace, like
        self.section = empty_section()
        self.record = NodeInfo(phase=Phase.UPDATE)
        self.made: dict[fx.Node, Any] = {}  # node of the record to node of the section

    def run(self, state: StateTypes) -> Section:
        section, like = self.section, self.like
        mode = fake.mode_of([like])
        assert mode is not None
        types = [(PARAM, like.shape, like.dtype), (GRADIENT, like.shape, like.dtype), (LR, (), COUNTER)]
        types += [(state_slot(key), self.shape(shape), dtype) for key, (shape, dtype) in state.items()]
        placeholders = [n for n in self.trace.module.graph.nodes if n.op == "placeholder"]
        for node, (slot, shape, dtype) in zip(placeholders, types, strict=True):
            self.made[node] = add_input(section, slot, fake.tensor(mode, shape, dtype), self.record)
        with section.graph.inserting_before(section.output_node):
            for node in self.trace.module.graph.nodes:
                if node.op == "get_attr":
                    self.made[node] = self.constant(getattr(self.trace.module, str(node.target)))
                elif node.op == "call_function":
                    self.made[node] = self.typed(node, self.operation(node))
            returned: Any = self.trace.module.graph.output_node().args[0]
            slots = [PARAM, *map(state_slot, self.trace.keys)]
            results = {slot: self.result(item) for slot, item in zip(slots, returned, strict=True)}
        set_outputs(section, results)
        drop_dead(section)
        return section

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(self.section.graph, target, args, self.record, **kwargs)

    def shape(self, traced: Sequence[int]) -> tuple[int, ...]:
        """The shape of what was traced as ``traced``."""
        return tuple(self.like.shape) if tuple(traced) == self.trace.shape else tuple(traced)

    def refuse(self, reason: str) -> OptimizerNotTraceable:
        return OptimizerNotTraceable(self.optimizer, reason)

    def constant(self, value: torch.Tensor) -> fx.Node:
        if value.dim() > 0:
            raise self.refuse(
                f"it reads a tensor of shape {list(value.shape)} that is neither parameter, gradient nor state"
            )
        return self.emit(aten.full.default, [], value.item(), dtype=value.dtype)

    def result(self, item: Any) -> fx.Node:
        if not isinstance(item, fx.Node):
            return self.emit(aten.full.default, [], float(item), dtype=COUNTER)
        return self.made[item]  # type: ignore[no-any-return]

    def typed(self, node: fx.Node, new: Any) -> Any:
        """``new`` in the dtype the step computed in: a tensor where it had a number may promote a 0-dim parameter."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(new, fx.Node) and new.meta["val"].dtype != value.dtype:
            return self.emit(aten._to_copy.default, new, dtype=value.dtype)
        return new

    def operation(self, node: fx.Node) -> Any:
        target: Any = node.target
        args, kwargs = tree_map_only(fx.Node, self.made.__getitem__, (node.args, dict(node.kwargs)))
        kwargs = {k: v for k, v in kwargs.items() if not _placement(k, v)}
        value = node.meta.get("val")
        if target is aten.copy_.default and _is_input(node.args[0]):
            return args[1]  # what functionalization appends for an input that was written
        if target in _SAME:
            return args[0]
        if target is aten._local_scalar_dense.default:
            return (
                args[0]
                if args[0].meta["val"].dtype == COUNTER
                else self.emit(aten._to_copy.default, args[0], dtype=COUNTER)
            )
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            raise self.refuse(f"it writes to a tensor that is neither parameter nor state ({target})")
        if any(isinstance(n.meta.get("val"), _SYMBOLS) for n in node.all_input_nodes):
            return self.with_symbol(node, target, args, kwargs)
        if target is operator.getitem:
            return self.emit(target, *args)
        if target in (
            aten.zeros.default,
            aten.ones.default,
            aten.scalar_tensor.default,
            aten.full.default,
            aten.empty.memory_format,
        ):
            shape = [] if target is aten.scalar_tensor.default else args[0]
            fill = {aten.zeros.default: 0.0, aten.ones.default: 1.0, aten.empty.memory_format: 0.0}.get(target)
            fill = fill if fill is not None else args[0] if target is aten.scalar_tensor.default else args[1]
            return self.emit(aten.full.default, list(self.shape(shape)), fill, dtype=value.dtype)  # type: ignore[union-attr]
        if target is aten.copy.default and args[0].meta["val"].shape == args[1].meta["val"].shape:
            return args[1]
        if target is aten.fill.Scalar:
            return self.emit(aten.full_like.default, args[0], args[1])
        if target is aten.masked_fill.Tensor:
            return self.emit(aten.where.self, args[1], args[2], args[0])
        if target is aten.index_put.default and _is_masked_fill(args):
            return self.emit(aten.where.self, args[1][0], args[2], args[0])
        return self.emit(target, *args, **kwargs)

    def with_symbol(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator one of whose numbers is a symbol, with that number as a 0-dim tensor."""
        if target in _SCALARS:
            return self.emit(_SCALARS[target], *(a if isinstance(a, fx.Node) else self.number(a) for a in args))
        if target is torch.sym_float:
            return args[0]
        name = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else str(target)
        if name in ("add", "sub") and "alpha" in kwargs:
            scaled = self.emit(aten.mul.Tensor, args[1], kwargs["alpha"])
            return self.emit(getattr(aten, name).Tensor, args[0], scaled)
        if name in ("addcmul", "addcdiv"):
            inner = self.emit(aten.mul.Tensor if name == "addcmul" else aten.div.Tensor, args[1], args[2])
            return self.emit(aten.add.Tensor, args[0], self.emit(aten.mul.Tensor, inner, kwargs["value"]))
        if name in ("full_like", "full", "fill", "scalar_tensor"):
            number = args[0] if name == "scalar_tensor" else args[1]
            if name == "scalar_tensor" or (name == "full" and not args[0]):
                return number
            dtype = node.meta["val"].dtype
            zeros = (
                self.emit(aten.full.default, list(self.shape(args[0])), 0.0, dtype=dtype)
                if name == "full"
                else self.emit(aten.full_like.default, args[0], 0.0)
            )
            return self.emit(aten.add.Tensor, zeros, number)
        if name == "lerp":
            weight = self.emit(aten._to_copy.default, args[2], dtype=args[0].meta["val"].dtype)
            return self.emit(aten.lerp.Tensor, args[0], args[1], weight)
        if name == "pow":
            return self.emit(aten.pow.Tensor_Tensor, *(a if isinstance(a, fx.Node) else self.number(a) for a in args))
        if name == "rsub" and not kwargs and len(args) == 2:
            return self.emit(aten.sub.Tensor, args[1], args[0])
        if name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge") and not kwargs and len(args) == 2:
            return self.emit(getattr(aten, name).Tensor, *args)
        raise self.refuse(f"{name} is given a number computed from tensors")

    def number(self, value: float) -> fx.Node:
        return self.emit(aten.full.default, [], float(value), dtype=COUNTER)


def _placement(key: str, value: object) -> bool:
    """Arguments that say where and how a result is stored, which the IR leaves to lowering."""
    return key in ("device", "layout", "pin_memory") or (key == "memory_format" and value is torch.preserve_format)


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _is_masked_fill(args: Sequence[Any]) -> bool:
    """Whether ``index_put(x, [mask], value)`` sets the elements under a mask of x's shape to one value."""
    x, indices, value = args[:3]
    nodes = tree_flatten([x, indices, value])[0]
    if len(args) > 3 or len(indices) != 1 or not all(isinstance(n, fx.Node) for n in nodes):
        return False
    mask = indices[0].meta["val"]
    return bool(mask.dtype == torch.bool and mask.shape == x.meta["val"].shape and value.meta["val"].dim() == 0)
