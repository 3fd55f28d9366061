"""The queues in which a device works: one computes, others copy between its memory and the host's meanwhile.

Work of one lane is done in the order in which it is issued. What one lane needs of another is said by an event: a mark
behind what the one was given so far, which the other is held at. Neither blocks the host.

The memory of a value belongs to the lane that computes: freed, it is used again by what is computed next. A copy that
begins behind an event of that lane finds its target free; and when that lane has been held at the event of the copy,
the source may be freed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class Lane(StrEnum):
    COMPUTE = "compute"
    OUT = "out"  # copies to host memory
    IN = "in"  # copies from there
    FILE = "file"  # copies of pieces of files, both ways


class Streams(ABC):
    """The lanes of one device. ``pins``: host memory has to be page-locked for copies not to block the host."""

    pins = False

    @abstractmethod
    def record(self, lane: Lane) -> Any:
        """An event behind all that was issued in ``lane`` so far."""

    @abstractmethod
    def hold(self, lane: Lane, event: Any) -> None:
        """What is issued in ``lane`` from now on begins behind ``event``."""

    @abstractmethod
    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Copy in ``lane``; both must stay until that is done."""

    @abstractmethod
    def passed(self, event: Any) -> bool:
        """Whether ``event`` has been reached."""

    @abstractmethod
    def block(self, event: Any) -> None:
        """Return when ``event`` has been reached."""

    def behind(self, lane: Lane, before: Any, target: Tensor, source: Tensor) -> Any:
        """Copy in ``lane`` when the event ``before`` has been reached; the event of the copy."""
        self.hold(lane, before)
        self.copy(lane, target, source)
        return self.record(lane)


class NoStreams(Streams):
    """A device that does at once what it is told, as a CPU does: there is nothing to wait for."""

    def record(self, lane: Lane) -> None:
        return None

    def hold(self, lane: Lane, event: None) -> None:
        pass

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def passed(self, event: None) -> bool:
        return True

    def block(self, event: None) -> None:
        pass


class CudaStreams(Streams):
    """CUDA's streams. The lane that computes is the stream that is current where this is called."""

    pins = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {lane: torch.cuda.Stream(device) for lane in Lane if lane is not Lane.COMPUTE}

    def record(self, lane: Lane) -> torch.cuda.Event:
        event: torch.cuda.Event = self._stream(lane).record_event()
        return event

    def hold(self, lane: Lane, event: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(event)

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream(lane)):
            target.copy_(source, non_blocking=True)

    def passed(self, event: torch.cuda.Event) -> bool:
        passed: bool = event.query()
        return passed

    def block(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if lane is Lane.COMPUTE else self._side[lane]


def streams_of(device: torch.device) -> Streams:
    """The lanes of ``device``."""
    return CudaStreams(device) if device.type == "cuda" else NoStreams()
