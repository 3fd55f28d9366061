"""Caches outside of modules that a forward pass fills: in the files and classes of the model, no fake tensor stays."""

from __future__ import annotations

import functools
import gc
import re
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from graphshard.errors import TensorKeptOutside
from graphshard.trace.containers import Kept, Limits, is_changed, is_followed, keep, put_back
from graphshard.trace.errors import is_users, raised_at
from graphshard.trace.marks import where

_CACHE: Any = functools._lru_cache_wrapper

_UNKNOWN = re.compile(r"cannot find \w*(Fake|Functional)Tensor\(.*\) in tensor_tracker", re.DOTALL)
"""What torch 2.11 says while it traces an operator; later ones trace it as a constant."""

_DEPTH = 3
"""How deep a fake tensor is looked for in tuples, lists and dicts."""

_LARGE, _HUGE = 10_000, 1_000_000
"""More entries than that are data rather than a cache: see ``kept_free``."""

_LIMITS = Limits(depth=2, widest=256, largest=_LARGE)


def places_of(modules: Sequence[nn.Module], loss_fn: object) -> tuple[Any, ...]:
    """What has attributes or globals in which a forward pass may keep something: the user's classes of ``modules``, the
    objects of other classes that these hold, ``loss_fn`` and the object that it is a method of, the files that all are
    defined in, and the files that those import."""
    every = [module for root in modules for module in root.modules()]
    held = [value for module in every for value in vars(module).values() if _is_users_object(value)]
    called = _called(loss_fn)
    kept = (one for one in called if hasattr(one, "__dict__") and not isinstance(one, (type, ModuleType)))
    objects = {id(value): value for value in (*held, *kept)}
    kinds = {one if isinstance(one, type) else type(one) for one in (*every, *objects.values(), *called)}
    classes = {base for kind in kinds for base in kind.__mro__ if _is_users(_file(base))}
    files = {file for one in (*classes, *called) if _is_users(file := _file(one))}
    imported = {value for file in files for value in vars(file).values() if isinstance(value, ModuleType)}
    return (*objects.values(), *classes, *files, *(file for file in imported - files if _is_users(file)))


def _called(loss_fn: object) -> list[Any]:
    """A function, what functools.partial wraps, and the object of a method."""
    owner = getattr(loss_fn, "__self__", None)
    inner = _called(loss_fn.func) if isinstance(loss_fn, functools.partial) else []
    return [one for one in (loss_fn, owner) if one is not None] + inner


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
    """Put back what the tensors of ``mode`` were put into meanwhile, so that each of capture's runs and later the user
    make their own: attributes, globals, and the content of dicts, lists and sets; functools caches are emptied.

    Only entries that are new or another object are looked at, and what holds no such tensor is left alone: a cache may
    keep more than a function's result, and another thread may have changed the rest. One that the user filled before is
    a constant of the graph. Of containers with more than ``_LARGE`` entries only the first and the last are looked at,
    those with more than ``_HUGE`` are left alone, and so is what is inside other containers beyond ``_LIMITS``.
    """
    before = [(place, dict(vars(place))) for place in places]
    kept: dict[int, Kept] = {}
    for _, old in before:
        for name, value in old.items():
            if is_followed(value) and len(value) <= _HUGE:
                keep(kept, value, None, name, _LIMITS)
    misses = [(one, one.cache_info().misses) for _, old in before for one in _caches(old)]
    try:
        yield
    finally:
        for place, old in before:
            _attributes_put_back(place, old, mode)
        for one in kept.values():
            if _is_filled(one, mode):
                put_back(one)
        known = {id(one) for one, number in misses if one.cache_info().misses == number}
        for place in places:
            for cache in _caches(dict(vars(place))):
                if id(cache) not in known and _is_poisoned(cache, mode):
                    cache.cache_clear()


def _caches(attributes: dict[str, Any]) -> list[Any]:
    methods = (staticmethod, classmethod)
    values = (value.__func__ if isinstance(value, methods) else value for value in attributes.values())
    return [value for value in values if type(value) is _CACHE]


def _attributes_put_back(place: Any, old: dict[str, Any], mode: FakeTensorMode) -> None:
    for name, value in list(vars(place).items()):
        if (name in old and old[name] is value) or not _holds(value, mode):
            continue
        if isinstance(place, type):
            setattr(place, name, old[name]) if name in old else delattr(place, name)
        elif name in old:
            vars(place)[name] = old[name]
        else:
            del vars(place)[name]


def _is_filled(one: Kept, mode: FakeTensorMode) -> bool:
    """Whether what is new in a container holds a fake tensor."""
    if len(one.container) <= _LARGE and not is_changed(one):
        return False
    old = {id(value) for value in _looked_at(one.content)}
    return any(id(value) not in old and _holds(value, mode) for value in _looked_at(one.container))


def _looked_at(container: Any) -> list[Any]:
    values = container.values() if isinstance(container, dict) else container
    if len(container) <= _LARGE:
        return list(values)
    return [] if isinstance(container, set) else [next(iter(values)), next(reversed(values))]


def empty_everywhere() -> list[str]:
    """Empty every functools cache that holds a fake tensor, wherever it is: their names. For when capture has failed,
    since it looks at all objects there are."""
    found = [one for one in gc.get_objects() if type(one) is _CACHE and _is_poisoned(one, None)]
    for one in found:
        one.cache_clear()
    return sorted(f"{one.__module__}.{one.__qualname__}" for one in found)


def kept_tensor(error: Exception) -> TensorKeptOutside | None:
    """What AOTAutograd's refusal of a fake tensor among the constants of a graph stands for, if it is that."""
    if isinstance(error, RuntimeError) and _UNKNOWN.match(str(error)):
        return TensorKeptOutside(raised_at(error), empty_everywhere())
    if not (isinstance(error, AssertionError) and str(error).startswith("Unexpected fake buffer")):
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: fx.GraphModule = frame.f_locals["gm"]
    constants = (node for node in module.graph.nodes if node.op == "get_attr")
    fakes = (node for node in constants if isinstance(getattr(module, str(node.target)), FakeTensor))
    return TensorKeptOutside(where(next(iter(next(fakes).users))), empty_everywhere())


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
    if isinstance(value, dict):  # not a lazy mapping, which would compute them
        return any(_holds(item, mode, depth - 1) for item in list(dict.values(value)))
    return isinstance(value, (tuple, list, set, deque)) and any(_holds(item, mode, depth - 1) for item in list(value))
