"""Random numbers that a model draws without torch: none may, since a graph would repeat them for ever."""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from graphshard.errors import RandomOutsideTorch
from graphshard.trace.errors import Line, describe, is_users

_SEEDS = 0x243F6A88, 0x85A308D3
"""None that a model would use itself."""


@dataclass(frozen=True)
class Generator:
    """One of Python or numpy."""

    name: str
    state: Callable[[], Any]
    set_state: Callable[[Any], None]

    def seen(self) -> bytes:
        """Equal for equal states."""
        return pickle.dumps(self.state())


@dataclass(frozen=True)
class _Shared(Generator):
    """One that everything in a process shares. Within ``alone`` a function says the state in which this thread left
    it."""

    seed: Callable[[int], None]
    alone: Callable[[], contextlib.AbstractContextManager[Callable[[], bytes]]]


def _shared() -> list[_Shared]:
    found = [_Shared("Python's random", random.getstate, random.setstate, random.seed, _python_alone)]
    if (numpy := sys.modules.get("numpy")) is not None:
        ours = numpy.random
        state = functools.partial(ours.get_state, legacy=False)
        found.append(_Shared("numpy.random", state, ours.set_state, ours.seed, _numpy_alone))
    return found


def held_generators(roots: Sequence[nn.Module]) -> list[Generator]:
    """Those of Python and numpy that are attributes of modules, by their paths."""
    found = {}
    for root in roots:
        for path, module in root.named_modules():
            for name, value in vars(module).items():
                if id(value) not in found and (functions := _functions(value)) is not None:
                    found[id(value)] = Generator(f"{path}.{name}".lstrip("."), *functions)
    return list(found.values())


def _functions(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """What gives and sets the state of a generator, unless it has none of its own."""
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else (value.getstate, value.setstate)
    if (numpy := sys.modules.get("numpy")) is None:
        return None
    if isinstance(value, numpy.random.RandomState):
        return functools.partial(value.get_state, legacy=False), value.set_state
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, functools.partial(setattr, bits, "state")
    return None


@contextlib.contextmanager
def _python_alone() -> Iterator[Callable[[], bytes]]:
    """Calls of Python's generator are seen as those of this thread."""
    one: Any = random.random.__self__  # type: ignore[attr-defined]
    last = pickle.dumps(random.getstate())

    def profile(frame: FrameType, event: str, called: Any) -> None:
        nonlocal last
        if event == "c_return" and getattr(called, "__self__", None) is one and called.__name__ != "getstate":
            last = pickle.dumps(random.getstate())

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield lambda: last
    finally:
        sys.setprofile(before)


@contextlib.contextmanager
def _numpy_alone() -> Iterator[Callable[[], bytes]]:
    """Other threads that draw wait; so would a model for ever, if it waits for one of them. The lock of older numpy
    would have this thread wait, too: there, what others draw is seen as its."""
    ours = sys.modules["numpy"].random
    lock = ours.mtrand._rand._bit_generator.lock
    with lock if isinstance(lock, type(threading.RLock())) else contextlib.nullcontext():
        yield lambda: pickle.dumps(ours.get_state(legacy=False))


@contextlib.contextmanager
def draws_refused(run: Callable[[], object]) -> Iterator[None]:
    """Refuse a model that draws meanwhile from a generator that everything in the process shares, which then goes on
    where it was. One that seeds it first has the same numbers in each step anyway: two runs from different states tell.
    What only other threads draw is none of the model's.

    Args:
        run: runs the model.

    Raises:
        RandomOutsideTorch: with the line.
    """
    before = [(one, one.state(), one.seen()) for one in _shared()]
    lines = []
    try:
        yield
    finally:
        drawn = [(one, state) for one, state, seen in before if one.seen() != seen and _watched(one, None, run).state]
        for one, _ in drawn:
            first, second = (_watched(one, seed, run) for seed in _SEEDS)
            if first.state != second.state:
                lines.append((one.name, first.line))
        for one, state in drawn:
            one.set_state(state)
    for name, line in lines:
        raise RandomOutsideTorch("the forward pass" if line is None else describe(line), name)


class _Watch:
    """A trace function that finds the line of the user's code in which a generator moves first, and where that leaves
    it."""

    def __init__(self, seen: Callable[[], bytes]) -> None:
        self.line: Line | None = None
        self.state: bytes | None = None
        self._last: Line | None = None
        self._seen, self._before = seen, seen()

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.state is not None or not is_users(frame.f_code.co_filename):
            return None
        seen = self._seen()
        if seen != self._before:
            self.line, self.state = self._last, seen
        outer: FrameType | None = frame.f_back if event == "return" else frame
        while outer is not None and not is_users(outer.f_code.co_filename):
            outer = outer.f_back
        self._last = None if outer is None else (outer.f_code.co_filename, outer.f_lineno)
        return self


def _watched(generator: _Shared, seed: int | None, run: Callable[[], object]) -> _Watch:
    """What ``run`` does in this thread, from ``seed`` or from where the generator is."""
    before = sys.gettrace()
    with generator.alone() as seen:
        if seed is not None:
            generator.seed(seed)
        watch = _Watch(seen)
        sys.settrace(watch)
        try:
            with contextlib.suppress(Exception):  # other numbers may be no good to the model
                run()
        finally:
            sys.settrace(before)
    return watch
