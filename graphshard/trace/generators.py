"""Random numbers that a model draws without torch: none may, since a graph would repeat them for ever."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from graphshard.errors import RandomOutsideTorch
from graphshard.trace.errors import Line, describe, is_users

_SEEDS = 0x243F6A88, 0x85A308D3
"""None that a model would use itself."""


@dataclass(frozen=True)
class _Generator:
    """One that everything in a process shares."""

    name: str
    state: Callable[[], Any]
    set_state: Callable[[Any], None]
    seed: Callable[[int], None]

    def seen(self) -> bytes:
        """Equal for equal states."""
        return pickle.dumps(self.state())


def _generators() -> list[_Generator]:
    found = [_Generator("Python's random", random.getstate, random.setstate, random.seed)]
    if (numpy := sys.modules.get("numpy")) is not None:
        ours = numpy.random
        found.append(_Generator("numpy.random", lambda: ours.get_state(legacy=False), ours.set_state, ours.seed))
    return found


@contextlib.contextmanager
def generators_kept(moved: set[str]) -> Iterator[None]:
    """The process's generators afterwards go on where they were; those that had moved are added to ``moved``."""
    before = [(one, one.state(), one.seen()) for one in _generators()]
    try:
        yield
    finally:
        for one, state, seen in before:
            if one.seen() != seen:
                moved.add(one.name)
                one.set_state(state)


def refuse_draws(moved: set[str], run: Callable[[], object]) -> None:
    """Refuse a model that draws from one of the generators named. One that seeds it first has the same numbers in each
    step anyway: two runs from different states tell.

    Args:
        run: runs the model, and moves no generator itself.

    Raises:
        RandomOutsideTorch: with the line.
    """
    for generator in _generators():
        if generator.name in moved:
            first, second = (_watched(generator, seed, run) for seed in _SEEDS)
            if first.state != second.state:
                where = "the forward pass" if first.line is None else describe(first.line)
                raise RandomOutsideTorch(where, generator.name)


class _Watch:
    """A trace function that finds the line of the user's code in which a generator moves first, and where that leaves
    it."""

    def __init__(self, generator: _Generator) -> None:
        self.line: Line | None = None
        self.state: bytes | None = None
        self._last: Line | None = None
        self._generator, self._before = generator, generator.seen()

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.state is not None or not is_users(frame.f_code.co_filename):
            return None
        seen = self._generator.seen()
        if seen != self._before:
            self.line, self.state = self._last, seen
        outer: FrameType | None = frame.f_back if event == "return" else frame
        while outer is not None and not is_users(outer.f_code.co_filename):
            outer = outer.f_back
        self._last = None if outer is None else (outer.f_code.co_filename, outer.f_lineno)
        return self


def _watched(generator: _Generator, seed: int, run: Callable[[], object]) -> _Watch:
    before = sys.gettrace()
    with generators_kept(set()):
        generator.seed(seed)
        watch = _Watch(generator)
        sys.settrace(watch)
        try:
            with contextlib.suppress(Exception):  # other numbers may be no good to the model
                run()
        finally:
            sys.settrace(before)
    return watch
