"""A Program written in Python: what graph text says, without the text.

::

    build = ProgramBuilder("dp=2", microbatches=2)
    body = build.body
    w, x = body.param("lin.w", [4, 8]), body.batch(0, [2, 4])
    y = body.op("aten.mm.default", x, w, module="lin")
    build.loss(body.op("aten.sum.default", y, module="lin"))
    program = build.program()

Values are nodes, typed when they are made, as parsing does it. Nothing is differentiated: a backward is written like
the rest, or left to :func:`graphshard.testing.trainable`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphshard import fake
from graphshard.errors import BadBuild
from graphshard.mesh import Mesh
from graphshard.program import NodeInfo, Param, Phase, Program, Role, Section, Slot, empty_section, info
from graphshard.rewrite import add_input
from graphshard.text.spelling import first_line
from graphshard.trace.carries import Carries
from graphshard.verify import verify

aten = torch.ops.aten


class GraphBuilder:
    """One graph of a program: ``ProgramBuilder.prologue``, ``.body`` or ``.epilogue``."""

    def __init__(self, program: Program, section: Section, mode: fake.FakeTensorMode) -> None:
        self._program, self._section, self._mode = program, section, mode
        self._phase = Phase.FORWARD if section is program.body else Phase.UPDATE

    def param(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> fx.Node:
        """The parameter ``name``, of ``shape``; the same node if this graph reads it already."""
        known = self._program.params.setdefault(name, Param(name, tuple(shape), dtype))
        if (known.shape, known.dtype) != (tuple(shape), dtype):
            raise BadBuild(f"parameter {name!r} is {known.dtype} {list(known.shape)}, not {dtype} {list(shape)}")
        return self.read(Slot(Role.PARAM, name), shape, dtype, name.rpartition(".")[0])

    def batch(self, index: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> fx.Node:
        """Tensor ``index`` of a micro-batch; ``shape`` is that of one micro-batch."""
        return self.read(Slot(Role.BATCH, str(index)), shape, dtype)

    def read(self, slot: Slot, shape: Sequence[int], dtype: torch.dtype = torch.float32, module: str = "") -> fx.Node:
        """Whatever ``slot`` holds: a buffer, a carry, optimizer state."""
        if (known := self._section.input_slots.get(slot)) is not None:
            return known
        record = NodeInfo(phase=self._phase, module=module)
        value = fake.tensor(self._mode, shape, dtype)
        return add_input(self._section, slot, value, record, slot.name if slot.role is not Role.BATCH else "x")

    def op(
        self,
        operator: str | torch._ops.OpOverload,
        *args: Any,
        name: str | None = None,
        module: str = "",
        forward: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """An operation, as the graph's last.

        Args:
            operator: such as ``"aten.mm.default"``, or the operator itself.
            args, kwargs: as the operator takes them, nodes for tensors.
            name: of the node; None: made from the operator's.
            module: path of the module that the operation belongs to.
            forward: the operation this one differentiates: it is of phase backward and of that one's module.

        Raises:
            BadBuild: no such operator, or one that does not take these arguments.
        """
        target = _operator(operator) if isinstance(operator, str) else operator
        try:
            with fake.quiet():
                value = fake.infer(self._mode, target, args, kwargs)
        except Exception as error:  # whatever the operator raises for arguments that do not fit
            raise BadBuild(f"{target} does not take these arguments: {first_line(error)}") from None
        record = NodeInfo(phase=self._phase, module=module)
        if forward is not None:
            of = info(forward)
            record = NodeInfo(phase=Phase.BACKWARD, module=module or of.module, forward=of.origin)
        graph = self._section.graph
        with graph.inserting_before(self._section.output_node):
            node: fx.Node = graph.create_node("call_function", target, args, kwargs, name)
        node.meta = {"val": value, "info": replace(record, origin=node.name)}
        return node


class ProgramBuilder:
    """A captured program in the making.

    Args:
        mesh: axes and sizes, such as ``"pp=2 dp=2"``.
        microbatches: per step and data-parallel rank.
    """

    def __init__(self, mesh: str = "", microbatches: int = 1) -> None:
        self._mode = fake.new_mode()
        sections = [empty_section() for _ in range(3)]
        self._program = Program(
            prologue=sections[0],
            body=sections[1],
            epilogue=sections[2],
            mesh=Mesh.parse(mesh),
            microbatches=microbatches,
        )
        self._carries = Carries(self._program, self._mode)
        self._gradients: dict[str, tuple[int, ...]] = {}
        self.prologue, self.body, self.epilogue = (GraphBuilder(self._program, s, self._mode) for s in sections)

    def loss(self, value: fx.Node) -> None:
        """``value`` of the body, a scalar, is a micro-batch's loss; the step returns its mean."""
        if tuple(value.meta["val"].shape):
            raise BadBuild(f"%{value.name} has shape {list(value.meta['val'].shape)}; a loss is a scalar")
        self._carries.loss(value)

    def gradient(self, name: str, value: fx.Node) -> None:
        """``value`` of the body is a micro-batch's gradient of the parameter ``name``: it is summed over them."""
        param = self._program.params.get(name)
        if param is None:
            known = ", ".join(self._program.params) or "none"
            raise BadBuild(f"a gradient of {name!r}, which no graph reads; parameters: {known}")
        if param.shape != tuple(value.meta["val"].shape):
            shape = list(value.meta["val"].shape)
            raise BadBuild(f"%{value.name} has shape {shape}; a gradient of {name!r} has {list(param.shape)}")
        self._carries.gradient(name, value)
        self._gradients[name] = param.shape

    def output(self, index: int, value: fx.Node) -> None:
        """``value`` of the body is tensor ``index`` of the model's output, one for each micro-batch."""
        self._carries.output(index, value)

    def write(self, slot: Slot, value: fx.Node) -> None:
        """``value`` of the epilogue is what ``slot`` holds at the next step."""
        self._carries.last[slot] = value

    def sgd(self, lr: float = 0.1) -> None:
        """Every parameter with a gradient becomes itself less ``lr`` times the gradient's mean over micro-batches."""
        for name, shape in self._gradients.items():
            dtype, module = self._program.params[name].dtype, name.rpartition(".")[0]
            param = self.epilogue.param(name, shape, dtype)
            gradient = self.epilogue.read(Slot(Role.CARRY, f"grad:{name}"), shape, dtype, module)
            step = self.epilogue.op(aten.mul.Tensor, gradient, lr / self._program.microbatches, module=module)
            self.write(Slot(Role.PARAM, name), self.epilogue.op(aten.sub.Tensor, param, step, module=module))
            self._program.params[name] = replace(self._program.params[name], group=0)

    def program(self) -> Program:
        """The program, verified.

        Raises:
            IllegalProgram: what was built breaks a rule of captured programs.
        """
        params = self._program.params
        self._program.params = {n: replace(p, has_grad=n in self._gradients) for n, p in params.items()}
        self._carries.finish()
        verify(self._program)
        return self._program


def _operator(name: str) -> Any:
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or " ", None)
    if isinstance(found, torch._ops.OpOverload):
        return found
    near = difflib.get_close_matches(name if overload else f"{name}.default", fake.operator_names(), n=1)
    raise BadBuild(
        f"no operator {name!r}; " + (f"did you mean {near[0]!r}?" if near else "expected aten.name.overload")
    )
