"""Batch norm while a model is captured.

Its kernels make their input contiguous, or channels last, first; torch's fake ones give results the strides of the
input, and the backward's those of the gradient, and views that are right for those fail on the real ones. With
``momentum=None`` torch reads the value of its count of batches. And SyncBatchNorm asks for a process group, which no
graph knows: of one data-parallel rank it is batch norm, of several it is refused.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.modules.batchnorm import _BatchNorm

from graphshard.errors import UnsupportedModule
from graphshard.trace.meanwhile import meanwhile

_batch_norm: Any = _BatchNorm.forward


def laid_out(func: Any) -> Any:
    """What to call instead of a torch function: batch norm on an input and of a gradient that are laid out as the
    kernels would, else the function itself."""
    if func not in (F.batch_norm, torch.batch_norm):
        return func

    @functools.wraps(func)
    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = func(_dense(input), *args, **kwargs)
        if result.requires_grad:
            result.register_hook(_dense)
        return result

    return run


def _dense(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=suggest_memory_format(value))


def batches_counted() -> AbstractContextManager[None]:
    """Meanwhile modules with ``momentum=None``, whose statistics are those of all batches, count them as a tensor, and
    those that would synchronise statistics are like the others."""
    return meanwhile((_BatchNorm, "forward", _averaged), (nn.SyncBatchNorm, "forward", _averaged))


def check_own_statistics(model: nn.Module) -> None:
    """Of several data-parallel ranks, each has statistics of its own part of the batch.

    Raises:
        UnsupportedModule: a module that is being trained wants those of all ranks.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            instead = (
                "each data-parallel rank has statistics of its own; leave BatchNorm as it is, take a norm without "
                "statistics of the batch (GroupNorm), or train with one data-parallel rank"
            )
            raise UnsupportedModule(path, type(module).__name__, instead)


def _averaged(self: _BatchNorm, input: Tensor) -> Tensor:
    mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
    counts = self.momentum is None and self.training and self.track_running_stats
    if not counts or mean is None or var is None or count is None:
        result: Tensor = _batch_norm(self, input)
        return result
    self._check_input_dim(input)
    count.add_(1)
    of_batch = torch.zeros_like(mean), torch.zeros_like(var)
    result = F.batch_norm(input, *of_batch, self.weight, self.bias, True, 1.0, self.eps)
    share = 1 / count.double()
    for running, statistic in zip((mean, var), of_batch, strict=True):
        running.copy_((1 - share) * running + share * statistic)
    return result
