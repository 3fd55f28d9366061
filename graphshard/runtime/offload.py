"""Where a process keeps offloaded values: host memory, or a file (nvme.py); and how they get there and back.

Copies are made beside what is computed, in a lane for each direction (streams.py). Each begins behind what was issued
before it, and its WAIT holds what is computed after it; the host blocks for files alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphshard.errors import OffloadPath
from graphshard.execution import TensorType, type_of
from graphshard.offloaded import span
from graphshard.runtime.nvme import Disk, Region
from graphshard.runtime.segments import SegmentFunction
from graphshard.runtime.streams import Lane, Streams, streams_of


class Transfer(Protocol):
    """A move that was started; it goes on by itself."""

    def done(self) -> bool:
        """Whether it is complete."""
        ...

    def wait(self) -> None:
        """Return when what comes next may rely on it. Raises OffloadFailed."""
        ...


@dataclass(frozen=True, eq=False)
class HostBlock:
    """Host memory for one value. It is free again when neither a value nor a transfer holds it."""

    memory: Tensor  # uint8


@dataclass(frozen=True)
class Offloaded:
    """A value that is not on the device. What it takes is given back when nobody holds this any more."""

    home: str
    kind: TensorType
    place: HostBlock | Region


@dataclass(frozen=True)
class HostWork:
    """A segment that the CPU runs: the types of its results, and by their numbers those of the values that they are
    written over."""

    function: SegmentFunction
    coordinates: Mapping[str, int]
    results: Sequence[TensorType]
    aliases: Mapping[int, int]


class HostMemory:
    """Blocks of host memory by size, each allocated once: page-locking one costs more than many copies."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        self._made: dict[int, int] = {}

    def reserve(self, blocks: Mapping[int, int]) -> None:
        """Have so many blocks of each number of bytes."""
        for nbytes, count in blocks.items():
            missing = count - self._made.get(nbytes, 0)
            self._free.setdefault(nbytes, []).extend(self._make(nbytes) for _ in range(missing))
            self._made[nbytes] = max(count, self._made.get(nbytes, 0))

    def allocate(self, nbytes: int) -> HostBlock:
        """A block of ``nbytes``; a new one if none is free."""
        if not self._free.get(nbytes):
            self.reserve({nbytes: self._made.get(nbytes, 0) + 1})
        free = self._free[nbytes]
        memory = free.pop()
        block = HostBlock(memory)
        weakref.finalize(block, free.append, memory).atexit = False
        return block

    @property
    def nbytes(self) -> int:
        """Of all blocks, in use or not."""
        return sum(nbytes * count for nbytes, count in self._made.items())

    def _make(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)


class Homes:
    """What one process keeps off its device.

    Args:
        path: the folder for files; None: no value is kept in one.
        streams: the lanes that copies are made in; None: those of the device.
    """

    def __init__(self, device: torch.device, path: str | None = None, streams: Streams | None = None) -> None:
        self.device, self.path = device, path
        self._streams = streams_of(device) if streams is None else streams
        self._host = HostMemory(self._streams.pins)
        self._disk: Disk | None = None
        self._worker: ThreadPoolExecutor | None = None  # of what the CPU computes
        self._computing = weakref.WeakKeyDictionary[HostBlock, Future[None]]()  # the last work on a block

    @property
    def disk(self) -> Disk:
        """The file, made when it is first needed.

        Raises:
            OffloadPath: there is no folder for it.
        """
        if self._disk is None:
            if self.path is None:
                raise OffloadPath("", "is not given; offload:optimizer=nvme,path=DIR says where files may be kept")
            self._disk = Disk(self.path, self.device)
        return self._disk

    def choices(self) -> dict[str, str]:
        """How files and host memory are accessed, for ``explain``."""
        found = {} if self._disk is None else {"nvme": self._disk.describe()}
        if self._streams.pins and self._host.nbytes:
            found["offloaded to cpu"] = f"{self._host.nbytes:,} bytes of page-locked memory"
        return found

    def reserve(self, wanted: Mapping[str, Mapping[int, int]]) -> None:
        """Have room, by home, for so many values of each number of bytes.

        Raises:
            OffloadSpace, OffloadPath: there is none in the file.
        """
        self._host.reserve(wanted["cpu"])
        if wanted["nvme"]:
            self.disk.reserve(wanted["nvme"])

    def offload(self, value: Tensor, home: str, old: Offloaded | None = None) -> tuple[Offloaded, Transfer]:
        """Start moving ``value`` out, into the place of ``old`` if there is one."""
        kept = old if old is not None else self._place(type_of(value), home)
        self._finish(kept)
        if isinstance(kept.place, Region):
            return kept, self.disk.write(value, kept.place)
        computed = self._streams.record(Lane.COMPUTE)
        copied = self._streams.behind(Lane.OUT, computed, _host_value(kept.place, kept.kind), value)
        return kept, _Copy(self._streams, copied, (value, kept))

    def reload(self, kept: Offloaded) -> tuple[Tensor, Transfer]:
        """Start bringing a value back; it may be read when that is done."""
        kind = kept.kind
        self._finish(kept)
        if isinstance(kept.place, Region):
            value = self.disk.empty(kind)
            return value, self.disk.read(kept.place, value)
        value = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self.device)
        computed = self._streams.record(Lane.COMPUTE)
        copied = self._streams.behind(Lane.IN, computed, value, _host_value(kept.place, kind))
        return value, _Copy(self._streams, copied, (value, kept))

    def compute(self, work: HostWork, kept: Sequence[Offloaded], old: Sequence[Offloaded | None]) -> list[Offloaded]:
        """Have the CPU do ``work`` on values in host memory, one after the other in a thread of its own. Each result is
        in the place of ``old`` if there is one, else in that of the value it is written over, else in a new one.

        Who touches one of these places from here on waits for that; and what fails, fails there.
        """
        before = [self._streams.record(lane) for lane in (Lane.OUT, Lane.IN)]  # until then they are being copied
        made = []
        for index, (kind, replaced) in enumerate(zip(work.results, old, strict=True)):
            source = kept[work.aliases[index]] if index in work.aliases else None
            over = source if source is not None and source.kind == kind else None
            made.append(replaced or over or self._place(kind, "cpu"))
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "graphshard-host")
        touched = [_block(value) for value in (*kept, *made)]
        earlier = [found for block in touched if (found := self._computing.get(block)) is not None]
        done = self._worker.submit(self._compute, work, list(kept), made, before, earlier)
        self._computing |= dict.fromkeys(touched, done)
        return made

    def _compute(
        self,
        work: HostWork,
        kept: Sequence[Offloaded],
        made: Sequence[Offloaded],
        before: Sequence[Any],
        earlier: Sequence[Future[None]],
    ) -> None:
        for done in earlier:  # it is; what it failed to make is not to be read
            done.result()
        for event in before:
            self._streams.block(event)
        with torch.no_grad():
            values = [_host_value(_block(value), value.kind) for value in kept]
            results = work.function(values, work.coordinates, torch.device("cpu"), _no_memory)
            for result, there in zip(results, made, strict=True):
                target = _host_value(_block(there), there.kind)
                if target.data_ptr() != result.data_ptr():
                    target.copy_(result)

    def _finish(self, kept: Offloaded) -> None:
        """Return when the CPU is done with the place of ``kept``."""
        if isinstance(kept.place, HostBlock) and (done := self._computing.pop(kept.place, None)) is not None:
            done.result()

    def keep(self, value: Tensor, home: str) -> Offloaded:
        """Move ``value`` out and wait for it."""
        kept, transfer = self.offload(value, home)
        transfer.wait()
        return kept

    def fetch(self, kept: Offloaded) -> Tensor:
        """Bring a value back and wait for it; it stays where it is, too."""
        value, transfer = self.reload(kept)
        transfer.wait()
        return value

    def settle(self) -> None:
        """Return when all copies have ended, those to and from files too, and all that the CPU computes, also what
        nobody waits for: after a step that failed."""
        wait(list(self._computing.values()))
        if self._disk is not None:
            self._disk.settle()
        for lane in (Lane.OUT, Lane.IN):
            self._streams.block(self._streams.record(lane))

    def close(self) -> None:
        """Give the file back."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _place(self, kind: TensorType, home: str) -> Offloaded:
        holder = self.disk if home == "nvme" else self._host
        return Offloaded(home, kind, holder.allocate(span(kind)))


def _block(kept: Offloaded) -> HostBlock:
    assert isinstance(kept.place, HostBlock), "the CPU computes with what is in host memory"
    return kept.place


def _no_memory(place: int) -> Tensor:
    raise AssertionError(f"the CPU has no memory laid out, and is asked for place {place}")


def _host_value(block: HostBlock, kind: TensorType) -> Tensor:
    """The value of that type in a block."""
    return block.memory.view(kind.dtype).as_strided(kind.shape, kind.stride)


class _Copy:
    """A copy between device and host memory. Until somebody has waited for it, ``held`` is in use: memory that was
    freed before would be written to by what is computed meanwhile, or by another copy."""

    def __init__(self, streams: Streams, event: Any, held: tuple[Tensor, Offloaded]) -> None:
        self._streams, self._event = streams, event
        self._held: tuple[Tensor, Offloaded] | None = held

    def done(self) -> bool:
        return self._streams.passed(self._event)

    def wait(self) -> None:
        self._streams.hold(Lane.COMPUTE, self._event)
        self._held = None
