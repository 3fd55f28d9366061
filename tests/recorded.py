"""A recorder of segments for the CPU: it writes down operators, does none of them, and does them again when asked.

Memory is as treacherous as a pool's: what nobody held any more when a step was recorded is overwritten with NaN at the
same time of every later step, and so is everything from one step to the next.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from graphshard.execution import TensorType, type_of
from graphshard.offloaded import span
from graphshard.runtime.cuda_graphs import Recorder

aten = torch.ops.aten
_ROOMS = (aten.empty.memory_format, aten.empty_strided.default)


class OnCpu(Recorder):
    """``recorded``: how many graphs there are; ``refuse``: operators that cannot be recorded."""

    refuse: tuple[Any, ...] = (aten._local_scalar_dense.default,)

    def __init__(self) -> None:
        self.recorded = 0
        self._alive: Counter[int] = Counter()
        self._deaths: list[tuple[int, Tensor]] = []  # storages, and the graph before which nobody holds them
        self._made: list[list[Tensor]] = []  # of each graph, its storages
        self._origins: dict[int, Tensor] = {}  # by address of what was handed out
        self._ends: list[Any] = []

    def prepare(self) -> None:
        pass

    def record(self, issue: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        number = self.recorded
        self.recorded += 1  # what dies meanwhile is read by this graph
        log = Log(self.refuse)
        try:
            with log:
                results = issue()
        finally:
            log.undo()
        _poison(log.made.values())
        self._made.append([value for key, value in log.made.items() if key not in log.rooms])
        left = {_key(result) for result in results}
        temporary = [value for key, value in log.made.items() if key not in left]
        results = tuple(self._handed_out(result, log) for result in results)

        def replay() -> None:
            if number == 0:
                _poison(value for values in self._made[1:] for value in values)
            _poison(value for at, value in self._deaths if at == number)
            log.again()
            _poison(temporary)

        return replay, results

    def place(self, address: int, kind: TensorType) -> Tensor:
        if not kind.numel:
            return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype)
        memory = (ctypes.c_char * span(kind)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(kind.dtype).as_strided(kind.shape, kind.stride)

    def _handed_out(self, result: Tensor, log: Log) -> Tensor:
        """The result in a storage of its own at the same place, so that it is seen when nobody holds it any more."""
        key, origin = _key(result), self._origins.get(_key(result))
        if key in log.made:
            origin = log.made[key]
        if origin is None:
            return result  # it lies where something was before
        placed = self.place(result.data_ptr(), type_of(result))
        if placed.numel():
            self._origins[_key(placed)] = origin
            self._alive[_key(origin)] += 1
            end = weakref.ref(placed.untyped_storage(), lambda _: self._died(origin))
            self._ends.append(end)
        return placed

    def _died(self, origin: Tensor) -> None:
        self._alive[_key(origin)] -= 1
        if not self._alive[_key(origin)]:
            self._deaths.append((self.recorded, origin))


class Log(TorchDispatchMode):
    """Operators, with values that share the memory of theirs; ``made``: the storages they made, by address."""

    def __init__(self, refuse: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Callable[[], None]] = []
        self.made: dict[int, Tensor] = {}
        self.rooms: set[int] = set()
        self._refuse = refuse
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._refuse:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = dict(kwargs or {})
        given = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        self._keep(func, args, kwargs)
        held = tree_map_only(Tensor, _alias, (args, kwargs))
        result = func(*args, **kwargs)
        fresh = {
            index: _alias(value)
            for index, value in enumerate(tree_leaves(result))
            if isinstance(value, Tensor) and _key(value) not in given
        }
        for value in fresh.values():
            self.made[_key(value)] = _bytes(value)
        if func in _ROOMS:
            self.rooms |= {_key(value) for value in fresh.values()}
        else:
            self._calls.append(partial(_again, func, held, fresh))
        return result

    def note(self, call: Callable[[], None], written: Iterable[Tensor]) -> None:
        """Something else is about to be called that writes to those."""
        for target in written:
            self._keep_memory(target)
        self._calls.append(call)

    def again(self) -> None:
        """Do all of it with the values that there are now."""
        for call in self._calls:
            call()

    def undo(self) -> None:
        """Nothing was done to what was there before."""
        for now, before in self._before.values():
            now.copy_(before)

    def _keep(self, func: Any, args: Any, kwargs: Any) -> None:
        names = [argument.name for argument in func._schema.arguments]
        written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            for target in tree_leaves(value) if name in written else ():
                self._keep_memory(target)

    def _keep_memory(self, target: Tensor) -> None:
        if _key(target) not in self.made and _key(target) not in self._before:
            memory = _bytes(target)
            self._before[_key(target)] = memory, memory.clone()


def _again(func: Any, given: tuple[Any, Any], made: Mapping[int, Tensor]) -> None:
    args, kwargs = given
    again = tree_leaves(func(*args, **kwargs))
    for index, value in made.items():
        value.copy_(again[index])


def _alias(value: Tensor) -> Tensor:
    return value.as_strided(value.shape, value.stride(), value.storage_offset())


def _key(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _bytes(value: Tensor) -> Tensor:
    """All memory of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())


def _poison(memory: Any) -> None:
    for value in memory:
        value.fill_(0xFF)  # NaN in every type of floating point
