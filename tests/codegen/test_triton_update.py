"""The optimizer's update on flat shards, traced from torch.optim, as kernels that overwrite their state in place."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx, nn

import graphshard
from graphshard.codegen.triton import supports, write_kernel
from graphshard.program import Role
from graphshard.region import Region
from interpreted import Interpreter
from traced import check
from updates import OPTIMIZERS, update_region


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


def test_the_update_of_an_optimizer_that_torch_has_not_is_one_kernel() -> None:
    """Lion as a user writes it, element by element."""
    with torch.device("meta"):
        model = nn.Linear(64, 64, bias=False)
    compiled = graphshard.compile(
        model,
        "zero1+bf16",
        loss_fn=nn.functional.mse_loss,
        optimizer=OPTIMIZERS["lion"],
        world_size=2,
        executor="none",
        device="cuda",
        example_inputs=(torch.empty(8, 64, device="meta"), torch.empty(8, 64, device="meta")),
    )
    section = compiled.program.epilogue
    regions = [node.target for node in section.nodes() if isinstance(node.target, Region)]
    (update,) = [region for region in regions if any(node.meta["val"].dim() for node in region.inputs)]
    assert {"sign", "copy"} <= {str(node.target).split(".")[1] for node in update.operations}
    states = {node for slot, node in section.input_slots.items() if slot.role in (Role.STATE, Role.MASTER)}
    assert len(states) == 2
    for state in states:
        assert all(user.op == "output" or user.target is update for user in state.users)
    kernel = write_kernel(update, "lion")
    for node in update.inputs:
        read = re.findall(rf"tl\.load\({node.name}\b", kernel.source)
        assert len(read) == (node.meta["val"].dtype is not torch.bfloat16), kernel.source  # the old copy is not


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
