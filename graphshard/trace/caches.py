"""Caches outside of modules that a forward pass fills: in the files and classes of the model, no fake tensor stays."""

from __future__ import annotations

import functools
import gc
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from graphshard.errors import TensorKeptOutside
from graphshard.trace.errors import is_users
from graphshard.trace.marks import where

_CACHE: Any = functools._lru_cache_wrapper

_DEPTH = 3
"""How deep a fake tensor is looked for in tuples, lists and dicts."""


def places_of(modules: Sequence[nn.Module], loss_fn: object) -> tuple[Any, ...]:
    """What has attributes or globals in which a forward pass may keep something: the user's classes of ``modules``, the
    objects of other classes that these hold, the files that all are defined in, and the files that those import."""
    every = [module for root in modules for module in root.modules()]
    objects = {id(value): value for module in every for value in vars(module).values() if _is_users_object(value)}
    classes = {base for value in (*every, *objects.values()) for base in type(value).__mro__ if _is_users(_file(base))}
    files = {file for one in (*classes, loss_fn) if _is_users(file := _file(one))}
    imported = {value for file in files for value in vars(file).values() if isinstance(value, ModuleType)}
    return (*objects.values(), *classes, *files, *(file for file in imported - files if _is_users(file)))


def _file(defined: Any) -> ModuleType | None:
    return sys.modules.get(getattr(defined, "__module__", None) or "")


def _is_users_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)) and _is_users(_file(type(value)))


def _is_users(file: ModuleType | None) -> bool:
    """Whether it is a Python file of the user's, or a notebook."""
    path = getattr(file, "__file__", None)
    return is_users(path) if path else getattr(file, "__name__", "") == "__main__"


@contextmanager
def kept_free(places: Sequence[Any], mode: FakeTensorMode) -> Iterator[None]:
    """Remove what the tensors of ``mode`` were put into meanwhile, so that each of capture's runs and later the user
    make their own: functools caches are emptied; entries of a dict or list, attributes and globals are taken out.

    A cache that holds no such tensor is left alone: what it keeps may be more than a function's result. One that the
    user filled before is a constant of the graph.
    """
    before = [(place, dict(vars(place))) for place in places]
    try:
        yield
    finally:
        for place, old in before:
            for name, value in list(vars(place).items()):
                if not _holds(value, mode, 0):
                    _emptied(value, mode)
                elif isinstance(place, type):
                    setattr(place, name, old[name]) if name in old else delattr(place, name)
                elif name in old:
                    vars(place)[name] = old[name]
                else:
                    del vars(place)[name]


def empty_everywhere() -> list[str]:
    """Empty every functools cache that holds a fake tensor, wherever it is: their names. For when capture has failed,
    since it looks at all objects there are."""
    found = [one for one in gc.get_objects() if type(one) is _CACHE and _is_poisoned(one, None)]
    for one in found:
        one.cache_clear()
    return sorted(f"{one.__module__}.{one.__qualname__}" for one in found)


def kept_tensor(error: Exception) -> TensorKeptOutside | None:
    """What AOTAutograd's refusal of a fake tensor among the constants of a graph stands for, if it is that."""
    if not (isinstance(error, AssertionError) and str(error).startswith("Unexpected fake buffer")):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: fx.GraphModule = frame.f_locals["gm"]
    constants = (node for node in module.graph.nodes if node.op == "get_attr")
    fakes = (node for node in constants if isinstance(getattr(module, str(node.target)), FakeTensor))
    return TensorKeptOutside(where(next(iter(next(fakes).users))), empty_everywhere())


def _emptied(value: Any, mode: FakeTensorMode) -> None:
    value = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
    if type(value) is _CACHE:
        if _is_poisoned(value, mode):
            value.cache_clear()
    elif isinstance(value, dict):
        for key in [key for key, item in value.items() if _holds(item, mode)]:
            del value[key]
    elif isinstance(value, list) and any(_holds(item, mode) for item in value):
        value[:] = [item for item in value if not _holds(item, mode)]


def _is_poisoned(cache: Any, mode: FakeTensorMode | None) -> bool:
    """What a cache refers to are its results, or a dict of them if it has no bound."""
    return any(_holds(value, mode) for value in gc.get_referents(cache))


def _holds(value: Any, mode: FakeTensorMode | None, depth: int = _DEPTH) -> bool:
    """Whether it is a fake tensor of ``mode``, or of any, or has one inside."""
    if isinstance(value, FunctionalTensor):
        return True
    if isinstance(value, FakeTensor):
        return mode is None or value.fake_mode is mode
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(_holds(item, mode, depth - 1) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_holds(item, mode, depth - 1) for item in value)
