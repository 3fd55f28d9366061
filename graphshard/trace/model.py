"""A model's tensors while it is captured: where each one is, and fake ones in their place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphshard import fake
from graphshard.errors import BufferChangesType, PostAccumulateHook, UnsupportedModule, UnsupportedParameter
from graphshard.program import Param


@dataclass(frozen=True)
class Held:
    """One parameter or buffer: its names, and every dict of the model's modules that holds it, with the key there."""

    tensor: Tensor
    names: tuple[str, ...]  # the canonical one first
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class ModelTensors:
    """All parameters and buffers of a model, each tensor once, in the model's order."""

    params: tuple[Held, ...]
    buffers: tuple[Held, ...]

    def all(self) -> tuple[Held, ...]:
        """Parameters, then buffers."""
        return self.params + self.buffers


HOOK = "graphshard.hook"
"""Key of ``node.meta["custom"]`` in the joint graph: whether a hook on a parameter's gradient has made the node."""

_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def tensors_of(model: nn.Module) -> ModelTensors:
    """Find them.

    Raises:
        UnsupportedModule: a module is TorchScript, or distributes the model itself.
        UnsupportedParameter: a tensor is sparse, a tensor subclass, or shares memory with another.
        PostAccumulateHook: a parameter has a hook that cannot be called.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModule(path, kind, "compile the Python module it was made from")
        if kind in _PARALLEL:
            raise UnsupportedModule(path, kind, "compile the module inside it; the plan says how to distribute it")
    params = _named(model.named_parameters(remove_duplicate=False))
    buffers = _named((n, b) for n, b in model.named_buffers(remove_duplicate=False) if id(b) not in params)
    for held in (*params.values(), *buffers.values()):
        _check(held)
    _check_memory([*params.values(), *buffers.values()])
    known = params | buffers
    for module in model.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            for key, value in values.items():
                if isinstance(value, Tensor) and id(value) in known:
                    known[id(value)].places.append((values, key))
    return ModelTensors(tuple(params.values()), tuple(buffers.values()))


def describe_params(model: nn.Module) -> dict[str, Param]:
    """Every parameter by its canonical name, unused and frozen ones too; tied ones once, with their further names.

    Raises:
        UnsupportedParameter: one is no dense tensor with memory of its own.
    """
    held = tensors_of(model).params
    return {
        p.name: Param(p.name, tuple(p.tensor.shape), p.tensor.dtype, p.names[1:], None, p.tensor.requires_grad)
        for p in held
    }


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The id of each Parameter to its canonical name."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def gradient_hooks(parameters: Sequence[nn.Parameter]) -> tuple[tuple[int, tuple[Hashable, ...]], ...]:
    """The hooks on gradients of ``parameters``, by position."""
    return tuple((at, tuple(p._backward_hooks.values())) for at, p in enumerate(parameters) if p._backward_hooks)


def _named(pairs: Iterator[tuple[str, Tensor]]) -> dict[int, Held]:
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in pairs:
        names.setdefault(id(tensor), (tensor, []))[1].append(name)
    return {key: Held(tensor, tuple(found)) for key, (tensor, found) in names.items()}


def _check(held: Held) -> None:
    tensor = held.tensor
    if nn.parameter.is_lazy(tensor):
        raise UnsupportedParameter(held.name, "has no shape yet (a lazy module); run the model once before compile")
    plain = type(tensor) is Tensor or isinstance(tensor, (nn.Parameter, nn.Buffer))
    if not plain or torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        raise UnsupportedParameter(held.name, f"is a {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UnsupportedParameter(held.name, "is sparse, nested or quantized")
    if getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise PostAccumulateHook(held.name)


def _check_memory(held: Sequence[Held]) -> None:
    """Two tensors over one memory would become two independent ones."""
    spans: dict[int, list[tuple[int, int, Held]]] = {}
    for item in held:
        tensor = item.tensor
        if tensor.numel():
            begin = int(tensor.storage_offset()) * tensor.element_size()
            reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            storage = tensor.untyped_storage()._cdata
            spans.setdefault(storage, []).append((begin, begin + int(reach) * tensor.element_size(), item))
    for group in spans.values():
        group.sort(key=lambda span: span[:2])
        for (_, end, first), (begin, _, second) in pairwise(group):
            if begin < end:
                problem = f"shares memory with {first.name!r} but is another tensor"
                raise UnsupportedParameter(second.name, problem + "; to tie them, assign the same Parameter to both")


def fake_tensors(held: Sequence[Held], mode: FakeTensorMode, trained: bool) -> list[Tensor]:
    """A contiguous fake tensor for each; parameters require a gradient if the real ones do and ``trained``."""
    made: list[Tensor] = []
    for item in held:
        value = fake.fresh(mode, item.tensor.shape, item.tensor.dtype)
        if isinstance(item.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=item.tensor.requires_grad and trained)
        made.append(value)
    return made


@contextmanager
def swapped(held: Sequence[Held], values: Sequence[Tensor], replaced: set[str]) -> Iterator[Sequence[Tensor]]:
    """The model's modules hold what is yielded meanwhile: ``values``, or copies. A buffer that the model replaces is
    written to instead.

    Args:
        replaced: names of such buffers from an earlier run, to which this one adds. The model holds copies of these:
            what autograd saved of the old value would otherwise count as overwritten.

    Raises:
        BufferChangesType: on leaving, if a replacement has another shape or dtype.
    """
    shown = [value.clone() if item.name in replaced else value for item, value in zip(held, values, strict=True)]
    for item, value in zip(held, shown, strict=True):
        _look_like(item.tensor, value)
        for where, key in item.places:
            where[key] = value
        if value.requires_grad:
            for hook in (item.tensor._backward_hooks or {}).values():
                value.register_hook(_traced(hook))
    try:
        yield shown
        for item, value, given in zip(held, values, shown, strict=True):
            for where, key in item.places:
                if _is_replaced(item, given, where.get(key)):
                    replaced.add(item.name)
                    value.copy_(where[key])
    finally:
        for item in held:
            for where, key in item.places:
                where[key] = item.tensor


def _look_like(tensor: Tensor, value: Tensor) -> None:
    """Have ``value`` pass for ``tensor`` where the model asks whether that is a parameter, or for an attribute that it
    was given."""
    vars(value).update(vars(tensor))
    if isinstance(tensor, nn.Parameter):
        value._is_param = True  # what isinstance asks for


def _traced(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    """A hook on the gradient of a parameter, whose operations become part of the backward, and are marked."""

    def run(gradient: Tensor) -> Tensor | None:
        with torch.fx.traceback.annotate({HOOK: True}):
            return hook(gradient)

    return run


def _is_replaced(held: Held, given: Tensor, now: Any) -> bool:
    if now is given or isinstance(held.tensor, nn.Parameter):
        return False
    if not isinstance(now, Tensor) or now.shape != given.shape or now.dtype != given.dtype:
        raise BufferChangesType(held.name, _type(given), _type(now))
    return True


def _type(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode meanwhile; each module gets its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
