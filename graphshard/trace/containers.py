"""What a forward pass does to containers, and to those inside them: seen by shallow copies, and put back."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from operator import is_
from typing import Any, NamedTuple

CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, deque, set))
"""Types whose content is put back; subclasses of them may have rules of their own."""


class Kept(NamedTuple):
    """A container, a copy of it, and where it is: under ``key`` in ``holder``; a module's ``__dict__`` has none, and
    ``key`` is the module's path."""

    container: Any
    content: Any
    holder: Kept | None
    key: Any


class Limits(NamedTuple):
    """What is followed: containers inside containers so deep; none inside those of more than ``widest`` entries, and
    none there of more than ``largest`` itself."""

    depth: int
    widest: float = math.inf
    largest: float = math.inf


def keep(kept: dict[int, Kept], container: Any, holder: Kept | None, key: Any, limits: Limits) -> None:
    """Add a container, and those inside it."""
    if id(container) in kept:
        return
    one = kept[id(container)] = Kept(container, copied(container) if container else (), holder, key)
    if limits.depth and container and len(container) <= limits.widest:
        inside = limits._replace(depth=limits.depth - 1)
        for inner, value in items(one.content):
            if is_followed(value) and len(value) <= limits.largest:
                keep(kept, value, one, inner, inside)


def is_followed(value: Any) -> bool:
    """Whether containers may be inside: a tuple is none, but may hold some."""
    return type(value) in CONTAINERS or type(value) is tuple


def copied(container: Any) -> Any:
    """A dict, list or set of the same objects."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def items(content: Any) -> Iterable[tuple[Any, Any]]:
    """What can be named: a set's elements cannot, and are no containers either."""
    if isinstance(content, dict):
        return content.items()
    return () if isinstance(content, set) else enumerate(content)


def path(one: Kept) -> str:
    """How an error or a warning names it."""
    return one.key if one.holder is None else named(one.holder, one.key)


def named(one: Kept, key: Any) -> str:
    """How an error or a warning names the entry ``key`` of it."""
    return f"{path(one)}.{key}".lstrip(".") if one.holder is None else f"{path(one)}[{key!r}]"


def is_changed(one: Kept) -> bool:
    """Whether other objects are in it than when it was copied, or in another order if it has one."""
    return bool(one.container or one.content) and not _same(one.container, one.content)


def put_back(one: Kept) -> None:
    """Make its content what it was."""
    one.container.clear()
    if isinstance(one.container, (list, deque)):
        one.container.extend(one.content)
    else:
        one.container.update(one.content)


def _same(container: Any, content: Any) -> bool:
    if isinstance(content, set):
        return bool(container == content)
    if len(container) != len(content) or not all(map(is_, container, content)):
        return False
    return not isinstance(content, dict) or all(map(is_, container.values(), content.values()))
