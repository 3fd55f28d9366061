"""The optimizer's part of the epilogue: clip the gradients, update every parameter.

An optimizer is not special: its ``step`` is traced, once per distinct (group, dtype) if it looks at no shape, else per
(group, shape, dtype), and the recorded operators become nodes of the epilogue, once per parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

import graphshard.ops  # noqa: F401 - defines graphshard::sq_norm
from graphshard.dataflow import COMPLEX_PARTS, downstream, is_pointwise, is_pooled
from graphshard.errors import (
    NotAnOptimizer,
    NothingToUpdate,
    OptimizerForeignParameter,
    OptimizerNeedsClosure,
    OptimizerNotElementwise,
    OptimizerNotTraceable,
)
from graphshard.program import NodeInfo, Param, Phase, Program, Role, Section, Slot, copy_node
from graphshard.rewrite import add_input, call, copy_section, set_outputs
from graphshard.update.rules import GRADIENT, LR, PARAM, template
from graphshard.update.trace import COUNTER, Subject, Trace, trace_step, traced_shape

aten = torch.ops.aten
gs = torch.ops.graphshard

CLIP_EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm before dividing by it."""

_CREATION = {
    aten.full.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
}


OptimizerLike = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
"""An optimizer, or what makes one of parameters."""


def make_optimizer(model: nn.Module, optimizer: OptimizerLike) -> Optimizer:
    """The optimizer itself, or what the factory makes of ``model.parameters()``.

    Raises:
        NotAnOptimizer: it is neither.
        NothingToUpdate: the model has no parameters to make one of.
        OptimizerNeedsClosure: it cannot be stepped without evaluating the loss (LBFGS).
    """
    factory = callable(optimizer) and not isinstance(optimizer, Optimizer)
    if factory and next(model.parameters(), None) is None:
        raise NothingToUpdate()
    made = optimizer(model.parameters()) if factory else optimizer  # type: ignore[operator]
    if not isinstance(made, Optimizer):
        raise NotAnOptimizer(optimizer)
    parameters = list(inspect.signature(type(made).step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise OptimizerNeedsClosure(type(made).__name__)
    return made


def add_update(
    program: Program, optimizer: Optimizer | None, param_names: Mapping[int, str], max_grad_norm: float | None
) -> None:
    """Extend the epilogue of a captured program by everything that happens to the gradients after the last micro-batch.

    The epilogue must hold what does not depend on the optimizer: loss and buffers. ``param_names`` maps the id of each
    Parameter to its canonical name. ``first_epilogue`` is made when the optimizer keeps state. Without an optimizer the
    gradients become outputs named ``grad:<parameter>``. The program is unchanged if this raises.

    Raises:
        OptimizerForeignParameter: the optimizer updates a tensor that ``param_names`` does not hold.
        OptimizerNotTraceable: the optimizer's step cannot become a graph.
    """
    groups = _groups(optimizer, param_names) if optimizer is not None else {}
    carried = [s for s in program.body.output_slots if s.role is Role.CARRY and s.name.startswith("grad:")]
    values = {s.name.removeprefix("grad:"): program.body.outputs[s].meta["val"] for s in carried}
    made: dict[tuple[int, tuple[int, ...], torch.dtype], Update] = {}
    general: dict[tuple[int, torch.dtype, bool], _Traces] = {}
    updates: dict[str, Update] = {}
    for name, value in values.items():
        if name in groups and optimizer is not None:
            group, parameter = groups[name]
            key = (group, tuple(value.shape), value.dtype)
            if key not in made:
                kind = (group, value.dtype, bool(optimizer.state.get(parameter)))
                if value.dim() and kind in general:
                    made[key] = general[kind].update(value)
                else:
                    traces, made[key] = _trace_update(Subject(optimizer, group, parameter), value)
                    general |= {kind: traces} if traces.fit_all else {}
            updates[name] = made[key]
    program.params = {n: replace(p, group=groups[n][0]) if n in groups else p for n, p in program.params.items()}
    if optimizer is not None and max_grad_norm is None:
        values = {name: value for name, value in values.items() if name in updates}
    if any(update.first is not update.later for update in updates.values()):
        program.first_epilogue = copy_section(program.epilogue)
    for section in program.updates():
        first = section is program.first_epilogue
        writer = _Writer(section, values)
        gradients = writer.gradients()
        if max_grad_norm is not None:
            gradients = writer.clip(gradients, max_grad_norm)
        if optimizer is None:
            writer.results |= {Slot(Role.OUTPUT, f"grad:{name}"): node for name, node in gradients.items()}
        for name, update in updates.items():
            writer.update(name, update.group, update.first if first else update.later, gradients[name])
        set_outputs(section, writer.results)


@dataclass(frozen=True)
class Update:
    """The traced update of parameters of one group, shape and dtype: at the first step, without state, and later."""

    group: int
    first: Section
    later: Section


@dataclass(frozen=True)
class _Traces:
    """The recorded update of a parameter of ``subject``'s kind; ``later``: None if it keeps no state."""

    subject: Subject
    first: Trace
    later: Trace | None

    @property
    def fit_all(self) -> bool:
        """Whether they are the update of a parameter of any shape."""
        return self.first.fits_all and (self.later is None or self.later.fits_all)

    def update(self, like: torch.Tensor) -> Update:
        """Of a parameter with the fake value ``like``."""
        name, group = self.subject.name, self.subject.group
        first = template(name, self.first, like, {})
        if self.later is None:
            return Update(group, first, first)
        return Update(group, first, template(name, self.later, like, self.first.types))


def _groups(optimizer: Optimizer, param_names: Mapping[int, str]) -> dict[str, tuple[int, torch.Tensor]]:
    """Parameter name to its group and tensor."""
    groups: dict[str, tuple[int, torch.Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in param_names:
                raise OptimizerForeignParameter(index, position, parameter.shape)
            groups[param_names[id(parameter)]] = (index, parameter)
    return groups


def _trace_update(subject: Subject, like: torch.Tensor) -> tuple[_Traces, Update]:
    if subject.optimizer.state.get(subject.param):
        subject = replace(subject, constructs=True)
    try:
        return _trace_either(subject, like)
    except OptimizerNotTraceable as error:
        if subject.constructs or not isinstance(error.__cause__, KeyError):
            raise
    return _trace_either(replace(subject, constructs=True), like)  # its step expects state that is gone by now


def _trace_either(subject: Subject, like: torch.Tensor) -> tuple[_Traces, Update]:
    choices = subject.capturable_choices
    for choice in choices[:-1]:
        try:
            return _trace_pair(subject, like, choice)
        except OptimizerNotTraceable:
            continue  # it branches on its step count: its capturable form does not
    return _trace_pair(subject, like, choices[-1])


def _trace_pair(subject: Subject, like: torch.Tensor, capturable: bool | None) -> tuple[_Traces, Update]:
    default = COUNTER
    trace = trace_step(subject, None, {}, capturable, default)
    if like.dtype != COUNTER and (traced_shape(like.shape), COUNTER) in trace.types.values():
        default = torch.get_default_dtype()  # it makes state like the parameter in the default dtype
        trace = trace_step(subject, None, {}, capturable, default)
    if not trace.types:
        traces = _Traces(subject, trace, None)
        return traces, traces.update(like)
    again = trace_step(subject, trace.types, trace.fixed, capturable, default)
    if again.types != trace.types or again.fixed != trace.fixed:
        raise OptimizerNotTraceable(subject.name, "its state changes in kind, type or shape from one step to the next")
    traces = _Traces(subject, trace, again)
    return traces, traces.update(like)


class _Writer:
    """Appends to one epilogue; ``values`` holds the fake value of each gradient by parameter name."""

    def __init__(self, section: Section, values: Mapping[str, torch.Tensor]) -> None:
        self.section, self.values = section, values
        self.results = section.outputs
        self.shared: dict[str, fx.Node] = {}  # scalars that depend on a learning rate alone
        self.inputs = section.input_slots

    def input(self, slot: Slot, value: torch.Tensor) -> fx.Node:
        if slot not in self.inputs:
            record = NodeInfo(phase=Phase.UPDATE, module=_module(slot.name.removeprefix("grad:")))
            name = f"lr.{slot.name}" if slot.role is Role.LR else ".".join(filter(None, (slot.name, slot.key)))
            self.inputs[slot] = add_input(self.section, slot, value, record, name)
        return self.inputs[slot]

    def emit(self, origin: str, module: str, target: Any, *args: Any) -> fx.Node:
        record = NodeInfo(phase=Phase.UPDATE, module=module, origin=origin)
        with self.section.graph.inserting_before(self.section.output_node):
            return call(self.section.graph, target, args, record)

    def scale(self, origin: str, name: str, gradient: fx.Node, factor: fx.Node | float) -> fx.Node:
        """The gradient of the parameter ``name`` times ``factor``, in the gradient's own type."""
        value = gradient.meta["val"]
        module = _module(name)
        if isinstance(factor, fx.Node) and not value.dim():  # two scalars promote
            scaled = self.emit(origin, module, aten.mul.Tensor, gradient, factor)
            if scaled.meta["val"].dtype == value.dtype:
                return scaled
            with self.section.graph.inserting_before(self.section.output_node):
                record = NodeInfo(phase=Phase.UPDATE, module=module, origin=f"cast.{origin}")
                return call(self.section.graph, aten._to_copy.default, (scaled,), record, dtype=value.dtype)
        with self.section.graph.inserting_before(self.section.output_node):
            node = self.section.graph.call_function(aten.mul.Tensor, (gradient, factor))
        node.meta = {"val": value, "info": NodeInfo(phase=Phase.UPDATE, module=module, origin=origin)}
        return node

    def gradients(self) -> dict[str, fx.Node]:
        """The step's gradients by parameter name: what the backwards of the micro-batches add up to."""
        return {name: self.input(Slot(Role.CARRY, f"grad:{name}"), value) for name, value in self.values.items()}

    def clip(self, gradients: dict[str, fx.Node], max_norm: float) -> dict[str, fx.Node]:
        """As torch.nn.utils.clip_grad_norm_: scaled by ``min(1, max_norm / (norm + CLIP_EPS))``."""
        by_dtype: dict[torch.dtype, list[fx.Node]] = {}
        for node in gradients.values():
            by_dtype.setdefault(node.meta["val"].dtype, []).append(node)
        squares = [
            self.emit(f"norm.square.{i}", "", gs.sq_norm.default, parts) for i, parts in enumerate(by_dtype.values())
        ]
        if not squares:
            return gradients
        total = squares[0]
        for i, square in enumerate(squares[1:]):
            total = self.emit(f"norm.total.{i}", "", aten.add.Tensor, total, square)
        norm = self.emit("norm.sqrt", "", aten.sqrt.default, total)
        shifted = self.emit("norm.shifted", "", aten.add.Tensor, norm, CLIP_EPS)
        inverse = self.emit("norm.inverse", "", aten.reciprocal.default, shifted)
        scale = self.emit("norm.scale", "", aten.mul.Tensor, inverse, max_norm)
        factor = self.emit("norm.factor", "", aten.clamp.default, scale, None, 1.0)
        return {name: self.scale(f"clip.{name}", name, node, factor) for name, node in gradients.items()}

    def update(self, name: str, group: int, body: Section, gradient: fx.Node) -> None:
        """Instantiate the template ``body`` for the parameter ``name``."""
        graph, made = self.section.graph, {body.input_slots[GRADIENT]: gradient}
        own = {PARAM: Slot(Role.PARAM, name), LR: Slot(Role.LR, str(group))}
        for node, slot in body.inputs.items():
            if slot != GRADIENT and node.users:
                actual = own.get(slot) or Slot(Role.STATE, name, slot.key)
                made[node] = self.input(actual, node.meta["val"])
        constant = _from_lr(body)
        with graph.inserting_before(self.section.output_node):
            for index, node in enumerate(body.nodes()):
                key = ""
                if node in constant:
                    key = str((node.target, *tree_map_only(fx.Node, made.__getitem__, (node.args, dict(node.kwargs)))))
                if key in self.shared:
                    made[node] = self.shared[key]
                    continue
                made[node] = copy_node(graph, node, made.__getitem__)
                origin = f"lr.{group}.{len(self.shared)}" if key else f"update.{name}.{index}"
                record = NodeInfo(phase=Phase.UPDATE, module="" if key else _module(name), origin=origin)
                made[node].meta = {"val": node.meta["val"], "info": record}
                if key:
                    self.shared[key] = made[node]
        for slot, node in body.outputs.items():
            if body.inputs.get(node) != slot:  # unchanged: what is stored stays
                self.results[own.get(slot) or Slot(Role.STATE, name, slot.key)] = made[node]


def _from_lr(body: Section) -> set[fx.Node]:
    """Operations that depend on the learning rate and on nothing else: the same for every parameter of a group."""
    found = {body.input_slots[LR]}
    for node in body.nodes():
        if node.all_input_nodes and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def is_elementwise(program: Program) -> bool:
    """Whether every parameter's update may run on flat shards; decided on the graph, not by the optimizer's name."""
    return _offending(program) is None


def check_elementwise(program: Program, optimizer: str) -> None:
    """Refuse ``optimizer`` (its name, for the message) for a plan that shards its work.

    Raises:
        OptimizerNotElementwise: names the first operator that is not elementwise, and the parameter.
    """
    found = _offending(program)
    if found is not None:
        raise OptimizerNotElementwise(*found, optimizer)


def _offending(program: Program) -> tuple[str, str] | None:
    """An operator of an update that reads several elements of a parameter for one of its result; the parameter."""
    for section in program.updates():
        inputs = section.input_slots
        own: dict[str, list[fx.Node]] = {}
        for slot, node in inputs.items():
            if slot.role in (Role.PARAM, Role.STATE) or slot.name.startswith("grad:"):
                own.setdefault(slot.name.removeprefix("grad:"), []).append(node)
        for name, nodes in own.items():
            param: Param = program.params[name]
            for node in downstream(nodes, stop=is_pooled):
                if not _elementwise(node, param.shape):
                    return str(node.target), name
    return None


def _elementwise(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Pointwise, and its operands are scalars or of the parameter's shape: a row vector would broadcast. A complex
    element counts as its two parts, too."""
    parts = (*shape, 2)
    shapes = {tuple(n.meta["val"].shape) for n in [node, *node.all_input_nodes]} - {()}
    if node.target in COMPLEX_PARTS:
        return shapes == {shape, parts} - {()}
    if not (is_pointwise(node) or node.target in _CREATION):
        return False
    return shapes in (set(), {shape}, {parts})
