"""The optimizer's update on flat shards, traced from torch.optim, as kernels that overwrite their state in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx, nn

import graphshard
from graphshard.codegen.triton import supports
from graphshard.passes.fuse import Fuse
from graphshard.region import Region, region_of
from interpreted import Interpreter
from traced import check

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-3, weight_decay=0.01, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
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


def arguments_of(region: Region) -> list[torch.Tensor]:
    """State as it may be after some steps: positive where squares are kept."""
    generator = torch.Generator().manual_seed(0)

    def value(node: fx.Node) -> torch.Tensor:
        like = node.meta["val"]
        if not like.dim():
            return torch.tensor(3.0 if "step" in node.name else 0.5, dtype=like.dtype)
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.dtype) + 0.25

    return [value(node) for node in region.inputs]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("plan", "dtype"), [("zero1", torch.float32), ("zero1", torch.float64)])
def test_update_in_place(interpreter: Interpreter, name: str, plan: str, dtype: torch.dtype) -> None:
    region, in_place = update_region(OPTIMIZERS[name], plan, dtype)
    assert not supports(region)
    assert in_place
    kernel = check(interpreter, region, *arguments_of(region), in_place=in_place)
    # No state of a bucket is copied: only scalars, which several programs read.
    flat = [node.name for node in region.inputs if node.meta["val"].dim()]
    assert not any(f"{name}.copy_(" in kernel.source for name in flat), kernel.source


def test_adamw_does_its_scalar_work_once_and_each_element_is_read_once(interpreter: Interpreter) -> None:
    region, in_place = update_region(OPTIMIZERS["adamw"], "zero1+bf16", torch.float32)
    kernel = check(interpreter, region, *arguments_of(region), in_place=in_place)
    first, _, second = kernel.source.partition("def region_kernel1")
    assert "power(" in first and "power(" not in second
    body = second.partition("def region(")[0]
    state = [node.name for node in region.inputs if "exp_avg" in node.name]
    assert state
    for name in state:
        assert body.count(f"tl.load({name} ") == body.count(f"tl.store({name} ") == 1, name
