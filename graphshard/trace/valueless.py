"""What torch writes by reading values of tensors though its result has a fixed shape: the same without reading any.

They do not check values, where torch's own would raise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphshard.trace.meanwhile import meanwhile


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


def gaussian_nll_loss(*args: Any, **kwargs: Any) -> Tensor:
    """``F.gaussian_nll_loss``, which asks ``torch.any`` whether a variance is negative, and nothing else."""
    with meanwhile((torch, "any", lambda _: False)):
        return F.gaussian_nll_loss(*args, **kwargs)


_WITHOUT_VALUES: Mapping[Any, Callable[..., Tensor]] = {
    torch.cov: cov,
    Tensor.cov: cov,
    torch.corrcoef: corrcoef,
    Tensor.corrcoef: corrcoef,
    torch.combinations: combinations,
    F.gaussian_nll_loss: gaussian_nll_loss,
}


def without_values(func: Any) -> Any:
    """What to call instead of a torch function: itself, unless it is one of those."""
    return _WITHOUT_VALUES.get(func, func)
