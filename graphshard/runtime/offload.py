"""Where a process keeps offloaded values: host memory, or a file (nvme.py); and how they get there and back.

On CUDA the copies run on side streams, one per direction. Each begins behind the work that was issued before it, so
that memory that is used again is free by then, and the WAIT makes what comes after it wait. Nothing blocks the host but
file transfers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphshard.errors import OffloadPath
from graphshard.execution import TensorType, type_of
from graphshard.offloaded import span
from graphshard.runtime.nvme import Disk, Region


class Transfer(Protocol):
    """A move that was started; it goes on by itself."""

    def done(self) -> bool:
        """Whether it is complete."""
        ...

    def wait(self) -> None:
        """Return when what comes next may rely on it. Raises OffloadFailed."""
        ...


@dataclass(frozen=True)
class Offloaded:
    """A value that is not on the device. What it takes is given back when nobody holds this any more."""

    home: str
    kind: TensorType
    place: Tensor | Region


class Homes:
    """What one process keeps off its device.

    Args:
        path: the folder for files; None: no value is kept in one.
    """

    def __init__(self, device: torch.device, path: str | None = None) -> None:
        self.device, self.path = device, path
        self._disk: Disk | None = None
        cuda = device.type == "cuda"
        self._out, self._in = (torch.cuda.Stream(device) if cuda else None for _ in range(2))

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
        """How files are accessed, for ``explain``."""
        return {} if self._disk is None else {"nvme": self._disk.describe()}

    def reserve(self, regions: Mapping[int, int]) -> None:
        """Have room for so many values of each number of bytes in the file.

        Raises:
            OffloadSpace, OffloadPath: there is none.
        """
        if regions:
            self.disk.reserve(regions)

    def offload(self, value: Tensor, home: str, old: Offloaded | None = None) -> tuple[Offloaded, Transfer]:
        """Start moving ``value`` out, into the place of ``old`` if there is one; ``value`` must stay until then."""
        kept = old if old is not None else self._place(type_of(value), home)
        if isinstance(kept.place, Region):
            return kept, self.disk.write(value, kept.place)
        with _on(self._out):
            kept.place.copy_(value, non_blocking=True)
            return kept, _Copy(self._out)

    def reload(self, kept: Offloaded) -> tuple[Tensor, Transfer]:
        """Start bringing a value back; it may be read when that is done."""
        kind = kept.kind
        if isinstance(kept.place, Region):
            value = self.disk.empty(kind)
            return value, self.disk.read(kept.place, value)
        value = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self.device)
        with _on(self._in):
            value.copy_(kept.place, non_blocking=True)
            return value, _Copy(self._in)

    def keep(self, value: Tensor, home: str, old: Offloaded | None = None) -> Offloaded:
        """Move ``value`` out and wait for it."""
        kept, transfer = self.offload(value, home, old)
        transfer.wait()
        return kept

    def fetch(self, kept: Offloaded) -> Tensor:
        """Bring a value back and wait for it; it stays where it is, too."""
        value, transfer = self.reload(kept)
        transfer.wait()
        return value

    def close(self) -> None:
        """Give the file back."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _place(self, kind: TensorType, home: str) -> Offloaded:
        if home == "nvme":
            return Offloaded(home, kind, self.disk.allocate(span(kind)))
        # torch keeps freed pinned memory, and hands it out again when the copies on it are complete.
        pinned = self._out is not None
        host = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, pin_memory=pinned)
        return Offloaded(home, kind, host)


def _on(stream: torch.cuda.Stream | None) -> Any:
    """Work goes to ``stream``, behind what was issued so far; None: there are no streams."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)


class _Copy:
    """A copy between device and host memory; on the CPU it is made at once."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._event = None if stream is None else stream.record_event()

    def done(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
