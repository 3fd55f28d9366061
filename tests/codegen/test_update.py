"""Updates overwrite what they replace: parameters, state, and the parameters' copies in less than float32."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import fx

from graphshard.codegen.idioms import FusedAdam
from graphshard.codegen.kernels import Kernels
from graphshard.compile import Compiled
from graphshard.execution import ExecutionPlan
from graphshard.memory.replaced import kept_at
from graphshard.program import Role, Section
from graphshard.region import Region
from layers import compiled_layers

WIDTH = 512  # a kernel of its own, over blocks, pays for large parameters only
PLANS = ("zero3", "zero3+bf16", "zero1+bf16")


def made(plan: str) -> tuple[Compiled, torch.Tensor]:
    torch.manual_seed(0)
    return compiled_layers(plan, layers=2, rows=8, width=WIDTH, executor="local")


def built(plan: str) -> ExecutionPlan:
    compiled, _ = made(plan)
    assert compiled._main is not None
    return compiled._main.plan


def trained(plan: str) -> Mapping[str, torch.Tensor]:
    compiled, x = made(plan)
    for _ in range(3):
        compiled.step(x, x + 1.0)
    return compiled.state_dict()


@pytest.mark.parametrize("plan", PLANS)
def test_an_adam_update_leaves_parameters_where_they_were(plan: str) -> None:
    execution = built(plan)
    assert any(kernel.how == "its fused Adam, in place" for kernel in execution.kernels.values())
    kept = kept_at(execution, 0, first=False)
    shards = {slot for slot in execution.reads[0] if slot.role is Role.SHARD}
    assert len(kept) == len(shards) and bool(shards) is plan.startswith("zero3")
    updates = len(execution.stages[0].step()) - len(execution.stages[0].epilogue)
    assert all(at >= updates for at in kept.values())


def test_a_copy_that_is_overwritten_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    over = trained("zero3+bf16")

    def states(self: Kernels, node: fx.Node, region: Region, adam: FusedAdam, section: Section) -> dict[int, int]:
        return {region.outputs.index(new): region.inputs.index(old) for old, new in adam.replaced}

    monkeypatch.setattr(Kernels, "overwrites_update", states)
    new = trained("zero3+bf16")
    assert len(kept_at(built("zero3+bf16"), 0, first=False)) == 0
    assert all(torch.equal(over[name], new[name]) for name in over)
