"""The margin loss of several labels. While torch captures, it writes it out as other operators, of which it takes what
is behind the -1 that ends a row's labels for label 0."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction


def of_first_labels(func: Any) -> Any:
    """What to call instead of a torch function: itself, unless it is that loss."""
    return _written_out if func is F.multilabel_margin_loss else func


@functools.wraps(F.multilabel_margin_loss)
def _written_out(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if input.dim() not in (1, 2) or input.shape != target.shape or reduction not in ("none", "mean", "sum"):
        return F.multilabel_margin_loss(input, target, reduction=reduction)  # says what is wrong
    classes = input.shape[-1]
    places = torch.arange(classes, device=target.device)
    end = torch.where(target == -1, places, classes).amin(-1, keepdim=True)
    is_label = places < end
    label = torch.where(is_label, target, 0)
    is_target = torch.zeros_like(target).scatter_add(-1, label, is_label.to(target.dtype)) > 0
    margin = F.relu(1 - input.gather(-1, label).unsqueeze(-1) + input.unsqueeze(-2))  # [..., label, class]
    counts = is_label.unsqueeze(-1) & ~is_target.unsqueeze(-2)
    rows = torch.where(counts, margin, 0).sum((-2, -1)) / classes
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()
