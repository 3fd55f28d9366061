"""Large float32 matrix products on a CPU, by the faster of the two libraries that torch carries.

``torch.mm`` calls its BLAS, for which x86 builds have MKL, and MKL keeps to AVX2 on processors that are not Intel's.
oneDNN, which torch calls for convolutions and low precision, uses AVX-512 wherever there is. On AMD's Zen 5, whose
units are as wide, it takes half of MKL's time from 256 x 256 x 256 up, and longer than MKL below 128; a trial, once in
a process, tells. On Zen 4, whose units are half as wide, it takes 0.90 to 0.98 of MKL's time in wide products of an
inner length near 512 that are not added to anything, and as long or longer in others. A trial would find that in one
run and not in the next, whose results would differ in their last bits: there the processor's name decides.

Against float64, oneDNN's sums of 2,048 products are off by 5.7e-7 of their size and MKL's by 2.6e-7; summed in blocks
of 512, as here, by 4.1e-7. (Blocks of 256: 2.9e-7, and a step of the benchmark takes a fifth longer.) oneDNN makes
memory of its own: what it made is moved to where the plan wants it some rows at a time, while it is in the cache. As a
whole it would be more memory than the plan says, and new pages in every step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphshard.products import BLOCK, part_rows

_TRIAL = 256, 512, 512  # rows, inner length and columns of the product that is timed
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # input, transposed weight, bias, what follows
_WIDE = 1024  # columns
_CLEARLY = 0.8  # oneDNN must take at most this part of the other's time
_TRIALS = 7


class Library(Enum):
    """Which computes large products; the value is told in ``explain``."""

    BLAS = "torch's BLAS"
    BOTH = "oneDNN for wide ones of an inner length near 512, torch's BLAS for others"
    ONEDNN = "oneDNN"


def mm(left: Tensor, right: Tensor, out: Callable[[], Tensor] | None = None) -> Tensor:
    """The product of two matrices; ``out`` gives memory for it."""
    if _goes_to_onednn(left, right):
        return _by_onednn(_memory(left, right, out), left, right)
    return torch.mm(left, right, out=None if out is None else out())


def addmm(bias: Tensor, left: Tensor, right: Tensor, out: Callable[[], Tensor] | None = None) -> Tensor:
    """The product of two matrices, plus ``bias`` (1-D) in every row; ``out`` as for :func:`mm`."""
    if _goes_to_onednn(left, right):
        return _by_onednn(_memory(left, right, out), left, right, bias)
    return torch.addmm(bias, left, right, out=None if out is None else out())


def mm_into(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Overwrite ``target`` with the product of two matrices."""
    if _goes_to_onednn(left, right):
        _by_onednn(target, left, right)
    else:
        torch.mm(left, right, out=target)


def add_mm(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to ``target``."""
    if _goes_to_onednn(left, right, adds=True):
        _by_onednn(target, left, right, adds=True)
    else:
        target.addmm_(left, right)


def _goes_to_onednn(left: Tensor, right: Tensor, adds: bool = False) -> bool:
    if not left.is_cpu or (chosen := library()) is Library.BLAS:
        return False
    if chosen is Library.ONEDNN:
        return True
    # From a left matrix in columns, as of a weight's gradient, oneDNN is slower.
    return not adds and left.stride(1) == 1 and BLOCK // 2 < left.shape[1] <= BLOCK and right.shape[1] >= _WIDE


@functools.cache
def library() -> Library:
    """The choice for this process; some milliseconds, once. oneDNN is left out where it is switched off
    (``torch.backends.mkldnn.enabled``)."""
    if _linear is None or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return Library.BLAS
    rows, inner, columns = _TRIAL
    left, right = torch.ones(rows, inner, device="cpu"), torch.ones(inner, columns, device="cpu")
    target = torch.empty(rows, columns, device="cpu")
    try:
        times = [
            (_seconds(lambda: _by_onednn(target, left, right)), _seconds(lambda: torch.mm(left, right, out=target)))
            for _ in range(_TRIALS)
        ]
    except RuntimeError:
        return Library.BLAS  # a build without this operator for CPUs
    if min(onednn for onednn, _ in times) <= _CLEARLY * min(blas for _, blas in times):
        return Library.ONEDNN
    return Library.BOTH if torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_amds() else Library.BLAS


def _seconds(product: Callable[[], object]) -> float:
    begin = time.perf_counter()
    product()
    return time.perf_counter() - begin


def _is_amds() -> bool:
    """Whether the processor is known to be one of AMD's."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _by_onednn(target: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, adds: bool = False) -> Tensor:
    """Write the product to ``target``, or add it. In blocks of the inner dimension: oneDNN adds a sum up in one chain,
    whose rounding grows with it."""
    step = part_rows(target.shape[1])
    for begin in range(0, left.shape[1], BLOCK):
        weight = right[begin : begin + BLOCK].t()
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()  # other strides take its reference code, slower by orders of magnitude
        block = left[:, begin : begin + BLOCK]
        for part, rows in zip(target.split(step), block.split(step), strict=True):
            made = _linear(rows, weight, None if begin else bias, "none", [], "")
            if adds or begin:
                part.add_(made)
            else:
                part.copy_(made)
    return target


def _memory(left: Tensor, right: Tensor, out: Callable[[], Tensor] | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1]) if out is None else out()
