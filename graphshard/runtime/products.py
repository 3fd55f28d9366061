"""Large float32 matrix products on a CPU, by the faster of the two libraries that torch carries.

``torch.mm`` calls its BLAS, for which x86 builds have MKL, and MKL keeps to AVX2 on processors that are not Intel's.
oneDNN, which torch calls for convolutions and low precision, uses AVX-512 wherever there is: on AMD's Zen 4 it takes
half of MKL's time from 256 x 256 x 256 up, and longer than MKL below 128. Which one a process uses is measured once.
Against float64, its sums of 2,048 products are off by 5.7e-7 of their size and MKL's by 2.6e-7; summed in blocks of
512, as here, by 4.1e-7, in the same time. (Blocks of 256: 2.9e-7, and a step of the benchmark takes a fifth longer.)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TRIAL = 256, 512, 512  # rows, inner length and columns of the product that is timed
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # input, transposed weight, bias, what follows
_BLOCK = 512
_CLEARLY = 0.8  # oneDNN must take at most this part of the other's time
_TRIALS = 7


def mm(left: Tensor, right: Tensor, out: Callable[[], Tensor] | None = None) -> Tensor:
    """The product of two matrices. ``out`` gives memory for it; oneDNN makes its own."""
    if _goes_to_onednn(left):
        return _by_onednn(left, right)
    return torch.mm(left, right, out=None if out is None else out())


def addmm(bias: Tensor, left: Tensor, right: Tensor, out: Callable[[], Tensor] | None = None) -> Tensor:
    """The product of two matrices, plus ``bias`` (1-D) in every row; ``out`` as for :func:`mm`."""
    if _goes_to_onednn(left):
        return _by_onednn(left, right, bias)
    return torch.addmm(bias, left, right, out=None if out is None else out())


def mm_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Overwrite ``target`` with the product of two matrices."""
    if _goes_to_onednn(left):
        target.copy_(_by_onednn(left, right))
    else:
        torch.mm(left, right, out=target)


def add_mm(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to ``target``."""
    if _goes_to_onednn(left):
        target.add_(_by_onednn(left, right))
    else:
        target.addmm_(left, right)


def _goes_to_onednn(left: Tensor) -> bool:
    return left.is_cpu and onednn_is_faster()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is there, not switched off (``torch.backends.mkldnn.enabled``) and clearly faster. Some
    milliseconds, once."""
    if _linear is None or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    rows, inner, columns = _TRIAL
    left, right = torch.ones(rows, inner, device="cpu"), torch.ones(inner, columns, device="cpu")
    try:
        times = [(_seconds(_by_onednn, left, right), _seconds(torch.mm, left, right)) for _ in range(_TRIALS)]
    except RuntimeError:
        return False  # a build without this operator for CPUs
    return min(onednn for onednn, _ in times) <= _CLEARLY * min(blas for _, blas in times)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    begin = time.perf_counter()
    product(left, right)
    return time.perf_counter() - begin


def _by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in blocks of the inner dimension: oneDNN adds a sum up in one chain, whose rounding grows with it."""
    total: Tensor | None = None
    for begin in range(0, left.shape[1], _BLOCK):
        weight = right[begin : begin + _BLOCK].t()
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()  # other strides take its reference code, slower by orders of magnitude
        part = _linear(left[:, begin : begin + _BLOCK], weight, None if begin else bias, "none", [], "")
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
