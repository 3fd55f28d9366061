"""Fake tensors: the types of the IR. One mode per Program; nothing is ever allocated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

_NORMS = frozenset(
    overload
    for packet in (
        *(aten.native_layer_norm, aten.native_group_norm, aten.native_batch_norm, aten._native_batch_norm_legit),
        *(aten._native_batch_norm_legit_functional, aten._native_batch_norm_legit_no_training),
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)


class RememberingMode(FakeTensorMode):
    """A mode in which real constants may meet fake tensors. What operators give for arguments of a type is remembered:
    graphs repeat themselves, and passes derive types again and again.

    Norms of half precision with weights in float32 give statistics in float32, which torch's own types do not say."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.known: dict[Hashable, Any] = {}

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the operator gives."""
        result: Any = super().dispatch(func, types, args, kwargs or {})
        given = [value.dtype for value in args if isinstance(value, torch.Tensor)] if func in _NORMS else []
        if torch.float32 not in given[1:] or given[0] is torch.float32:
            return result
        out, *rest = result
        return out, *(fresh(self, value.shape, torch.float32, value.stride(), value.device) for value in rest)


def new_mode() -> FakeTensorMode:
    """The mode of a program."""
    return RememberingMode()


def mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode of the first fake tensor among ``values``, nested ones included."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
        if isinstance(value, (tuple, list)) and (mode := mode_of(value)) is not None:
            return mode
    return None


def graph_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode the values of ``graph`` live in; None for a graph without tensors."""
    for node in graph.nodes:
        if (mode := mode_of([node.meta.get("val")])) is not None:
            return mode
    return None


def tensor(
    mode: FakeTensorMode,
    shape: Iterable[int],
    dtype: torch.dtype,
    stride: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A fake tensor of that type; contiguous unless ``stride`` (in elements) is given. It is a type: equal ones may
    be one object."""
    if not isinstance(mode, RememberingMode):
        return fresh(mode, shape, dtype, stride, device)
    key = (tuple(shape), dtype, None if stride is None else tuple(stride), torch.device(device))
    if key not in mode.known:
        mode.known[key] = fresh(mode, *key)
    return mode.known[key]  # type: ignore[no-any-return]


def fresh(
    mode: FakeTensorMode,
    shape: Iterable[int],
    dtype: torch.dtype,
    stride: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The same as an object of its own, which stands for one tensor while a model runs."""
    with mode:
        if stride is None:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)


@contextmanager
def default_device() -> Iterator[None]:
    """The default device is the CPU meanwhile, whatever the user has set: the IR spells every device "cpu", and where
    it runs is known to executors alone."""
    if torch.get_default_device() == torch.device("cpu"):
        yield
    else:
        with torch.device("cpu"):
            yield


def infer(mode: FakeTensorMode, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value ``target`` gives; nodes among the arguments stand for their values. Raises what the operator raises.

    Fake tensors are types here, and never written to: equal ones may be one object.
    """
    known = mode.known if isinstance(mode, RememberingMode) else {}
    key = (target, _kind(args), _kind(kwargs))
    if key not in known:
        args, kwargs = tree_map_only(fx.Node, lambda n: n.meta["val"], (args, kwargs))
        with mode, torch.no_grad():
            known[key] = target(*args, **kwargs)
    return known[key]


def _kind(value: Any) -> Hashable:
    """Equal for arguments for which an operator gives the same type."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, FakeTensor):
        return FakeTensor, tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, torch.Tensor):
        return object()  # like no other: the value of a constant may matter
    if isinstance(value, (tuple, list)):
        return type(value), *map(_kind, value)
    if isinstance(value, dict):
        return tuple((name, _kind(item)) for name, item in value.items())
    return type(value), value if isinstance(value, Hashable) else repr(value)


@contextmanager
def quiet() -> Iterator[None]:
    """An operator that refuses its arguments raises meanwhile, and does not log a traceback as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def operator_names() -> list[str]:
    """Every operator torch knows, spelled ``aten.mm.default``."""
    names = (name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names())
    return [name if name.count(".") > 1 else f"{name}.default" for name in names]


def symbolic_mode() -> FakeTensorMode:
    """A mode in which reading a number out of a tensor gives a symbol; deciding something by it raises."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


@contextmanager
def compiling() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` is true meanwhile: libraries then avoid branches on values of tensors."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Torch's own: what operators are, made of others."""
    from torch._decomp import decomposition_table

    return decomposition_table
