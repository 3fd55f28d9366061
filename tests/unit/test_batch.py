"""What cannot be split into micro-batches is refused in one line."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphshard
from graphshard.errors import BadBatchDims, BatchDoesNotSplit, GraphshardError, UnsupportedInput

X, Y = torch.ones(4, 4), torch.ones(4, 3)


def compiled(plan: str, **more: Any) -> graphshard.Compiled:
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    given: dict[str, Any] = {"loss_fn": F.mse_loss, "optimizer": sgd, "executor": "local"}
    return graphshard.compile(nn.Linear(4, 3), plan, **(given | more))


@pytest.mark.parametrize(
    ("plan", "batch", "error", "message"),
    [
        ("dp2", (X[:0], Y[:0]), BatchDoesNotSplit, r"of shape \[0, 4\] .* dim 0 must be a multiple of 2 above 0"),
        ("dp2", (X[:3], Y[:3]), BatchDoesNotSplit, r"of shape \[3, 4\] .* such as 2 or 4"),
        ("dp2+batch_dims:1=2", (X, Y), BadBatchDims, r"batch_dims:1=2: argument 1, of shape \[4, 3\], has dims 0 to 1"),
        ("dp2+batch_dims:1=0", (X, torch.ones(())), BadBatchDims, r"argument 1, of shape \[\], has no dim"),
        ("dp2+batch_dims:5=none", (X, Y), BadBatchDims, r"batch_dims:5=none: there is no argument 5; .* 0 to 1"),
        ("dp2", (X.to_sparse(), Y), UnsupportedInput, r"argument 0 .* is a torch\.sparse_coo tensor; pass a dense"),
        ("dp2", (X, Y.to("meta")), UnsupportedInput, r"argument 1 .* is a tensor on the meta device; pass one"),
    ],
)
def test_a_batch_that_cannot_be_split(plan: str, batch: Any, error: type[GraphshardError], message: str) -> None:
    made = compiled(plan)
    for run in (made.step, made.evaluate):
        with pytest.raises(error, match=message):
            run(*batch)


def test_a_call_has_no_targets_that_batch_dims_may_speak_of() -> None:
    made = compiled("dp2+batch_dims:1=none", optimizer=None)
    assert made(X).shape == (4, 3)


def test_an_empty_batch_that_is_not_split_is_run() -> None:
    assert compiled("dp1", optimizer=None)(X[:0]).shape == (0, 3)


def test_a_batch_without_values_can_be_traced() -> None:
    made = compiled("dp2", example_inputs=(X.to("meta"), Y.to("meta")))
    assert made.step(X, Y).isfinite()
    assert len(made._builds) == 1
