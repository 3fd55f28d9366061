"""What torch writes by reading values of tensors though its result has a fixed shape: the same without reading any.

They do not check values, where torch's own would raise.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

_batch_norm: Any = _BatchNorm.forward


def cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """``torch.cov`` of [variables, observations], or of one variable's observations."""
    if input.dim() > 2:
        torch.cov(input)  # says what is wrong
    rows = input.view(1, -1) if input.dim() < 2 else input
    weights = aweights if fweights is None else fweights if aweights is None else fweights * aweights
    weighted = rows if weights is None else rows * weights
    total: Any = rows.shape[1] if weights is None else weights.sum()
    freedom = total - correction
    if weights is not None and aweights is not None and correction:
        freedom = total - correction * (weights * aweights).sum() / total
    freedom = freedom.clamp(min=0) if isinstance(freedom, Tensor) else max(freedom, 0)
    mean = weighted.sum(1, keepdim=True) / total
    centred = rows - mean
    product = centred @ (centred if weights is None else centred * weights).t().conj()
    result: Tensor = (product / freedom).squeeze()
    return result


def corrcoef(input: Tensor) -> Tensor:
    """``torch.corrcoef`` of [variables, observations]."""
    covariance = cov(input)
    if not covariance.dim():
        return covariance / covariance
    variance = covariance.diagonal()
    deviation = (variance.real if variance.is_complex() else variance).sqrt()
    result = covariance / deviation.view(-1, 1) / deviation.view(1, -1)
    if result.is_complex():
        return torch.complex(result.real.clip(-1, 1), result.imag.clip(-1, 1))
    return result.clip(-1, 1)


def combinations(input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    """``torch.combinations``: [combinations, r]."""
    if input.dim() != 1 or r < 1:
        return torch.combinations(input, r, with_replacement)
    of = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    chosen = torch.tensor(list(of(range(input.numel()), r)), dtype=torch.int64).view(-1, r)
    return input[chosen]


WITHOUT_VALUES: Mapping[Any, Callable[..., Tensor]] = {
    torch.cov: cov,
    Tensor.cov: cov,
    torch.corrcoef: corrcoef,
    Tensor.corrcoef: corrcoef,
    torch.combinations: combinations,
}
"""By torch's function, what to call instead."""


@contextlib.contextmanager
def batch_norm_without_values() -> Iterator[None]:
    """Batch norm with ``momentum=None``, whose running statistics are those of all batches, counts them as a tensor."""
    _BatchNorm.forward = _averaged  # type: ignore[method-assign]
    try:
        yield
    finally:
        _BatchNorm.forward = _batch_norm  # type: ignore[method-assign]


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
