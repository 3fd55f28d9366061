"""What graphshard writes for a GPU for one function, forward and backward, and for an optimizer's update: captured,
passed and emitted as in any compilation, with or without a GPU at hand.

A function stands between matrix products, which no region crosses: its operands are products, its result is an operand
of one, so that neither parameters' storage nor the loss have a part in what is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

import graphshard
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.segments import emit
from graphshard.codegen.triton import supports
from graphshard.communication import communicates
from graphshard.dataflow import downstream, is_getitem, is_view, resolve, upstream
from graphshard.execution import Kernel, Segment
from graphshard.passes.fuse import Fuse
from graphshard.program import Phase, Program, Role, Section, info, val
from graphshard.region import Region, region_of
from graphshard.runtime.arena import Placing
from graphshard.runtime.segments import compile_segments

gs = torch.ops.graphshard

Function = Callable[..., Tensor]


@dataclass
class Written:
    """Code for some operations; ``inputs`` and ``outputs`` are the nodes that its arguments and results are."""

    inputs: list[fx.Node]
    outputs: list[fx.Node]
    segment: Segment
    kernels: dict[str, Kernel]
    meaning: list[fx.Node]  # the operations, regions among them, in order
    coordinates: dict[str, int] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """The kernels that it calls, with what was chosen for each."""
        return "; ".join(kernel.how for kernel in self.kernels.values()) or "torch's own operators"

    def arguments(self, device: torch.device) -> list[Tensor]:
        """Values of the types that it takes; whole numbers are classes of rows."""
        return [_drawn(val(node), device) for node in self.inputs]

    def runner(self, device: torch.device) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
        """Run it on arguments, some of which it may overwrite."""
        function = compile_segments({self.segment.name: self.segment}, self.kernels)[self.segment.name]
        memory = Placing(device).of_run(0, self.segment.places)
        return lambda arguments: function(list(arguments), self.coordinates, device, memory)

    def expected(self, arguments: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        """What it means: every operation of torch by itself."""
        known: dict[fx.Node, Any] = dict(zip(self.inputs, arguments, strict=True))

        def here(leaf: Any) -> Any:
            return device if isinstance(leaf, torch.device) else leaf

        for node in self.meaning:
            args, kwargs = tree_map_only(fx.Node, lambda n: known[resolve(n)], (node.args, dict(node.kwargs)))
            if isinstance(node.target, Region):
                known[node] = node.target.run(args, here)
            elif node.target is gs.local_shard.default:
                known[node] = args[0].chunk(args[1])[self.coordinates[args[2]]]
            else:
                assert callable(node.target)
                args, kwargs = tree_map_only(torch.device, here, (args, kwargs))
                known[node] = node.target(*args, **kwargs)
        return tuple(known[node] for node in self.outputs)


class Between(nn.Module):
    """``function`` of products with parameters, and of parameters that are vectors; the result goes into a product,
    unless it is a scalar."""

    def __init__(self, function: Function, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.function, self.shapes = function, shapes
        vectors = [(1, shape[-1]) if len(shape) > 1 else shape for shape in shapes]
        self.operands = nn.ParameterList([nn.Parameter(torch.empty(*vector, dtype=dtype)) for vector in vectors])

    def forward(self, column: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self.operands, self.shapes, strict=True)
        operands = [torch.mm(column, p) if len(shape) > 1 else p for p, shape in pairs]
        if not other.is_floating_point():
            return self.function(*operands, other)
        return torch.mm(self.function(*operands).reshape(1, -1), other.reshape(-1, 1)).view(())


def function_code(
    function: Function, shapes: Sequence[Sequence[int]], dtype: torch.dtype, other: Tensor
) -> dict[str, Written]:
    """The code of ``function`` of operands of ``shapes``, and of its backward: "forward", "backward".

    ``other``: whole numbers that the function, a loss, takes last; or a tensor of its result's shape and dtype. Under
    "forward alone" and "backward alone" is what all of either would be as one region, where that is not what it is.
    """
    with torch.device("meta"):
        model = Between(function, shapes, dtype)
    rows = next(shape[0] for shape in shapes if len(shape) > 1)
    inputs = (torch.empty(rows, 1, dtype=dtype), other)
    compiling = functools.partial(
        graphshard.compile, model, "dp1", example_inputs=inputs, device="cuda", executor="none"
    )
    program = Kernels(on_gpu=True).chosen(compiling().program)
    written = {
        name: _emitted(program, program.body, *part, Kernels(on_gpu=True))
        for name, part in _parts(program.body).items()
    }
    whole = compiling(passes=[Fuse(most=1)]).program.body
    for name, (nodes, outputs) in _parts(whole).items():
        if (alone := _as_one(nodes, outputs)) is not None and not _is_one(written[name]):
            written[f"{name} alone"] = alone
    return written


def update_code(parameters: Sequence[Sequence[int]], plan: str, optimizer: Callable[..., Any]) -> Written:
    """The update of a rank's half of parameters of these shapes, in flat shards."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(inner, outer, bias=False) for outer, inner in parameters])
    compiled = graphshard.compile(
        model,
        plan,
        loss_fn=nn.functional.mse_loss,
        optimizer=optimizer,
        world_size=2,
        example_inputs=(torch.empty(2, parameters[0][1]), torch.empty(2, parameters[-1][0])),
        device="cuda",
        executor="none",
    )
    kernels = Kernels(on_gpu=True)
    program = kernels.chosen(compiled.program)
    section = program.epilogue
    nodes = [node for node in section.nodes() if not communicates(node)]
    inside = set(nodes)
    stored = set(section.outputs.values())
    outputs = [n for n in nodes if n in stored or any(user not in inside for user in n.users)]
    return _emitted(program, section, nodes, [n for n in outputs if not isinstance(val(n), tuple)], kernels)


def _parts(body: Section) -> dict[str, tuple[list[fx.Node], list[fx.Node]]]:
    """The operations between the products, and those whose results are read outside, by phase."""
    products = [node for node in body.nodes() if _is_product(node)]
    first = [node for node in products if _is_forward(node) and not _reads_products(node)]
    reached = {*first, *downstream(first)}
    ends: dict[str, list[fx.Node]] = {"forward": [], "backward": []}
    for node in body.nodes():
        if _is_product(node) or node.target is gs.pack.default or _accumulates(node, body):
            ends["forward" if _is_forward(node) else "backward"] += [n for n in node.all_input_nodes if n in reached]
    if any(_is_product(user) for node in ends["forward"] for user in node.users):  # it ends there, not in the loss
        ends["forward"] = [n for n in ends["forward"] if any(_is_product(user) for user in n.users)]
    inside: dict[str, list[fx.Node]] = {}
    for name in ("backward", "forward"):
        forward, found = name == "forward", ends[name]
        border = {n for n in body.nodes() if _is_product(n) or _is_forward(n) is not forward or _shows_input(n)}
        border |= {n for n in body.nodes() if n.target is gs.pack.default or _accumulates(n, body)}
        needed = upstream([n for n in found if n not in border], stop=border.__contains__)
        inside[name] = [n for n in body.nodes() if n in needed and n not in border]
        if not forward:  # what the backward reads of it is made as well
            ends["forward"] += [s for n in inside[name] for s in n.all_input_nodes if _is_forward(s) and s in reached]
    return {name: (inside[name], [n for n in inside[name] if n in ends[name]]) for name in ("forward", "backward")}


def _is_product(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.mm.default


def _is_forward(node: fx.Node) -> bool:
    return info(node).phase is Phase.FORWARD


def _reads_products(node: fx.Node) -> bool:
    return any(_is_product(source) for source in upstream(node.all_input_nodes, stop=lambda n: False))


def _accumulates(node: fx.Node, body: Section) -> bool:
    slots = [body.inputs.get(source) for source in node.all_input_nodes]
    return any(slot is not None and slot.role is Role.CARRY for slot in slots)


def _shows_input(node: fx.Node) -> bool:
    """A view of what is stored: where it lies is no matter here."""
    return is_view(node) and all(source.op == "placeholder" for source in node.all_input_nodes)


def _emitted(
    program: Program, section: Section, nodes: list[fx.Node], outputs: list[fx.Node], kernels: Kernels
) -> Written:
    """What code generation writes for them."""
    made = emit("measured", nodes, outputs, section, kernels)
    coordinates = dict.fromkeys((axis for axis, _ in program.mesh.axes), 0)
    return Written(made.inputs, outputs, made.segment, kernels.table, nodes, coordinates)


def _as_one(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Written | None:
    """All of it as one region, if there is a kernel for that."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside))
    region = region_of(nodes, inputs, outputs)
    if not outputs or supports(region):
        return None
    kernel = Kernels(on_gpu=True).add(region, {})
    names = ", ".join(f"args[{index}]" for index in range(len(inputs)))
    result = "result" if len(outputs) > 1 else "(result,)"
    head = "def alone(args, coordinates, device, memory):"
    source = f"{head}\n    result = kernels.{kernel.name}({names})\n    return {result}\n"
    segment = Segment("alone", source, tuple(n.name for n in inputs), tuple(n.name for n in outputs))
    return Written(inputs, list(outputs), segment, {kernel.name: kernel}, list(nodes))


def _is_one(written: Written) -> bool:
    """Whether one kernel is all that the code runs."""
    computing = [n for n in written.meaning if not is_view(n) and not is_getitem(n)]
    return len(computing) == 1 and isinstance(computing[0].target, Region) and len(written.kernels) == 1


def _drawn(like: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if not like.dtype.is_floating_point:
        return made.random_(0, 2) if like.dtype is torch.bool else made.random_(0, 64)
    return made.uniform_(0.25, 1.25)
