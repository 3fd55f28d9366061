"""A pass of one's own: exact GELU becomes its tanh approximation, in the forward and, alike, in the backward.

A pass is a frozen dataclass. Its fields are its options; ``run`` takes a program and returns one. It sees graphs of
ATen operators and what the driver tells it of the mesh, never a rank or a device, so it can be tried on text::

    PYTHONPATH=examples graphshard opt FILE.graph --passes "my_pass:TanhGelu"
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import graphshard
from graphshard.diff import diff
from graphshard.diff.plain_text import unified
from graphshard.pipeline import Context
from graphshard.program import Program, info, set_info

aten = torch.ops.aten


@dataclass(frozen=True)
class TanhGelu:
    """Approximate every GELU below the module path ``below``; of the whole model if that is empty."""

    below: str = ""

    name: ClassVar[str] = "tanh-gelu"
    exact: ClassVar[bool] = False  # it changes numerics, and says so

    def run(self, program: Program, ctx: Context) -> Program:
        """A GELU that is approximate already, or of another module, stays as it is."""
        for node in program.body.nodes():
            if node.target not in (aten.gelu.default, aten.gelu_backward.default):
                continue
            inside = f"{info(node).module}.".startswith(f"{self.below}." if self.below else "")
            if inside and node.kwargs.get("approximate", "none") == "none":
                node.kwargs = {**node.kwargs, "approximate": "tanh"}
                set_info(node, made_by=self.name)
        return program


def main() -> None:
    """Compile a small model with the pass and without; show what it changed in the graph and in the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    x, y = torch.randn(4, 8), torch.randn(4, 1)
    plain, tanh = (
        graphshard.compile(
            copy.deepcopy(model),
            plan="zero3:size=2",
            loss_fn=nn.functional.mse_loss,
            optimizer=torch.optim.SGD,
            example_inputs=(x, y),
            executor="local",
            passes=passes,
        )
        for passes in ([], [TanhGelu()])
    )
    print(unified(diff(plain.program, tanh.program)))
    print(f"\nloss {plain.step(x, y).item():.6f}, with tanh-gelu {tanh.step(x, y).item():.6f}")


if __name__ == "__main__":
    main()
