"""What a rank really holds while it runs a step, instruction by instruction."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Measured:
    """One step of one rank: for each instruction, bytes by category when the rank held most. A category is one of
    execution.CATEGORIES."""

    rows: tuple[dict[str, int], ...]
    first: bool  # it found no optimizer state

    @property
    def fullest(self) -> dict[str, int]:
        """The row of the peak."""
        return max(self.rows, key=lambda row: sum(row.values()), default={})

    @property
    def peak_bytes(self) -> int:
        """The most that the rank held."""
        return sum(self.fullest.values())


class Meter(ABC):
    """Measures the steps of one rank. ``rows``: those of the step that runs, one for each instruction so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    @abstractmethod
    def begin(self, held: Iterable[tuple[Tensor, str]]) -> None:
        """A step begins, in which the rank holds these values, each with its category. What else is alive of earlier
        steps and calls is the user's, such as outputs, and does not count."""

    @abstractmethod
    def running(self, watched: bool) -> AbstractContextManager[object]:
        """What an instruction is run in. Not ``watched``: only what it leaves counts."""

    @abstractmethod
    def ran(self, left: Iterable[tuple[Tensor, str]]) -> None:
        """An instruction has run and left these values, each with its category."""


class LiveStorages(Meter):
    """Follows every storage that an operator returns until torch frees it.

    What an operator takes for itself while it runs is not seen. Storages count in full, whatever part of them a value
    is; each operator takes some 20 microseconds longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[str, int] = {}
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # by storage: its end, bytes and category
        self._most = 0  # of the instruction that runs
        self._row: dict[str, int] = {}
        self._recorder = _Recorder(self)

    def begin(self, held: Iterable[tuple[Tensor, str]]) -> None:
        self.rows, self._live, self._known = [], {}, {}  # nobody follows a storage whose weak reference is gone
        for value, category in held:
            self.saw(value, category)

    def running(self, watched: bool) -> AbstractContextManager[object]:
        self._most = -1
        self._note()
        return self._recorder if watched else nullcontext()

    def ran(self, left: Iterable[tuple[Tensor, str]]) -> None:
        for value, category in left:
            self.saw(value, category)
        self.rows.append(self._row)

    def saw(self, value: Tensor, category: str = "") -> None:
        """``value`` exists. Without a category it is workspace, unless it is known for something else."""
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            end, nbytes, before = self._known[key]
            if category and category != before:
                self._known[key] = end, nbytes, category
                self._live[before] -= nbytes
                self._live[category] = self._live.get(category, 0) + nbytes
            return
        nbytes, category = storage.nbytes(), category or "workspace"
        self._known[key] = weakref.ref(storage, lambda _: self._freed(key)), nbytes, category
        self._live[category] = self._live.get(category, 0) + nbytes
        self._note()

    def _freed(self, key: int) -> None:
        _, nbytes, category = self._known.pop(key)
        self._live[category] -= nbytes

    def _note(self) -> None:
        total = sum(self._live.values())
        if total > self._most:
            self._most, self._row = total, dict(self._live)


class _Recorder(TorchDispatchMode):
    """Shows a meter what operators return."""

    def __init__(self, meter: LiveStorages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meter = meter

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._meter.saw(value)
        return result


class DeviceAllocator(LiveStorages):
    """What torch's allocator gave out on an accelerator, which serves all of a process: one rank. It counts what
    operators take for themselves, too, and knows of no categories: values of the plan have theirs, and what remains is
    workspace, a result of an instruction until it ends. What was there before a step and is none of the step's is left
    out; what a library keeps for good, such as cuBLAS's workspace, counts in the step that it is made in.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._others = 0

    def begin(self, held: Iterable[tuple[Tensor, str]]) -> None:
        super().begin(held)
        self._others = max(self._requested("current") - sum(self._live.values()), 0)

    def running(self, watched: bool) -> AbstractContextManager[object]:
        super().running(watched)
        torch.cuda.reset_peak_memory_stats(self._device)
        return nullcontext()

    def ran(self, left: Iterable[tuple[Tensor, str]]) -> None:
        # The allocator works in the order in which the host asks: nothing has to be waited for.
        total = self._requested("peak") - self._others
        known = {category: nbytes for category, nbytes in self._row.items() if category != "workspace"}
        self.rows.append(known | {"workspace": max(total - sum(known.values()), 0)})
        for value, category in left:
            self.saw(value, category)

    def _requested(self, when: str) -> int:
        """Bytes that were asked for, not rounded up."""
        count: int = torch.cuda.memory_stats(self._device)[f"requested_bytes.all.{when}"]
        return count


def make_meter(device: torch.device, ranks: int) -> Meter:
    """The meter for one of ``ranks`` ranks of this process."""
    return DeviceAllocator(device) if device.type == "cuda" and ranks == 1 else LiveStorages()
