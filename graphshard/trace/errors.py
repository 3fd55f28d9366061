"""From an exception during capture to the line of the model that caused it."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from graphshard.errors import (
    GraphshardError,
    ModelFailed,
    NeedsTensorValue,
    ShapeNeedsValue,
    TensorWithoutValue,
    UncapturableOperator,
    UnknownRandomOperator,
)
from graphshard.trace.call import call, forward_of, loss_of

_PACKAGE = str(Path(__file__).parents[1]) + os.sep

_OURS = (str(Path(torch.__file__).parent) + os.sep, _PACKAGE)

_STDLIB = sysconfig.get_path("stdlib") + os.sep

_CALLS_THE_MODEL = call.__code__.co_filename  # what is outside of it is who compiles

Line = tuple[str, int]
"""File and line number of source code."""


def is_users(filename: str) -> bool:
    """Whether code is neither torch's, nor Python's, nor this package's, nor generated."""
    if filename.startswith("<") or filename.startswith(_OURS):
        return False
    return "site-packages" in filename or not filename.startswith(_STDLIB)


def calling_line() -> Line | None:
    """The line of the model or the loss function that is running: the innermost one of the user's code. Where those are
    the library's own (an nn.Sequential, F.cross_entropy) it is a line of the innermost ``forward``, or the function."""
    library: Line | None = None
    in_forward = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CALLS_THE_MODEL:
        code = frame.f_code
        if is_users(code.co_filename):
            return code.co_filename, frame.f_lineno
        if not in_forward and not code.co_filename.startswith(_PACKAGE):
            in_forward = code.co_name == "forward"
            library = (code.co_filename, frame.f_lineno if in_forward else code.co_firstlineno)
        frame = frame.f_back
    return library


def describe(line: Line | None, module: str = "") -> str:
    """``model.py:12: y = x.item()``; without a line, the module."""
    if line is None:
        return f"module {module!r}" if module else "the backward pass"
    code = linecache.getline(*line).strip()[:100].rstrip(":")
    return f"{line[0]}:{line[1]}" + (f": {code}" if code else "")


def translate(error: Exception, doing: str) -> GraphshardError:
    """The error to raise for what was raised while the model ran on fake tensors."""
    where = raised_at(error)
    match error:
        case DataDependentOutputException():
            return NeedsTensorValue(where)
        case DynamicOutputShapeException():
            return ShapeNeedsValue(str(error.func), where)
        case UnsupportedOperatorException():
            return UncapturableOperator(str(error.func), where, "it has no rule for the shape of its result")
    if isinstance(error, NotImplementedError) and "torch._C.Generator" in str(error):  # torch 2.11
        return UnknownRandomOperator("that is given a torch.Generator", where)
    if "mutation on a view chain" in str(error):
        instead = "take it of a clone(), or, for fill_diagonal_, write x.diagonal().fill_(value)"
        return UncapturableOperator("a write to an as_strided view of a view", where, instead)
    if "meta" in str(error) and "device" in str(error) and isinstance(error, RuntimeError):
        return TensorWithoutValue(where)
    if isinstance(error, (RuntimeError, TypeError)) and any(sign in str(error) for sign in _VALUE_SIGNS):
        return NeedsTensorValue(where)
    return ModelFailed(doing, error, where)


def raised_at(error: Exception) -> str:
    """The innermost line of the user's code that ``error`` came through, or what was running."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return describe((frames[-1].filename, frames[-1].lineno or 0)) if frames else _running(error)


def _running(error: Exception) -> str:
    """What raised ``error``, where no line of the user's code did: ``the call of the model, module '2' (Linear)``."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = [frame.f_code for frame in frames]
    if loss_of.__code__ in codes:
        return "the call of loss_fn"
    if forward_of.__code__ not in codes:
        return "the backward pass, or in torch itself"
    at = codes.index(forward_of.__code__)
    names = {id(module): name for name, module in frames[at].f_locals["model"].named_modules()}
    modules = [frame.f_locals.get("self") for frame in frames[at:] if frame.f_code.co_name == "forward"]
    known = [(names[id(module)], type(module).__name__) for module in modules if names.get(id(module))]
    return "the call of the model" + (f", module {known[-1][0]!r} ({known[-1][1]})" if known else "")


_VALUE_SIGNS = (
    "Cannot access data pointer",
    ".numpy() is not supported for tensor subclasses",
    "data-dependent",
    "aten._local_scalar_dense",
)

NO_FUNCTIONS = "use torch.where on the results of both branches, or a Python loop of fixed length"
