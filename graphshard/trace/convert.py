"""From AOTAutograd's joint graph to the body and prologue of a Program."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from graphshard import fake
from graphshard.carried import keep_for_later
from graphshard.dataflow import is_view, owns_memory
from graphshard.errors import (
    ParameterOutsideModel,
    ParameterWritten,
    TensorKeptOutside,
    TensorWithoutValue,
    UncapturableOperator,
    UnknownRandomOperator,
)
from graphshard.program import NodeInfo, Param, Phase, Program, Role, Section, Slot, copy_node, empty_section
from graphshard.rewrite import add_input, call, drop_dead
from graphshard.trace.autocast import AS_GIVEN
from graphshard.trace.caches import empty_everywhere
from graphshard.trace.carries import Carries
from graphshard.trace.errors import NO_FUNCTIONS
from graphshard.trace.joint import Joint, Port
from graphshard.trace.marks import line_of, module_of, where
from graphshard.trace.model import HOOK, ModelTensors
from graphshard.trace.random import Made, Sampler

aten = torch.ops.aten


def convert(
    joint: Joint, tensors: ModelTensors, params: Mapping[str, Param], microbatches: int, train: bool
) -> Program:
    """The Program of one micro-batch's graph: carries added, the epilogue averages the loss and writes buffers.

    Raises:
        GraphshardError: the subclass that names an operator or a use of a tensor that a Program cannot hold.
    """
    body = _Body(joint, tensors, microbatches)
    outputs = body.build()
    trained = {tensors.params[port.index].name for port, _ in outputs if port.kind == "grad"}
    program = Program(
        body.section,
        microbatches=microbatches,
        params={n: replace(p, has_grad=n in trained) for n, p in params.items()} if train else dict(params),
        constants=body.constants,
        sources=body.sources,
    )
    carries = Carries(program, body.mode)
    for port, node in outputs:
        match port.kind:
            case "result" if joint.output.spec is None:
                carries.loss(node)
            case "result":
                carries.output(joint.output.tensors[port.index], node)
            case "grad":
                carries.gradient(tensors.params[port.index].name, node)
            case "buffer":
                carries.buffer(tensors.buffers[port.index].name, node)
            case "param":
                raise ParameterWritten(tensors.params[port.index].name)
    carries.finish()
    keep_for_later(program.body)
    drop_dead(program.body)
    return program


@dataclass
class _Body:
    """Copies the joint graph node by node."""

    joint: Joint
    tensors: ModelTensors
    microbatches: int
    section: Section = field(default_factory=empty_section)
    constants: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    made: dict[fx.Node, Any] = field(default_factory=dict)  # a node, one for each of several results, or a number

    def build(self) -> list[tuple[Port, fx.Node]]:
        """Fill the section; returns what it computes, by what it stands for."""
        graph = self.section.graph
        nodes = list(self.joint.module.graph.nodes)
        self.forward_of = _forward_nodes(nodes)
        self.known = {_memory(held.tensor): held for held in self.tensors.all() if held.tensor.numel()}
        self.mode = self.joint.mode
        self.sampler = Sampler(self.section, self.mode)
        for node, port in self.joint.inputs.items():
            if node.users and port.kind in ("param", "buffer", "batch"):
                self.made[node] = self._input(node, port)
        tangents = [node for node, port in self.joint.inputs.items() if port.kind == "tangent"]
        nodes = [node for node in nodes if node not in self.joint.inputs]
        with graph.inserting_before(self.section.output_node):
            for node in nodes:
                if node.meta.get("partitioner_tag") == "is_backward" and tangents:
                    tangent = tangents.pop()
                    self.made[tangent] = self._share(tangent)
                if node.op == "call_function":
                    self.made[node] = self._operation(node)
                elif node.op == "get_attr":
                    self.made[node] = self._constant(node)
        results: list[tuple[Port, fx.Node]] = []
        seen: set[fx.Node] = set()
        for port, node in self.joint.outputs:
            if port.kind != "ignored":
                results.append((port, self._result(self.made[node], seen)))
                seen.add(results[-1][1])
        return results

    def _input(self, node: fx.Node, port: Port) -> fx.Node:
        match port.kind:
            case "param":
                name = self.tensors.params[port.index].name
                slot = Slot(Role.PARAM, name)
            case "buffer":
                name = self.tensors.buffers[port.index].name
                slot = Slot(Role.BUFFER, name)
            case _:
                name, slot = f"batch{port.index}", Slot(Role.BATCH, str(port.index))
        module = name.rpartition(".")[0] if port.kind != "batch" else ""
        return add_input(self.section, slot, _plain(node.meta["val"]), NodeInfo(module=module), name)

    def _share(self, node: fx.Node) -> fx.Node:
        """The gradient of the step's loss with respect to the micro-batch's; see loss_gradient.py."""
        value = node.meta["val"]
        record = NodeInfo(phase=Phase.BACKWARD, origin=node.name)
        share, options = 1.0 / self.microbatches, {"dtype": value.dtype, "device": value.device}
        return call(self.section.graph, aten.full.default, ([], share), record, **options)

    def _constant(self, node: fx.Node) -> fx.Node:
        value = getattr(self.joint.module, str(node.target))
        read = next(iter(node.users))
        if isinstance(value, torch.Generator):
            raise UnknownRandomOperator("that is given a generator", where(read))
        if not isinstance(value, Tensor):
            raise UncapturableOperator("a nested graph", where(read), NO_FUNCTIONS)
        if isinstance(value, FakeTensor):
            raise TensorKeptOutside(where(read), empty_everywhere())
        if value.layout is not torch.strided:
            raise UncapturableOperator("a sparse tensor", where(read), "make it a dense one, see to_dense()")
        if _memory(value) in self.known:
            raise ParameterOutsideModel(self.known[_memory(value)].name, where(read))
        if value.is_meta:
            raise TensorWithoutValue(where(read))
        for name, other in self.constants.items():
            if other is value:
                return self.section.input_slots[Slot(Role.CONSTANT, name)]
        name = f"c{len(self.constants)}"
        self.constants[name] = value.detach()
        kind = fake.tensor(self.mode, value.shape, value.dtype, value.stride(), value.device)
        return add_input(self.section, Slot(Role.CONSTANT, name), kind, NodeInfo(), name)

    def _operation(self, node: fx.Node) -> Made | complex:
        target: Any = node.target
        record = self._record(node)
        if target is operator.getitem:
            made, index = self.made[node.args[0]], node.args[1]  # type: ignore[index]
            if isinstance(made, tuple):
                return made[index]  # type: ignore[index, no-any-return]
        elif is_view(node) and not node.all_input_nodes:
            # Autograd's conjugate of the number in x * 1j: a number too, which leaves a product its operand's dtype.
            return target(*node.args).item()  # type: ignore[no-any-return]
        else:
            self._check(node)
            random = self.sampler.replace(node, self.made, record, lambda: where(node))
            if random is not None:
                return random
        copy = copy_node(self.section.graph, node, self.made.__getitem__)
        copy.meta = {"val": _plain(node.meta["val"]), "info": record}
        return copy

    def _check(self, node: fx.Node) -> None:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise UncapturableOperator(str(getattr(target, "name", lambda: target)()), where(node), NO_FUNCTIONS)
        if target.namespace not in ("aten", "prims", "graphshard"):
            instead = "only ATen operators can be part of a program; write it with them"
            raise UncapturableOperator(str(target), where(node), instead)
        if target._schema.is_mutable:
            raise UncapturableOperator(str(target), where(node), "use an operator that returns its result")
        results = [leaf for leaf in tree_leaves(node.meta["val"]) if isinstance(leaf, Tensor)]
        if any(result.layout is not torch.strided for result in results):
            instead = "it makes a sparse tensor; use dense ones (of an embedding: sparse=False)"
            raise UncapturableOperator(str(target), where(node), instead)

    def _record(self, node: fx.Node) -> NodeInfo:
        if node.meta.get("partitioner_tag") != "is_backward":
            if (line := line_of(node)) is not None:
                self.sources[node.name] = f"{line[0]}:{line[1]}"
            as_given = bool(node.meta.get("custom", {}).get(AS_GIVEN))
            return NodeInfo(module=module_of(node), origin=node.name, as_given=as_given)
        if node.meta.get("custom", {}).get(HOOK):
            return NodeInfo(Phase.BACKWARD, module_of(node), node.name, as_given=True)
        forward = self.forward_of.get(node.meta.get("seq_nr"))
        if forward is None:
            return NodeInfo(phase=Phase.BACKWARD, origin=node.name)
        return NodeInfo(Phase.BACKWARD, module_of(forward), node.name, forward.name)

    def _result(self, result: fx.Node, others: set[fx.Node]) -> fx.Node:
        """The node to return: not the copy that capture makes of a result, if that is a value of its own."""
        if result.target is aten.clone.default and not result.users:
            source: Any = result.args[0]
            if owns_memory(source) and source not in others:
                return source  # type: ignore[no-any-return]
        return result


def _forward_nodes(nodes: list[fx.Node]) -> dict[int | None, fx.Node]:
    """The forward node of each sequence number.

    It is the first one: autograd counts when it records an operator, and what needs no gradient runs under the number
    of the operator before it. The last number is that of the copy of the loss, whose backward has no nodes; autograd's
    own additions of gradients run under it.
    """
    found: dict[int | None, fx.Node] = {}
    for node in nodes:
        if node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward":
            number = node.meta.get("seq_nr")
            if number is not None and node.target is not operator.getitem:
                found.setdefault(number, node)
    if found:
        del found[max(number for number in found if number is not None)]
    return found


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _plain(value: Any) -> Any:
    """A value without autograd's history."""
    return tree_map_only(Tensor, lambda t: t.detach() if t.requires_grad else t, value)
