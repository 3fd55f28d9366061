"""Operators whose kernels lay out results otherwise than torch's fake ones say, for inputs that are not dense in order.

Batch norm's make their input contiguous, or channels last, first; fake ones give results the strides of the input, and
the backward's those of the gradient, and views that are right for those fail on the real ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

BATCH_NORM = (F.batch_norm, torch.batch_norm)


def laid_out(batch_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``batch_norm`` on an input and of a gradient that are laid out as the kernels would."""

    @functools.wraps(batch_norm)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = batch_norm(_dense(input), *args, **kwargs)
        if result.requires_grad:
            result.register_hook(_dense)
        return result

    return run


def _dense(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=suggest_memory_format(value))
