"""Memory of the whole process: how it is kept, and how much it is."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**31 - 1  # the largest value mallopt takes
_RETURNED_BYTES = 2**20  # blocks from this size on are the system's again as soon as they are freed


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, as torch does on an accelerator; False where the C library is not glibc.

    What a step makes outside of its arena it frees and allocates again and again. By default glibc gives large blocks
    back to the system, and every page of the next ones is a fault: up to 100,000 a step of a model of 34 million
    parameters that has no arena, 4% of its time and more. What the environment says of malloc is left as it is.
    """
    return _set_malloc({_M_MMAP_THRESHOLD: _KEPT_BYTES, _M_TRIM_THRESHOLD: _KEPT_BYTES})


def return_freed_memory() -> bool:
    """Let this process give back what it frees, for a run that takes time to need less memory; False where the C
    library is not glibc.

    A heap that blocks of several sizes come from and go to has gaps: up to twice of what is live stays resident.
    By default glibc also keeps blocks up to 32 MB once it has seen one freed. What the environment says of malloc is
    left as it is.
    """
    return _set_malloc({_M_MMAP_THRESHOLD: _RETURNED_BYTES})


def _set_malloc(settings: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in settings.items())


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
