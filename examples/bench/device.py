"""What the benchmarks of memory ask of a device: its time, its peak, its name."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from graphshard.runtime.memory import reset_peak_rss


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on ``device``."""
    return tree_map_only(Tensor, lambda value: value.to(device), batch)


def seconds_so_far(device: torch.device) -> float:
    """Of the processor; of an accelerator on the wall, when it has done what it was told."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement for ``peak_device_bytes``."""
    if device.type == "cpu":
        reset_peak_rss()
    else:
        torch.cuda.reset_peak_memory_stats(device)


def description(device: torch.device) -> str:
    """One line: the device, the machine, versions."""
    known = [f"torch {torch.__version__}", f"Python {platform.python_version()}", platform.machine()]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        known = [found.name, f"{found.total_memory / 1e9:.0f} GB", f"CUDA {torch.version.cuda}", *known]
    return ", ".join(known)
