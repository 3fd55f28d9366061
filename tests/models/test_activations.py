"""What a transformer layer saves for its backward is what is counted on paper."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import graphshard
from models.unfused import UnfusedGPT


def compiled(model: nn.Module, plan: str, rows: int, length: int, width: int) -> graphshard.Compiled:
    """``model`` for inputs in the dtype of its parameters."""
    torch.manual_seed(0)
    x = torch.randn(rows, length, width, dtype=next(model.parameters()).dtype)

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return (y * target).float().sum()

    return graphshard.compile(
        model,
        plan,
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        executor="none",
        example_inputs=(x, x),
    )


def saved_bytes(made: graphshard.Compiled) -> int:
    """Storages that the forward of one micro-batch leaves to the backward."""
    storages = made.execution_plan.stages[0].storages.values()
    return sum({s.root: s.nbytes for s in storages if s.category == "saved activations"}.values())


@pytest.mark.parametrize(("rows", "length", "width", "heads"), [(2, 256, 256, 8), (1, 128, 512, 4)])
def test_a_layer_saves_what_korthikanti_et_al_count(rows: int, length: int, width: int, heads: int) -> None:
    """s*b*h*(34 + 5*a*s/h) bytes: Reducing Activation Recomputation in Large Transformer Models, 2022, equation 1."""
    one, two = (
        saved_bytes(compiled(UnfusedGPT(width, heads, length, depth).half(), "dp1", rows, length, width))
        for depth in (1, 2)
    )
    expected = length * rows * width * (34 + 5 * heads * length / width)
    assert two - one == pytest.approx(expected, rel=0.05)


def test_what_autocast_keeps_more_is_said() -> None:
    """Of a model in float16 every saved value has two bytes; autocast keeps softmax, the residual stream of a float32
    input, and the norms' statistics in float32, and explain lists just that."""
    rows, length, width, heads = 2, 64, 64, 4
    half = compiled(UnfusedGPT(width, heads, length, 2).half(), "dp1", rows, length, width)
    mixed = compiled(UnfusedGPT(width, heads, length, 2), "dp1+fp16", rows, length, width)
    for made in (half, mixed):
        assert sum(made.report()["ranks"][0]["saved_activations"].values()) == saved_bytes(made)
    assert half.report()["ranks"][0]["saved_in_float32"] == {}
    assert "a micro-batch's forward saves 870.4 kB: 772.1 kB float16, 98.3 kB bool" in half.explain()
    wide = mixed.report()["ranks"][0]["saved_in_float32"]
    assert list(wide) == ["softmax", "add", "native_layer_norm"]
    assert saved_bytes(mixed) - saved_bytes(half) == sum(wide.values()) // 2 > 0
    assert (
        "float32 by autocast's lists and promotion: softmax 262.1 kB, add 98.3 kB, native_layer_norm" in mixed.explain()
    )
