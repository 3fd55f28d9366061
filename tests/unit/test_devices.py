"""Where a model is, and what it says of devices, is nothing that a graph knows; nor is the user's default device."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphshard
from graphshard.compile import Compiled
from graphshard.errors import UncapturableOperator
from graphshard.runtime.arena import Placing
from graphshard.runtime.segments import compile_segments
from graphshard.surroundings import device_for
from marks import full
from numerics.cases import adamw, maker


class NamesDevices(nn.Module):
    """Makes and moves tensors the way code for one GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * torch.arange(4, device="cuda:0") + torch.ones(4, device=torch.device("cuda", 1))
        loss: Tensor = (y + x.to("cuda") + torch.zeros(4).to(0) + torch.full((4,), 2.0).to(device="cuda")).mean()
        return loss


class NamesNone(NamesDevices):
    """The same on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * torch.arange(4)
        loss: Tensor = (y + torch.ones(4) + x + torch.zeros(4) + torch.full((4,), 2.0)).mean()
        return loss


def devices(compiled: Compiled) -> set[str]:
    values = [node.meta.get("val") for s in compiled.program.sections().values() for node in s.nodes()]
    return {str(value.device) for value in tree_leaves(values) if isinstance(value, Tensor)}


def test_devices_that_the_model_names_are_symbolic() -> None:
    found = []
    for kind in (NamesDevices, NamesNone):
        torch.manual_seed(0)
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        compiled = graphshard.compile(kind(), "zero3:size=2", optimizer=sgd, executor="local")
        found.append([compiled.step(torch.ones(4, 4)) for _ in range(2)])
        assert devices(compiled) == {"cpu"}
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


class Halved(torch.autograd.Function):
    """Its backward names a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.full((), 0.5, device="cuda")


class NamesThemInBackward(NamesNone):
    def __init__(self) -> None:
        super().__init__()
        self.linear.weight.register_hook(lambda gradient: gradient + torch.arange(4).to("cuda"))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Halved.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return result.sum()


def test_devices_that_the_backward_names_are_symbolic() -> None:
    model = NamesThemInBackward()
    before = model.linear.weight.detach().clone()
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    compiled = graphshard.compile(model, "dp1", optimizer=sgd, executor="local")
    compiled.step(torch.ones(4, 4))
    assert devices(compiled) == {"cpu"}
    half = torch.arange(4)[:, None] / 4 * 0.5  # of the mean over four columns
    wanted = before - (half.expand(4, 4) + torch.arange(4))
    torch.testing.assert_close(compiled.state_dict()["linear.weight"], wanted)


class Accelerated(NamesNone):
    """It turns the autocast of an accelerator on, as ``torch.autocast`` does where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        torch.set_autocast_enabled("cuda", True)
        try:
            return super().forward(x)
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_autocast_of_an_accelerator_is_not_lost_silently() -> None:
    with pytest.raises(UncapturableOperator, match=r"torch.autocast\('cuda'\) in .*the plan says .*: bf16 or fp16"):
        graphshard.compile(Accelerated(), "dp1", example_inputs=torch.ones(4, 4), executor="none")


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("nested", "zero3+pp2"),
        ("mlp", "zero1:size=2+offload:optimizer=cpu"),
        ("mlp", "zero3:size=2+accum2+fp16"),
        full("gpt", "zero3:size=2+accum2+fp16"),
        full("gpt", "zero3+pp2:schedule=zb-h1+recompute:policy=full"),
    ],
)
def test_the_default_device_changes_nothing(name: str, plan: str) -> None:
    """Nothing is made on it: on the meta device it would have no value."""
    losses, states = [], []
    for default in ("cpu", "meta"):
        model, args, kwargs, loss_fn = maker(name, plan)()
        with torch.device(default):
            compiled = graphshard.compile(
                model, plan, loss_fn=loss_fn, optimizer=adamw(model), executor="local", max_grad_norm=0.5
            )
            losses.append(torch.stack([compiled.step(*args, **kwargs) for _ in range(2)]))
            losses[-1] = torch.cat([losses[-1], compiled.evaluate(*args, **kwargs)[None]])
            state, updated = compiled.state_dict(), compiled.optimizer.state_dict()
            compiled.load_state_dict(state)
            compiled.optimizer.load_state_dict(updated)
            states.append([*state.values(), *(t for t in tree_leaves(updated) if isinstance(t, Tensor))])
            assert compiled.report()["ranks"]
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.only_cpu("kernels of a GPU do not run on meta tensors")
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.NAdam, functools.partial(torch.optim.SGD, momentum=0.9)]
)
def test_segments_make_nothing_without_saying_where(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is made without a device would be on the CPU, and here what is made with one is on meta."""
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: None)  # makes nothing; unknown to meta
    model, args, kwargs, loss_fn = maker("mlp", "zero3+pp2")()
    compiled = graphshard.compile(
        model,
        "zero3+pp2",
        loss_fn=loss_fn,
        optimizer=optimizer(model.parameters(), lr=0.1),
        example_inputs=(args, kwargs),
        executor="none",
        max_grad_norm=0.5,
    )
    plan = compiled.execution_plan
    for stage in plan.stages:
        functions = compile_segments(stage.segments, plan.kernels)
        for segment in stage.segments.values():
            given = [torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device="meta") for t in segment.input_types]
            memory = Placing(torch.device("meta")).of_run(0, segment.places)
            results = functions[segment.name](given, {"pp": 0, "shard": 0, "dp": 0}, torch.device("meta"), memory)
            assert {value.device.type for value in results} <= {"meta"}, segment.source


@pytest.mark.only_cpu
def test_a_meta_model_is_compiled_for_where_its_executor_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = nn.Linear(2, 2, device="meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {kind: device_for(kind, None, meta).type for kind in ("distributed", "local", "none")}
    assert found == {"distributed": "cuda", "local": "cpu", "none": "cpu"}
    assert device_for("distributed", None, nn.Linear(2, 2)).type == "cpu"
    assert device_for("local", "cuda:1", nn.Linear(2, 2)) == torch.device("cuda", 1)
