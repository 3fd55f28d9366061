"""What must hold while a model is captured, all of it undone afterwards."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.fx.traceback
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import transformer
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._mode_utils import no_dispatch

from graphshard import attention, fake
from graphshard.errors import NeedsTensorValue, UncapturableOperator
from graphshard.trace.autocast import Casts, autocast_on
from graphshard.trace.batch_norm import batches_counted, laid_out
from graphshard.trace.checks import checks_left_out
from graphshard.trace.devices import Devices
from graphshard.trace.errors import NO_FUNCTIONS, calling_line, describe
from graphshard.trace.foreach import one_by_one
from graphshard.trace.grouped import of_groups
from graphshard.trace.labels import of_first_labels
from graphshard.trace.marks import LINE, MODULE
from graphshard.trace.masked import selected
from graphshard.trace.meanwhile import meanwhile
from graphshard.trace.model import Held, evaluating
from graphshard.trace.operators import Operators
from graphshard.trace.recurrent import written_out
from graphshard.trace.turned import Turned
from graphshard.trace.valueless import without_values


@contextlib.contextmanager
def capturing(model: nn.Module, train: bool, lower: torch.dtype | None = None) -> Iterator[None]:
    """Around the whole capture of ``model``, in its own mode if ``train``, else in evaluation mode; ``lower``: what the
    plan computes in instead of float32."""
    with (
        _no_traceback_of_backward(),
        torch.inference_mode(False),
        torch.set_grad_enabled(train),
        contextlib.nullcontext() if train else evaluating(model),
        torch.compiler.set_stance("force_eager"),  # what torch.compile decorates runs as it is written
        fake.compiling(),  # libraries ask this before they look at values of tensors
        torch.fx.traceback.preserve_node_meta(),
        _fast_path_off(),
        _quiet("torch._subclasses.fake_tensor"),  # it logs what it raises
        _module_paths(model),
        autocast_on(lower),
    ):
        yield


@contextlib.contextmanager
def watching(held: Sequence[Held], casts: Casts | None, unchecked: set[str]) -> Iterator[None]:
    """Around a call of the model, whose tensors are ``held``: nodes are marked with module and line, attention becomes
    one operator, and every device the CPU; ``casts``: what becomes of casts, where the plan has a precision;
    ``unchecked``: lines of the model whose checks were left out are added to it."""
    calls, operators = _Calls(Devices(held), casts), Operators(unchecked)
    replaced = (
        *(_attention_replaced(), batches_counted(), checks_left_out(unchecked)),
        *(_parameters_renamed(), _masks_unread(), _no_reentrant(), _no_higher_order()),
    )
    with torch.fx.traceback.annotate({MODULE: ""}), contextlib.ExitStack() as stack:
        for context in (*replaced, operators, calls):
            stack.enter_context(context)
        yield


def backward_placed(held: Sequence[Held]) -> AbstractContextManager[None]:
    """Around the trace of a model's backward, in which hooks and autograd functions of its own run: devices are the
    CPU's there too. Autograd calls them outside of any mode that was entered before."""
    run, mode = torch.autograd._engine_run_backward, _Placed(Devices(held))  # type: ignore[attr-defined]

    def run_placed(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    return meanwhile((torch.autograd, "_engine_run_backward", run_placed))


@contextlib.contextmanager
def _no_traceback_of_backward() -> Iterator[None]:
    """Torch, which traces under its anomaly mode, does not print where the forward was whose backward raised; filters
    of warnings are put back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error detected in ", UserWarning)
        yield


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
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


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


def _parameters_renamed() -> AbstractContextManager[None]:
    """Meanwhile a module takes what stands for a parameter under another name, too (``self.last = self.weight``): torch
    registers that, as it does a parameter, and refuses it since it was computed."""

    def register(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, FunctionalTensor) and isinstance(value, nn.Parameter):
            module._parameters[name] = value
        else:
            before(module, name, value)

    before = nn.Module.register_parameter
    return meanwhile((nn.Module, "register_parameter", register))


def _masks_unread() -> AbstractContextManager[None]:
    """Meanwhile nn.Transformer does not compare masks with a causal one, which needs their values: told nothing, it
    takes them for any mask, which costs time at most."""

    def detect(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    return meanwhile((transformer, "_detect_is_causal_mask", detect))


def _no_higher_order() -> AbstractContextManager[None]:
    """Operators on functions (torch.cond, flex_attention) are refused where the model calls them."""

    def refuse(operator: HigherOrderOperator, *args: object, **kwargs: object) -> NoReturn:
        raise UncapturableOperator(operator.name(), describe(calling_line()), NO_FUNCTIONS)

    return meanwhile((HigherOrderOperator, "__call__", refuse))


def _no_reentrant() -> AbstractContextManager[None]:
    """A checkpoint that calls autograd within the backward is refused where the model calls it."""

    def apply(function: Any, preserve: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            instead = "say use_reentrant=False, or leave the checkpoint out and put recompute into the plan"
            raise UncapturableOperator("a checkpoint with use_reentrant=True", describe(calling_line()), instead)
        return before.apply(function, preserve, *args)

    before = checkpoint.CheckpointFunction
    return meanwhile((checkpoint, "CheckpointFunction", SimpleNamespace(apply=apply)))


class _Placed(TorchFunctionMode):
    """Has devices replaced."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, args, kwargs = self._devices.replaced(func, args, kwargs or {})
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Sees every torch function the model calls: notes the line, makes attention one operator, and has devices
    replaced and casts traced."""

    def __init__(self, devices: Devices, casts: Casts | None) -> None:
        super().__init__()
        self._devices, self._casts, self._turned = devices, casts, Turned()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        custom = torch.fx.traceback.current_meta.get("custom")
        if custom is not None:
            custom[LINE] = calling_line()
        if func == _SET_DATA:
            instead = "write to it with copy_, or use the new value itself"
            raise UncapturableOperator("an assignment to .data", describe(calling_line()), instead)
        if func in _TO_PYTHON and not isinstance(args[0], (FakeTensor, FunctionalTensor)):
            with no_dispatch():  # else a constant would be a fake one, too, whose memory holds anything
                return func(*args, **(kwargs or {}))
        if func in _TO_NUMPY:
            raise NeedsTensorValue(describe(calling_line()))
        func, args, kwargs = self._devices.replaced(func, args, kwargs or {})
        if func is _ATTENTION:
            return attention.scaled_dot_product_attention(func, *args, **kwargs)
        for instead_of in _REPLACEMENTS:
            func = instead_of(func)
        func, args, kwargs = selected(func, args, kwargs)
        self._turned.before(args, kwargs)
        result = func(*args, **kwargs) if self._casts is None else self._casts.call(func, args, kwargs)
        self._turned.after(func, args, kwargs, result)
        return result


_REPLACEMENTS = (laid_out, written_out, without_values, one_by_one, of_groups, of_first_labels)
"""Each gives what to call instead of a torch function: itself, unless it is one of its own."""

_ATTENTION = F.scaled_dot_product_attention
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)
_TO_PYTHON: Any = (
    *(*_TO_NUMPY, Tensor.item, Tensor.tolist, Tensor.__repr__, Tensor.__format__),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__),
)
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


def _attention_replaced() -> AbstractContextManager[None]:
    """torch's own Python code (nn.MultiheadAttention) calls attention where the mode above does not see it."""

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        return attention.scaled_dot_product_attention(_ATTENTION, *args, **kwargs)

    return meanwhile((F, "scaled_dot_product_attention", replacement))
