"""Later programs of a model put parameters, and where they have the same operations those, where the first one did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphshard
from graphshard import reference
from graphshard.builder import Build
from graphshard.program import Program, info
from graphshard.reference_inputs import random_inputs
from graphshard.testing import nodes


class Gated(nn.Module):
    """A block whose best cut may fall between operations that read no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.tanh(self.gate(x)) * torch.sigmoid(self.up(x)))
        return result


def stages(program: Program) -> list[tuple[str, int | None]]:
    return [(info(node).origin, info(node).stage) for node in program.body.nodes() if info(node).phase == "forward"]


@pytest.mark.parametrize("plan", ["pp2", "pp4"])
def test_another_shape_is_cut_at_the_same_operations(plan: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated() for _ in range(3)))
    compiled = graphshard.compile(
        model, plan, loss_fn=nn.functional.mse_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), executor="none"
    )
    programs = []
    for rows in (16, 48):
        compiled.trace(torch.randn(rows, 16), torch.randn(rows, 16))
        latest = list(compiled._builds.values())[-1]
        assert isinstance(latest, Build)
        programs.append(latest.graphs.program)
    first, second = programs
    assert stages(first) == stages(second)
    assert nodes(first).op("transfer").count == nodes(second).op("transfer").count


class Partly(nn.Module):
    """The loss reaches neither the first of its layers nor the last."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.used, self.end = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.begin(x)
        result: torch.Tensor = self.used(x)
        return result


@pytest.mark.parametrize("plan", ["dp1", "zero2", "zero3+accum2", "dp2+bf16"])
def test_a_call_that_is_compiled_first_does_not_know_what_has_a_gradient(plan: str) -> None:
    """So a bucket may hold parameters with one and parameters without."""
    torch.manual_seed(0)
    x, y, model = torch.randn(8, 4), torch.randn(8, 3), Partly()
    world_size = 1 if plan == "dp1" else 2

    def built(call: bool) -> tuple[torch.Tensor, Program, Program]:
        options: dict[str, Any] = {
            "optimizer": None,
            "max_grad_norm": 0.1,
            "executor": "local",
            "world_size": world_size,
        }
        compiled = graphshard.compile(copy.deepcopy(model), plan, loss_fn=nn.functional.mse_loss, **options)
        if call:
            compiled(x)
            assert [len(bucket.members) for bucket in compiled.program.buckets.values()] == [6]
        loss = compiled.step(x, y)
        latest = list(compiled._builds.values())[-1]
        assert isinstance(latest, Build)
        return loss, compiled.builder.before_passes(latest)[0], latest.graphs.program

    (loss, captured, after_call), (expected, _, alone) = built(True), built(False)
    assert torch.equal(loss, expected)
    inputs = random_inputs(captured)
    gradients, wanted = reference.run(after_call, inputs).values, reference.run(alone, inputs).values
    assert any("grad:used.weight" in name for name in wanted)
    for name, values in gradients.items():
        torch.testing.assert_close(values, wanted.get(name, [torch.zeros_like(value) for value in values]))
