"""Later programs of a model put parameters, and where they have the same operations those, where the first one did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphshard
from graphshard.builder import Build
from graphshard.program import Program, info
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
