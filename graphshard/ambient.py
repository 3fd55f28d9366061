"""What a caller may have switched on around graphshard's work: torch.autocast and inference mode. Both are off
meanwhile, since a program says its own precision, and what is allocated outlives the caller's block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from graphshard.errors import AmbientAutocast

_DEVICES = ("cpu", "cuda")
_is_on = torch.is_autocast_enabled  # torch's own, which a model may be told otherwise of while it is captured


def is_on() -> bool:
    """Whether there is anything to switch off."""
    return _is_on("cpu") or _is_on("cuda") or torch.is_inference_mode_enabled()


@contextmanager
def off() -> Iterator[None]:
    """All of it is off meanwhile."""
    devices = [device for device in _DEVICES if _is_on(device)]
    # Leaving inference mode turns gradients on, too: not where there is none to leave.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        for device in devices:
            torch.set_autocast_enabled(device, False)
        try:
            yield
        finally:
            for device in devices:
                torch.set_autocast_enabled(device, True)


def check_precision(dtype: torch.dtype | None) -> None:
    """Whether a plan that computes in ``dtype`` (None: as the model has it) is what the caller's autocast asks for.

    Raises:
        AmbientAutocast: it is not.
    """
    for device in _DEVICES:
        if _is_on(device) and torch.get_autocast_dtype(device) != dtype:
            raise AmbientAutocast(device, torch.get_autocast_dtype(device), dtype)
