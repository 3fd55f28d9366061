"""Attributes of torch that are others while a model is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def meanwhile(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Each is (owner, name, value): the attribute has that value meanwhile, and its own again afterwards."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
