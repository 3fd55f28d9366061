"""What each process of test_nonfinite.py runs: steps with debug_nan, one of them with a row that overflows on one
data-parallel rank, each in both exchanges that a CPU has."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from distributed.processes import report
from graphshard.errors import NonFiniteStep

ROWS, WIDTH = 16, 4


class Overflows(nn.Module):
    """A layer whose result is infinite for large values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.linear(x))


def scenario(plan: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Overflows())
    compiled = graphshard.compile(
        model,
        plan,
        loss_fn=F.mse_loss,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        debug_nan=True,
        timeout_s=30.0,
    )
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    rows = ROWS // compiled.dp_size
    part = slice(compiled.dp_rank * rows, (compiled.dp_rank + 1) * rows)
    losses = [float(compiled.step(x[part], y[part]))]
    before = compiled.state_dict()
    wrong = x[part].clone()
    if compiled.dp_rank == 1:
        wrong[-1] = 1e4
    try:
        compiled.step(wrong, y[part])
    except NonFiniteStep as error:
        message = str(error)
    after = compiled.state_dict()
    losses.append(float(compiled.step(x[part], y[part])))
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"message": message, "same": same, "losses": losses, "rank": int(os.environ["RANK"])}


if __name__ == "__main__":
    report(scenario, sys.argv[1])
