"""MODEL of the command line: ``file.py:factory`` or ``package.module:factory``, and what the factory may return."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from graphshard.arguments import CHECKS
from graphshard.errors import (
    BadArgument,
    BadFactoryResult,
    BadModelReference,
    MissingFactory,
    ModelCodeFailed,
    WrongFactoryEntry,
)

T = TypeVar("T")
_OF_A_TUPLE = ("model", "example_inputs", "loss_fn")


def load(reference: str, known: Collection[str], meta: bool = False) -> dict[str, Any]:
    """Call the factory that ``reference`` names; its result as arguments of compile, AdamW where it gives no optimizer.

    ``known`` are the arguments that a dict may hold. With ``meta`` the factory runs under ``torch.device("meta")``:
    the model is built without storage.

    Raises:
        BadModelReference: the spelling is wrong, or there is no such file or module.
        MissingFactory: the module has no such function.
        ModelCodeFailed: the module or the factory raised.
        BadFactoryResult: the factory needs arguments, or returned something else.
        WrongFactoryEntry: what the factory returned for an argument is of no use there.
        PlanSyntaxError, PlanNotSupported: its plan is none.
    """
    path, colon, name = reference.rpartition(":")
    if not (colon and path and name.isidentifier()):
        raise BadModelReference(reference, "no factory is named")
    factory = _function(reference, _module(reference, path), name)
    with torch.device("meta") if meta else nullcontext():
        result = _run(reference, f"{name}()", factory)
    return _arguments(reference, name, result, known)


def _module(reference: str, path: str) -> ModuleType:
    if path.endswith(".py"):
        file = Path(path)
        if not file.is_file():
            raise BadModelReference(reference, f"there is no file {path!r}")
        sys.path.insert(0, str(file.resolve().parent))  # as for a script: its neighbours can be imported
        return _run(reference, f"importing {path}", lambda: _execute(file))
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(path)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise BadModelReference(reference, f"there is no module {path!r} to import")
    return _run(reference, f"importing {path}", lambda: importlib.import_module(path))


def _execute(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def _function(reference: str, module: ModuleType, name: str) -> Callable[[], Any]:
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = (key for key, value in vars(module).items() if inspect.isfunction(value))
        raise MissingFactory(reference, name, functions)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise BadFactoryResult(reference, f"{name}() cannot be called: {error}") from error
    result: Callable[[], Any] = factory
    return result


def _run(reference: str, doing: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise ModelCodeFailed(reference, doing, error, _where(error)) from error


def _where(error: BaseException) -> str:
    """The innermost line of the user's own code that ``error`` went through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[0] != "<"]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "no line of it was reached"


def _arguments(reference: str, name: str, result: Any, known: Collection[str]) -> dict[str, Any]:
    if isinstance(result, tuple) and len(result) in (2, 3):
        result = dict(zip(_OF_A_TUPLE, result, strict=False))
    elif not isinstance(result, dict):
        raise BadFactoryResult(reference, f"{name}() returned {_describe(result)}")
    unknown = [key for key in result if key not in known]
    if unknown:
        raise BadFactoryResult(reference, f"{name}() returned a dict with {unknown[0]!r}, no argument of compile")
    missing = [key for key in _OF_A_TUPLE[:2] if result.get(key) is None]
    if missing:
        raise BadFactoryResult(reference, f"{name}() returned no {missing[0]}")
    for key, check in CHECKS.items():
        try:
            if key in result:
                check(result[key])
        except BadArgument as error:
            raise WrongFactoryEntry(reference, name, error.name, error.given, error.expected) from error
    return {"optimizer": functools.partial(torch.optim.AdamW), **result}


def _describe(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
