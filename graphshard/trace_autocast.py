"""What a model says of precision itself, while it is captured in float32 for a plan that computes in a lower precision.

To the model, autocast is on in that precision: ``torch.is_autocast_enabled`` says so, whatever device is asked about,
and torch's own code that asks (``custom_fwd``, ``checkpoint``) does what it does under autocast. Where the model turns
it off nodes are marked, and the pass leaves them in what they are given; where the model turns it on again, in the
plan's precision, they are not. The other half precision is torch's own autocast, whose casts are part of the graph;
there, too, nodes are left in what they are given.

A cast to float32 of what is float32 here would leave no trace, though its value may be narrow when the plan runs: it
becomes ``graphshard.cast``, which the pass settles. What a model is given, its buffers and the batch, is as wide then
as now, and such a cast stays the alias that it is in eager code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import autocast

AS_GIVEN = "graphshard.as_given"
"""Key of ``node.meta["custom"]`` in the joint graph: whether the plan's precision is not for the node."""

_CASTS = (Tensor.float, Tensor.to, Tensor.type, Tensor.type_as)
_TAKE_DTYPE = ("softmax", "log_softmax", "sum", "mean", "prod", "cumsum", "cumprod")
"""Functions that cast what they are given where they are told to; float32 under autocast whether they are or not."""


class Casts:
    """Leaves a trace of casts to float32 of float32 values.

    Args:
        given: what stands for the model's buffers and the batch.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._given = {id(value): value for value in given}

    def before(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call of a torch function: cast where it is told to, and autocast would not do it."""
        off = torch.fx.traceback.current_meta.get("custom", {}).get(AS_GIVEN)
        if not off or kwargs.get("dtype") is not torch.float32 or getattr(func, "__name__", "") not in _TAKE_DTYPE:
            return args
        if not (args and isinstance(args[0], Tensor) and args[0].dtype is torch.float32):
            return args
        return torch.ops.graphshard.cast(args[0], torch.float32), *args[1:]

    def traced(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        """``result`` of a call of a torch function, or its cast."""
        if func not in _CASTS or not (isinstance(result, Tensor) and args[0].dtype is result.dtype is torch.float32):
            return result
        options = (*args[1:], *kwargs.values())
        like = next((value for value in options if isinstance(value, Tensor)), None)
        said = like is not None or func is Tensor.float or any(isinstance(o, torch.dtype) for o in options)
        if not (said or func is Tensor.type) or self._is_given(args[0]):
            return result
        return torch.ops.graphshard.cast(result, torch.float32, like)

    def _is_given(self, value: Tensor) -> bool:
        base = value._base if value._is_view() else value
        return id(value) in self._given or id(base) in self._given


@contextlib.contextmanager
def autocast_on(lower: torch.dtype | None) -> Iterator[None]:
    """To the model autocast is on in ``lower`` meanwhile; None: the plan has no precision, and all is as it is."""
    if lower is None:
        yield
        return
    state = _State(lower)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in state.replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        stack.callback(state.close)
        yield


_enabled, _dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
_init: Any = autocast.__init__
_enter: Any = autocast.__enter__
_exit: Any = autocast.__exit__


class _State:
    """Whether autocast is on as the model has it, and in what."""

    def __init__(self, lower: torch.dtype) -> None:
        self.lower = lower
        self.now: list[tuple[bool, torch.dtype]] = [(True, lower)]
        self.marks: list[contextlib.AbstractContextManager[None]] = []
        # By id, the instances made here and what they are asked for: one for CUDA says, where there is none, it is off.
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
        """Only another half precision than the plan's turns torch's own autocast on."""
        _, asked = self.asked.get(id(made), (made, made._enabled))
        on = asked and made.fast_dtype is not torch.float32
        before, enabled = (_enabled(made.device), _dtype(made.device)), made._enabled
        other = made._enabled = enabled and on and made.fast_dtype is not self.lower
        _enter(made)
        made._enabled = enabled
        made.prev, made.prev_fastdtype = before
        self.now.append((on, made.fast_dtype if on else self.now[-1][1]))
        self.marks.append(torch.fx.traceback.annotate({AS_GIVEN: not on or other}))
        self.marks[-1].__enter__()
        return made

    def leave(self, made: autocast, *raised: Any) -> Any:
        """Back to what was before."""
        self.now.pop()
        self.marks.pop().__exit__(None, None, None)
        return _exit(made, *raised)

    def close(self) -> None:
        """Leave what an exception, or the model, has left open."""
        while self.marks:
            self.marks.pop().__exit__(None, None, None)
