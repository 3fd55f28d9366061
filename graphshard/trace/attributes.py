"""What a forward pass does to the attributes of modules, and to the containers in them: put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from graphshard.trace.containers import Kept, Limits, copied, is_changed, items, keep, named, path, put_back
from graphshard.trace.generators import held_generators

_DEPTH = 4
"""How deep containers inside containers are followed, counted from a module's attributes."""

_PLAIN = (int, float, bool, str)

_SHOWN = 3
"""How many changes inside one container are named."""


@contextmanager
def unchanged(roots: Sequence[nn.Module], changes: set[str]) -> Iterator[None]:
    """Put back every attribute of the modules in ``roots`` afterwards, and what containers among them hold, hooks too,
    so that no fake tensor stays behind and each of capture's runs sees the same model. Numbers and strings that were
    changed, and generators of random numbers that were drawn from, are described in ``changes``."""
    kept: dict[int, Kept] = {}
    for root in roots:
        for name, module in root.named_modules():
            keep(kept, module.__dict__, None, name, Limits(_DEPTH))
    generators = [(one, one.state(), one.seen()) for one in held_generators(roots)]
    try:
        yield
    finally:
        for one in kept.values():
            if is_changed(one):
                changes.update(_changes(one))
                put_back(one)
        for generator, state, seen in generators:
            if generator.seen() != seen:
                changes.add(f"the state of the generator {generator.name}")
                generator.set_state(state)


def _changes(one: Kept) -> Iterator[str]:
    now = dict(items(copied(one.container)))
    pairs = [(key, old, now.get(key)) for key, old in items(one.content) if type(old) in _PLAIN]
    changed = [pair for pair in pairs if pair[1] is not pair[2] and pair[1] != pair[2] and _plain(pair[2])]
    shown = changed if one.holder is None else changed[:_SHOWN]
    for key, old, new in shown:
        yield f"{named(one, key)} from {old!r} to {new!r}"
    if shown != changed:
        yield f"{len(changed) - len(shown)} more values of {path(one)}"


def _plain(value: Any) -> bool:
    return value is None or type(value) in _PLAIN
