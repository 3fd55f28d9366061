"""Updates of flat shards as regions, with what stands before and behind them: unscaling, clipping, casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import graphshard
from graphshard.passes.fuse import Fuse
from graphshard.region import Region, region_of


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as somebody may write it: torch has none."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every element by lr, against the sign of a mean of its gradients."""
        for group in self.param_groups:
            first, second = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                mean: Tensor = state["exp_avg"]
                direction = (mean * first + param.grad * (1 - first)).sign()
                param.mul_(1 - group["lr"] * group["decay"]).sub_(direction * group["lr"])
                mean.mul_(second).add_(param.grad, alpha=1 - second)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-3, weight_decay=0.01, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
    "lion": partial(Lion, lr=1e-3),
}


def update_region(optimizer: Callable[..., Any], plan: str, dtype: torch.dtype) -> tuple[Region, dict[int, int]]:
    """The pointwise nodes of an epilogue as one region, and which outputs overwrite which inputs."""
    model = nn.Sequential(nn.Linear(24, 50), nn.ReLU(), nn.Linear(50, 7)).to(dtype)
    compiled = graphshard.compile(
        model,
        plan=plan,
        loss_fn=nn.functional.mse_loss,
        optimizer=optimizer,
        world_size=2,
        executor="none",
        max_grad_norm=1.0,
        passes=[Fuse(most=1)],  # the region here is larger than that pass would make it: scalars are in it
        example_inputs=(torch.randn(8, 24, dtype=dtype), torch.randn(8, 7, dtype=dtype)),
    )
    section = compiled.program.epilogue
    nodes = [
        node
        for node in section.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("aten.") and node.meta["val"].dim() <= 1
    ]
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside))
    outputs = [node for node in nodes if not set(node.users) <= inside]
    stored = {slot: node for node, slot in section.inputs.items()}
    in_place = {
        at: inputs.index(stored[slot])
        for slot, node in section.outputs.items()
        for at, output in enumerate(outputs)
        if output is node and stored.get(slot) in inputs
    }
    return region_of(nodes, inputs, outputs), in_place
