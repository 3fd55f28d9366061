"""Memory of the whole process: what of it goes back to the system, and how much it is."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h
_RETURNED_BYTES = 2**20  # blocks from this size on are the system's again as soon as they are freed


def return_freed_memory() -> bool:
    """Let this process give back what it frees, for a run that takes time to need less memory; False where the C
    library is not glibc.

    A heap that blocks of several sizes come from and go to has gaps: up to twice of what is live stays resident.
    By default glibc also keeps blocks up to 32 MB once it has seen one freed. What the environment says of malloc is
    left as it is.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES))


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
