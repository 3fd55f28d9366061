"""What a rank holds in memory: bytes of live values in its environment, and of the whole process."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class StorageMeter:
    """Follows the bytes that the values of one environment keep alive; a storage that several values view counts once.

    What a segment allocates and frees inside one call is not seen: this is what the plan is responsible for.
    """

    live_bytes: int = 0
    peak_bytes: int = 0
    _of_place: dict[int, int] = field(default_factory=dict)  # place in the environment to the key of its storage
    _users: dict[int, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    def update(self, environment: Sequence[torch.Tensor | None], places: Iterable[int]) -> None:
        """Look again at ``places`` of ``environment``, whose values an instruction may have changed."""
        for place in places:
            value = environment[place]
            new = None if value is None else value.untyped_storage().data_ptr()
            old = self._of_place.get(place)
            if new == old:
                continue
            if value is not None and new is not None:
                if new not in self._users:
                    self._users[new] = 0
                    self._sizes[new] = value.untyped_storage().nbytes()
                    self.live_bytes += self._sizes[new]
                self._users[new] += 1
                self._of_place[place] = new
            else:
                del self._of_place[place]
            if old is not None:
                self._users[old] -= 1
                if not self._users[old]:
                    del self._users[old]
                    self.live_bytes -= self._sizes.pop(old)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def clear(self) -> None:
        """Forget the environment, which is gone; the peak stays."""
        self.live_bytes = 0
        self._of_place.clear()
        self._users.clear()
        self._sizes.clear()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**31 - 1  # the largest value mallopt takes


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, as torch does on an accelerator; False where the C library is not glibc.

    A step frees and allocates the same activations and buffers again and again. By default glibc gives large ones back
    to the system, and every page of the next ones is a fault: up to 100,000 a step of a model of 34 million parameters,
    4% of its time and more. What the environment says of malloc is left as it is.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return mallopt is not None and all(mallopt(setting, _KEPT_BYTES) for setting in settings)


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, or since :func:`reset_peak_rss`."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak_rss() -> bool:
    """Begin a new measurement for :func:`peak_rss_bytes`; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_device_bytes(device: torch.device) -> int:
    """Peak of what torch allocated on an accelerator; for the CPU, of the whole process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
