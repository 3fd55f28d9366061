"""Run a model on fake tensors under AOTAutograd: the joint graph, and what its inputs and outputs stand for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from graphshard import fake
from graphshard.errors import GraphshardError
from graphshard.trace.attributes import unchanged
from graphshard.trace.autocast import Casts
from graphshard.trace.caches import kept_free, kept_tensor, places_of
from graphshard.trace.call import Output, Request, call
from graphshard.trace.context import backward_placed, capturing, watching
from graphshard.trace.errors import translate
from graphshard.trace.generators import draws_refused
from graphshard.trace.layout import KeptLayout
from graphshard.trace.model import ModelTensors, fake_tensors, swapped
from graphshard.trace.operators import NoChecksOfGradients

logger = logging.getLogger("graphshard")


@dataclass(frozen=True)
class Port:
    """What an input or output of the joint graph stands for.

    ``kind``: inputs are "param", "buffer", "batch" and "tangent"; outputs "result", "grad" (of a parameter), and
    "param", "buffer" or "batch" for what the forward pass wrote there. ``index`` counts parameters, buffers, leaves of
    the batch, or results.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Joint:
    """The joint graph; forward alone unless the request is to train. Results are the loss, or the output's tensors."""

    module: fx.GraphModule
    inputs: dict[fx.Node, Port]
    outputs: list[tuple[Port, fx.Node]]
    mode: fake.FakeTensorMode
    output: Output


def trace_joint(request: Request, tensors: ModelTensors) -> Joint:
    """Capture the graph.

    Raises:
        GraphshardError: the subclass that names what cannot be captured, with the line of the model.
    """
    # With it comes TorchDynamo: two seconds that who captures nothing need not wait.
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    step = Step(request, tensors)
    with (
        draws_refused(step.run_again),
        capturing(request.model, request.train, request.lower),
        step.left_alone(),
        backward_placed(step.held),
        KeptLayout(),  # type: ignore[no-untyped-call]
        NoChecksOfGradients(),  # type: ignore[no-untyped-call]
        contextlib.ExitStack() as stack,
    ):
        try:
            traced = aot_export_joint_with_descriptors(stack, step, tuple(step.batch_values))
        except GraphshardError:
            raise
        except Exception as error:
            raise kept_tensor(error) or translate(error, "the model or its loss function") from error
    graph = traced.graph_module.graph
    inputs = {node: _port(node.meta["desc"], step) for node in graph.nodes if node.op == "placeholder"}
    returned = graph.output_node()
    pairs = zip(returned.meta["desc"], returned.args[0], strict=True)  # type: ignore[arg-type]
    outputs = [(_port(desc, step), value) for desc, value in pairs if isinstance(value, fx.Node)]
    for change in sorted(step.changes):
        logger.warning("graphshard: the forward pass changes %s; a compiled step repeats the first", change)
    for line in sorted(step.unchecked):
        logger.warning("graphshard: a compiled step does not check the values that eager training does in %s", line)
    for kind in step.output.dropped:
        logger.warning("graphshard: the model returns a %s, which is no pytree of tensors: it becomes None", kind)
    return Joint(traced.graph_module, inputs, outputs, step.mode, step.output)


class Step(nn.Module):
    """What AOTAutograd sees: a module with one parameter per tensor of the model, whatever its aliases."""

    def __init__(self, request: Request, tensors: ModelTensors) -> None:
        super().__init__()
        self.request = request
        self.modules_run = tuple(m for m in (request.model, request.loss_fn) if isinstance(m, nn.Module))
        self.places = places_of(self.modules_run, request.loss_fn)
        self.tensors = tensors
        self.held = tensors.all()
        self.mode = fake.new_mode()
        self.changes: set[str] = set()
        self.unchecked: set[str] = set()  # lines of the model whose checks of values are left out
        self.replaced: set[str] = set()  # buffers; AOTAutograd runs this once to see what is written, then to trace it
        self.output = Output()
        self.batch = [i for i, leaf in enumerate(request.leaves) if isinstance(leaf, Tensor)]
        leaves = [request.leaves[i] for i in self.batch]
        # Contiguous, as executors hand them over.
        self.batch_values = [fake.fresh(self.mode, v.shape, v.dtype) for v in leaves]
        for i, value in enumerate(fake_tensors(tensors.params, self.mode, request.train)):
            self.register_parameter(f"p{i}", value)  # type: ignore[arg-type]
        for i, value in enumerate(fake_tensors(tensors.buffers, self.mode, request.train)):
            self.register_buffer(f"b{i}", value)

    def forward(self, *batch: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.request.leaves)
        for i, value in zip(self.batch, batch, strict=True):
            leaves[i] = value
        values = [v for v in (*self._parameters.values(), *self._buffers.values()) if v is not None]
        with self.left_alone(), swapped(self.held, values, self.replaced) as shown:
            casts = None if self.request.lower is None else Casts([*batch, *shown[len(self._parameters) :]])
            with watching(self.held, casts, self.unchecked):
                results, self.output = call(self.request, leaves)
        # For a result that is a view or an input AOTAutograd would return something else in its place.
        return tuple(result.clone() for result in results)

    @contextlib.contextmanager
    def left_alone(self) -> Iterator[None]:
        """What the model changes meanwhile is put back. A backward does that, too: checkpoints run the model again."""
        with unchanged(self.modules_run, self.changes), kept_free(self.places, self.mode):
            yield

    def run_again(self) -> None:
        """Run the model once more, with new fake tensors."""
        other = Step(self.request, self.tensors)
        with capturing(self.request.model, self.request.train, self.request.lower), other.mode:
            other(*other.batch_values)


def _port(descriptor: Any, step: Step) -> Port:
    """Translate a descriptor of AOTAutograd; its classes are private, so they are known by name."""
    match type(descriptor).__name__:
        case "ParamAOTInput":
            return Port("param", int(descriptor.target[1:]))
        case "BufferAOTInput":
            return Port("buffer", int(descriptor.target[1:]))
        case "PlainAOTInput":
            return Port("batch", step.batch[descriptor.idx])
        case "TangentAOTInput":
            return Port("tangent", 0)
        case "PlainAOTOutput":
            return Port("result", descriptor.idx)
        case "GradAOTOutput":
            of = _port(descriptor.grad_of, step)
            return Port("grad" if of.kind == "param" else "ignored", of.index)
        case "InputMutationAOTOutput":
            return _port(descriptor.mutated_input, step)
    raise AssertionError(f"AOTAutograd's {descriptor} has no meaning here")
