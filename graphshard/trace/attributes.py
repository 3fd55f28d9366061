"""What a forward pass does to the attributes of modules, and to the containers in them: put back."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

from torch import nn

_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, deque, set))
"""Types whose content is put back; subclasses of them may have rules of their own."""

_DEPTH = 4
"""How deep containers inside containers are followed, counted from a module's attributes."""

_PLAIN = (int, float, bool, str)

_SHOWN = 3
"""How many changes inside one container are named."""


class _Kept(NamedTuple):
    """A container, a copy of it, and where it is: under ``key`` in ``holder``; a module's ``__dict__`` has none, and
    ``key`` is the module's path."""

    container: Any
    content: Any
    holder: _Kept | None
    key: Any


@contextmanager
def unchanged(roots: Sequence[nn.Module], changes: set[str]) -> Iterator[None]:
    """Put back every attribute of the modules in ``roots`` afterwards, and what containers among them hold, hooks too,
    so that no fake tensor stays behind and each of capture's runs sees the same model. Numbers and strings that were
    changed are described in ``changes``."""
    kept: dict[int, _Kept] = {}
    for root in roots:
        for name, module in root.named_modules():
            _keep(kept, module.__dict__, None, name, _DEPTH)
    try:
        yield
    finally:
        for one in kept.values():
            if (one.container or one.content) and not _same(one.container, one.content):
                changes.update(_changes(one))
                _put_back(one)


def _keep(kept: dict[int, _Kept], container: Any, holder: _Kept | None, key: Any, depth: int) -> None:
    """Add a container, and those inside it."""
    if id(container) in kept:
        return
    one = kept[id(container)] = _Kept(container, _copied(container) if container else (), holder, key)
    if depth and container:
        for inner, value in _items(one.content):
            if type(value) in _CONTAINERS or type(value) is tuple:
                _keep(kept, value, one, inner, depth - 1)


def _copied(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _items(content: Any) -> Iterable[tuple[Any, Any]]:
    """What can be named: a set's elements cannot, and are no containers either."""
    if isinstance(content, dict):
        return content.items()
    return () if isinstance(content, set) else enumerate(content)


def _path(one: _Kept) -> str:
    return one.key if one.holder is None else _named(one.holder, one.key)


def _named(one: _Kept, key: Any) -> str:
    return f"{_path(one)}.{key}".lstrip(".") if one.holder is None else f"{_path(one)}[{key!r}]"


def _same(container: Any, content: Any) -> bool:
    """Whether the very same objects are in it, in the same order if it has one."""
    if isinstance(content, set):
        return bool(container == content)
    if len(container) != len(content) or not all(map(is_, container, content)):
        return False
    return not isinstance(content, dict) or all(map(is_, container.values(), content.values()))


def _changes(one: _Kept) -> Iterator[str]:
    now = dict(_items(_copied(one.container)))
    pairs = [(key, old, now.get(key)) for key, old in _items(one.content) if type(old) in _PLAIN]
    changed = [pair for pair in pairs if pair[1] is not pair[2] and pair[1] != pair[2] and _plain(pair[2])]
    shown = changed if one.holder is None else changed[:_SHOWN]
    for key, old, new in shown:
        yield f"{_named(one, key)} from {old!r} to {new!r}"
    if shown != changed:
        yield f"{len(changed) - len(shown)} more values of {_path(one)}"


def _plain(value: Any) -> bool:
    return value is None or type(value) in _PLAIN


def _put_back(one: _Kept) -> None:
    one.container.clear()
    if isinstance(one.container, (list, deque)):
        one.container.extend(one.content)
    else:
        one.container.update(one.content)
