"""What a transformer layer saves for its backward is what is counted on paper."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import graphshard
from models.unfused import UnfusedGPT


def saved_bytes(depth: int, rows: int, length: int, width: int, heads: int) -> int:
    """Storages that the forward of one micro-batch in float16 leaves to the backward."""
    torch.manual_seed(0)
    x = torch.randn(rows, length, width, dtype=torch.float16)

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return (y * target).float().sum()

    compiled = graphshard.compile(
        UnfusedGPT(width, heads, length, depth).half(),
        "dp1",
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        executor="none",
        example_inputs=(x, x),
    )
    storages = compiled.execution_plan.stages[0].storages.values()
    return sum({s.root: s.nbytes for s in storages if s.category == "saved activations"}.values())


@pytest.mark.parametrize(("rows", "length", "width", "heads"), [(2, 256, 256, 8), (1, 128, 512, 4)])
def test_a_layer_saves_what_korthikanti_et_al_count(rows: int, length: int, width: int, heads: int) -> None:
    """s*b*h*(34 + 5*a*s/h) bytes: Reducing Activation Recomputation in Large Transformer Models, 2022, equation 1."""
    one, two = (saved_bytes(depth, rows, length, width, heads) for depth in (1, 2))
    expected = length * rows * width * (34 + 5 * heads * length / width)
    assert two - one == pytest.approx(expected, rel=0.05)
