"""What a model says of precision itself, while it is captured in float32 for a plan that computes in a lower precision.

To the model, autocast is on in that precision: ``torch.is_autocast_enabled`` says so, whatever device is asked about,
and torch's own code that asks (``custom_fwd``, ``checkpoint``) does what it does under autocast. Where the model turns
it off nodes are marked, and the pass leaves them in what they are given; where the model turns it on again, in the
plan's precision, they are not. The other half precision is torch's own autocast, whose casts are part of the graph;
there, too, nodes are left in what they are given.

A cast to float32 of what is float32 here would leave no trace, though its value may be narrow when the plan runs: it
becomes ``graphshard.cast``, which the pass settles. What is as wide then as now, the model's buffers, the batch and
what is made in float32, stays its own cast, as in eager code.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.amp import autocast_mode
from torch.amp.autocast_mode import autocast
from torch.utils._pytree import tree_leaves

from graphshard.autocast import FLOAT32, HALVES, LOWER
from graphshard.errors import UncapturableOperator
from graphshard.trace.errors import calling_line, describe
from graphshard.trace.meanwhile import meanwhile

AS_GIVEN = "graphshard.as_given"
"""Key of ``node.meta["custom"]`` in the joint graph: whether the plan's precision is not for the node."""

_CASTS = (Tensor.float, Tensor.to, Tensor.type, Tensor.type_as)
_WRITTEN: Mapping[Any, int] = {Tensor.copy_: 1, Tensor.__setitem__: 2}
"""Functions that write an argument, whose position this is, over the first."""
_TAKE_DTYPE = ("softmax", "log_softmax", "sum", "mean", "prod", "cumsum", "cumprod")
"""Functions that cast what they are given where they are told to; float32 under autocast whether they are or not."""

_FLOAT32 = FLOAT32 | {"layer_norm", "group_norm", "batch_norm"}
_LOWER = LOWER | {"__matmul__", "scaled_dot_product_attention", "_grouped_mm", "grouped_mm_fallback"}
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Cast:
    """What a cast was made of, and how often that had been written to by then."""

    result: Tensor
    source: Tensor
    version: int


class Casts:
    """Leaves a trace of casts to float32 of float32 values.

    Under autocast the cast of a value that is in float32 there is the value itself, of a narrow one a copy. Which of
    them it is here is only known once the plan runs: where it makes a difference, since either is written to, it is
    refused. What is in float32 whatever the plan does stays its own cast; that of a product is a copy for sure.

    Args:
        given: what stands for the model's buffers and the batch.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._wide = {id(value): value for value in given}  # by id; kept, so that no id is given twice
        self._narrow: dict[int, Tensor] = {}  # products
        self._casts: dict[int, _Cast] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of a call of a torch function, or its cast.

        Raises:
            UncapturableOperator: a cast, or what it was made of, is written to.
        """
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        casts = [(value, cast) for value in tensors if (cast := _of(value, self._casts)) is not None]
        if any(cast.source._version != cast.version for _, cast in casts):
            _refuse("an in-place operation on what was cast to float32, and a use of the cast after it")
        versions = [value._version for value, _ in casts]
        called_with, options = self._before(func, args, kwargs)
        result = func(*called_with, **options)
        if any(value._version != before for (value, _), before in zip(casts, versions, strict=True)):
            _refuse("an in-place operation on a cast to float32")
        self._note(func, tensors, kwargs, result)
        return self._traced(func, args, kwargs, result)

    def _before(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of a call of a torch function: cast where it is told to, and autocast would not do it, and
        where they are written to what is in float32 whatever the plan does, which stays so."""
        if (at := _WRITTEN.get(func)) is not None and at < len(args):
            into, value = args[0], args[at]
            both = isinstance(value, Tensor) and into.dtype is value.dtype is torch.float32
            if both and _of(into, self._wide) is not None and _of(value, self._wide) is None:
                args = (*args[:at], torch.ops.graphshard.cast(value, torch.float32), *args[at + 1 :])
            return args, kwargs
        value, *others = args or (kwargs.get("input"),)
        told = any(option is torch.float32 for option in (*others, *kwargs.values()))
        if not (told and _is_off() and _name(func) in _TAKE_DTYPE):
            return args, kwargs
        if not (isinstance(value, Tensor) and value.dtype is torch.float32):
            return args, kwargs
        cast = torch.ops.graphshard.cast(value, torch.float32)
        return ((cast, *others), kwargs) if args else ((), {**kwargs, "input": cast})

    def _note(self, func: Any, tensors: Sequence[Tensor], kwargs: Mapping[str, Any], result: Any) -> None:
        """Remember what is known of the precision of results, and which have the memory of a cast."""
        name = _name(func)
        if func == _DATA or func is Tensor.detach:
            if (cast := _of(tensors[0], self._casts)) is not None:
                self._casts[id(result)] = replace(cast, result=result)
            return
        if name.removesuffix("_") in LOWER and name.endswith("_"):
            self._wide.pop(id(result), None)
            return
        copies = name.endswith("_like") or name.startswith("new_") or name == "clone"
        wide = kwargs.get("dtype") is torch.float32 or (tensors and _of(tensors[0], self._wide) is not None)
        is_made = not tensors or (copies and wide)
        if is_made or (not _is_off() and name in _FLOAT32):
            known = self._wide
        elif not _is_off() and name in _LOWER:
            known = self._narrow
        else:
            return
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor) and value.dtype is torch.float32]
        known.update((id(value), value) for value in made if not any(value is given for given in tensors))

    def _traced(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        if func not in _CASTS or not (isinstance(result, Tensor) and args[0].dtype is result.dtype is torch.float32):
            return result
        options = (*args[1:], *kwargs.values())
        like = next((value for value in options if isinstance(value, Tensor)), None)
        said = like is not None or func is Tensor.float or any(isinstance(o, torch.dtype) for o in options)
        if not (said or func is Tensor.type) or _of(args[0], self._wide) is not None:
            return result
        cast: Tensor = torch.ops.graphshard.cast(result, torch.float32, like)
        # What was made in between has memory of its own; so has, under autocast, the cast of a product.
        if result is args[0] and _of(result, self._narrow) is None:
            self._casts[id(cast)] = _Cast(cast, result, result._version)
        return cast


def _of(value: Tensor, known: Mapping[int, _T]) -> _T | None:
    """What is known of ``value``, or of what it is a view of."""
    found = known.get(id(value))
    return known.get(id(value._base)) if found is None and value._is_view() else found


def _is_off() -> bool:
    return bool(torch.fx.traceback.current_meta.get("custom", {}).get(AS_GIVEN))


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _refuse_autocast(what: str) -> NoReturn:
    instead = "the plan says what is computed in which precision: bf16 or fp16"
    raise UncapturableOperator(what, describe(calling_line()), instead)


def _refuse(what: str) -> NoReturn:
    instead = "write a.float().clone() for a.float(), or an operation that is not in place"
    raise UncapturableOperator(what, describe(calling_line()), instead)


@contextlib.contextmanager
def autocast_on(lower: torch.dtype | None) -> Iterator[None]:
    """To the model autocast is on in ``lower`` meanwhile; None: the plan has no precision, and all is as it is."""
    if lower is None:
        yield
        return
    state = _State(lower)
    with contextlib.ExitStack() as stack:
        replacements = (
            (one, name, _in_this_thread(now, getattr(one, name))) for one, name, now in state.replacements()
        )
        stack.enter_context(meanwhile(*replacements))
        stack.callback(state.close)
        yield


def _in_this_thread(replacement: Any, before: Any) -> Any:
    """Other threads, which capture nothing, have what was before."""
    capturing = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == capturing else before)(*args, **kwargs)

    return call


_enabled, _dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
_init: Any = autocast.__init__
_enter: Any = autocast.__enter__
_exit: Any = autocast.__exit__
_cast_inputs: Any = autocast_mode._cast


class _State:
    """Whether autocast is on as the model has it, and in what."""

    def __init__(self, lower: torch.dtype) -> None:
        self.lower = lower
        self.now: list[tuple[bool, torch.dtype]] = [(True, lower)]
        self.marks: list[contextlib.AbstractContextManager[None]] = []
        # By id, the instances made here and what they are asked for.
        self.asked: dict[int, tuple[autocast, bool]] = {}

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """What to replace: owner, name, and by what."""
        is_on, dtype = (lambda *_, **__: self.now[-1][0]), (lambda *_, **__: self.now[-1][1])
        return [
            (torch, "is_autocast_enabled", is_on),
            (torch, "is_autocast_cpu_enabled", is_on),
            (torch, "get_autocast_dtype", dtype),
            (torch, "get_autocast_cpu_dtype", dtype),
            (torch, "get_autocast_gpu_dtype", dtype),
            # What custom_fwd does to arguments on a device: here all are on the CPU.
            (autocast_mode, "_cast", lambda value, _, dtype: _cast_inputs(value, "cpu", dtype)),
            (autocast, "__init__", self._made()),
            (autocast, "__enter__", lambda made: self.enter(made)),
            (autocast, "__exit__", lambda made, *raised: self.leave(made, *raised)),
        ]

    def _made(self) -> Any:
        def init(
            made: autocast,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            self.asked[id(made)] = made, enabled
            _init(made, device_type, dtype, enabled, cache_enabled)

        return init

    def enter(self, made: autocast) -> autocast:
        """Only another half precision than the plan's turns torch's own autocast on.

        Raises:
            UncapturableOperator: it is that of an accelerator, which is not where capture computes.
        """
        on = self._asked(made) and made.fast_dtype in HALVES.values()
        if on and made.device != "cpu" and made.fast_dtype is not self.lower:
            _refuse_autocast(f"torch.autocast({made.device!r}, dtype={made.fast_dtype})")
        before, enabled = (_enabled(made.device), _dtype(made.device)), made._enabled
        other = made._enabled = enabled and on and made.fast_dtype is not self.lower
        _enter(made)
        made._enabled = enabled
        made.prev, made.prev_fastdtype = before
        self.now.append((on, made.fast_dtype if on else self.now[-1][1]))
        self.marks.append(torch.fx.traceback.annotate({AS_GIVEN: not on or other}))
        self.marks[-1].__enter__()
        return made

    def _asked(self, made: autocast) -> bool:
        """Whether it is to be on."""
        if id(made) in self.asked:
            return self.asked[id(made)][1]
        if made._enabled or made.device != "cuda" or torch.cuda.is_available():
            return made._enabled
        # Without CUDA it says that it is off, whatever it was asked for.
        _refuse_autocast("torch.autocast('cuda') that was made before the model was called, on a machine without CUDA")

    def leave(self, made: autocast, *raised: Any) -> Any:
        """Back to what was before."""
        self.now.pop()
        self.marks.pop().__exit__(None, None, None)
        return _exit(made, *raised)

    def close(self) -> None:
        """Leave what an exception, or the model, has left open."""
        while self.marks:
            self.marks.pop().__exit__(None, None, None)
