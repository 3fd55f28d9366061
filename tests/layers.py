"""A plan of some linear layers, as tests of code generation compile them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphshard
from graphshard.compile import Compiled


def compiled_layers(
    plan: str, *, layers: int, rows: int, width: int = 8, **options: Any
) -> tuple[Compiled, torch.Tensor]:
    """Layers [width, width] under AdamW, for ranks that nobody runs, and a batch [rows, width]; ``options`` of
    compile."""
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    x = torch.randn(rows, width)
    given: dict[str, Any] = {
        "loss_fn": nn.functional.mse_loss,
        "optimizer": torch.optim.AdamW,
        "executor": "none",
        "world_size": 4 if "pp2" in plan else 2,
    }
    return graphshard.compile(model, plan, example_inputs=(x, x), **(given | options)), x
