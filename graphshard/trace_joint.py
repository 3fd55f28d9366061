"""Run a model on fake tensors under AOTAutograd: the joint graph, and what its inputs and outputs stand for."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx.traceback
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphshard import attention, fake
from graphshard.errors import GraphshardError, LossNotScalar, LossWithoutGradient, NoLoss
from graphshard.trace_errors import calling_line, translate
from graphshard.trace_model import (
    ModelTensors,
    device_of,
    evaluating,
    fake_tensors,
    swapped,
    unchanged,
)

logger = logging.getLogger("graphshard")

Mode = Literal["train", "evaluate", "call"]
LossFn = Callable[..., Tensor]

MODULE, LINE = "graphshard.module", "graphshard.line"
"""Keys of ``node.meta["custom"]`` in the joint graph: the module's path, and the user's (file, line)."""


@dataclass(frozen=True)
class Request:
    """What to capture. ``leaves`` are the flattened (args, kwargs); only types of tensors are read."""

    model: nn.Module
    loss_fn: LossFn | None
    mode: Mode
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True)
class Port:
    """What an input or output of the joint graph stands for.

    ``kind``: inputs are "param", "buffer", "batch" and "tangent"; outputs "result", "grad" (of the parameter), and "param", "buffer",
    "batch" for what the forward pass wrote there. ``index`` counts parameters, buffers, leaves of the batch or results.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Joint:
    """The joint graph (forward alone without ``train``). ``results`` is the loss, or the leaves of the model's output."""

    module: fx.GraphModule
    inputs: dict[fx.Node, Port]
    outputs: list[tuple[Port, fx.Node]]
    mode: fake.FakeTensorMode
    trained: bool
    output_leaves: tuple[Any, ...]  # of a call: None where a tensor belongs
    output_tensors: tuple[int, ...]  # which leaves those are
    out_spec: pytree.TreeSpec | None  # None but for a call


def trace_joint(request: Request, tensors: ModelTensors) -> Joint:
    """Capture the graph.

    Raises:
        GraphshardError: the subclass that names what cannot be captured, with the line of the model.
    """
    step = _Step(request, tensors)
    inputs = step.fake_batch()
    train = request.mode == "train"
    with contextlib.ExitStack() as stack:
        for context in _surroundings(request, train):
            stack.enter_context(context)
        try:
            traced = aot_export_joint_with_descriptors(stack, step, tuple(inputs))
        except GraphshardError:
            raise
        except Exception as error:
            raise translate(error, "the model or its loss function") from error
    graph = traced.graph_module.graph
    placeholders = {n: _port(n.meta["desc"], step) for n in graph.nodes if n.op == "placeholder"}
    returned = graph.output_node()
    values: Any = returned.args[0]
    outputs = [
        (_port(desc, step), value)
        for desc, value in zip(returned.meta["desc"], values, strict=True)
        if isinstance(value, fx.Node)
    ]
    leaves = step.output_leaves
    tensors_at = tuple(i for i, leaf in enumerate(leaves) if leaf is _TENSOR)
    plain = tuple(None if leaf is _TENSOR else leaf for leaf in leaves)
    return Joint(traced.graph_module, placeholders, outputs, step.mode, train, plain, tensors_at, step.out_spec)


def _surroundings(request: Request, train: bool) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """What must hold while the model runs; all of it is undone afterwards."""
    yield warnings.catch_warnings()
    yield torch.inference_mode(False)
    yield torch.set_grad_enabled(train)
    yield unchanged(request.model)
    if not train:
        yield evaluating(request.model)
    # Libraries ask this before they look at values of tensors.
    yield fake.compiling()
    yield torch.fx.traceback.preserve_node_meta()
    yield _fast_path_off()
    yield _module_paths(request.model)


@contextlib.contextmanager
def _fast_path_off() -> Iterator[None]:
    """nn.TransformerEncoder's fused kernels for inference are no part of a portable graph."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Nodes made inside a module's call are marked with its path."""
    paths = {id(module): name for name, module in model.named_modules()}
    entered: list[contextlib.AbstractContextManager[None]] = []

    def enter(module: nn.Module, *_: object) -> None:
        if id(module) in paths:
            entered.append(torch.fx.traceback.annotate({MODULE: paths[id(module)]}))
            entered[-1].__enter__()

    def leave(module: nn.Module, *_: object) -> None:
        if id(module) in paths and entered:
            entered.pop().__exit__(None, None, None)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while entered:
            entered.pop().__exit__(None, None, None)


class _Calls(TorchFunctionMode):
    """Sees every torch function the model calls: notes the line, and makes attention one operator."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        custom = torch.fx.traceback.current_meta.get("custom")
        if custom is not None:
            custom[LINE] = calling_line()
        if func is _ATTENTION:
            return attention.scaled_dot_product_attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_ATTENTION = F.scaled_dot_product_attention


@contextlib.contextmanager
def _attention_replaced() -> Iterator[None]:
    """torch's own Python code (nn.MultiheadAttention) calls attention where the mode above does not see it."""

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        return attention.scaled_dot_product_attention(_ATTENTION, *args, **kwargs)

    F.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _ATTENTION


class _Step(nn.Module):
    """What AOTAutograd sees: a module with one parameter per tensor of the model, whatever its aliases."""

    def __init__(self, request: Request, tensors: ModelTensors) -> None:
        super().__init__()
        self.mode = fake.new_mode()
        self.device = device_of(request.model)
        self.run = _Run(request)
        self.held = tensors.all()
        train = request.mode == "train"
        for i, value in enumerate(fake_tensors(tensors.params, self.mode, self.device, train)):
            self.register_parameter(f"p{i}", value)  # type: ignore[arg-type]
        for i, value in enumerate(fake_tensors(tensors.buffers, self.mode, self.device, train)):
            self.register_buffer(f"b{i}", value)
        self.batch = [i for i, leaf in enumerate(request.leaves) if isinstance(leaf, Tensor)]
        self.leaves = request.leaves
        self.output_leaves: tuple[Any, ...] = ()
        self.out_spec: pytree.TreeSpec | None = None

    def fake_batch(self) -> list[Tensor]:
        """Fake tensors in place of the batch's; contiguous, as executors hand them over."""
        values = [self.leaves[i] for i in self.batch]
        return [fake.tensor(self.mode, v.shape, v.dtype, device=self.device) for v in values]

    def forward(self, *batch: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for i, value in zip(self.batch, batch, strict=True):
            leaves[i] = value
        values = [*self._parameters.values(), *self._buffers.values()]
        with (
            swapped(self.held, values),  # type: ignore[arg-type]
            torch.fx.traceback.annotate({MODULE: ""}),
            _attention_replaced(),
            _Calls(),
        ):
            results, self.output_leaves, self.out_spec = self.run(leaves)
        # A result that is a view or an input would make AOTAutograd return something else in its place.
        return tuple(result.clone() for result in results)


@dataclass(frozen=True)
class _Run:
    """Calls the model as ``step``, ``evaluate`` or a call of the compiled object do."""

    request: Request

    def __call__(self, leaves: list[Any]) -> tuple[list[Tensor], tuple[Any, ...], pytree.TreeSpec | None]:
        """The loss or the model's output tensors; the other leaves and the structure of the output."""
        model, loss_fn = self.request.model, self.request.loss_fn
        args, kwargs = pytree.tree_unflatten(leaves, self.request.spec)
        if loss_fn is None:
            result = model(*args, **kwargs)
            return self._outputs(result) if self.request.mode == "call" else ([self._checked(loss_in(result))], (), None)
        x, *targets = args
        if isinstance(x, tuple):
            result = model(*x)
        elif isinstance(x, dict):
            result = model(**x)
        else:
            result = model(x)
        if self.request.mode == "call":
            return self._outputs(result)
        return [self._checked(loss_fn(result, *targets, **kwargs))], (), None

    def _outputs(self, result: Any) -> tuple[list[Tensor], tuple[Any, ...], pytree.TreeSpec]:
        leaves, spec = _flatten_output(result)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return tensors, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor):
            raise LossNotScalar(f"a {type(loss).__name__}")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise LossNotScalar(f"a {loss.dtype} tensor of shape {list(loss.shape)}")
        if self.request.mode == "train" and not loss.requires_grad:
            raise LossWithoutGradient()
        return loss.reshape(()) if loss.dim() else loss


def loss_in(result: Any) -> Any:
    """The loss that a model returned: the result itself, or its ``loss`` item or attribute.

    Raises:
        NoLoss: it has none.
    """
    if isinstance(result, Tensor):
        return result
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if loss is None:
        raise NoLoss(result)
    return loss


def _flatten_output(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure; dataclasses become pytrees. A leaf that may hide fake tensors (a cache) becomes None."""
    leaves, spec = pytree.tree_flatten(result)
    unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    if unknown:
        for kind in unknown:
            pytree.register_dataclass(kind)
        return _flatten_output(result)
    opaque = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))}
    for kind_name in sorted(opaque):
        logger.warning("graphshard: the model's output holds a %s, which is no pytree of tensors: it becomes None", kind_name)
    return [leaf if isinstance(leaf, (Tensor, *_CONSTANTS)) else None for leaf in leaves], spec


_TENSOR = object()  # stands for a tensor among the leaves of an output

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def _port(descriptor: Any, step: _Step) -> Port:
    """Translate a descriptor of AOTAutograd; its classes are private, so they are known by name."""
    name = type(descriptor).__name__
    match name:
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
