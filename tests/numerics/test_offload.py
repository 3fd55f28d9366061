"""Offloading changes no bit: losses, parameters and optimizer state are those of the same plan without it, whatever is
kept where."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphshard
from graphshard.compile import Compiled
from graphshard.execution import Op
from graphshard.pipeline import Pass
from marks import full
from numerics.cases import OPTIMIZERS, maker
from tagging import TagSaved

PLANS = (
    "dp2",
    "zero1:size=2",
    "zero2:size=2",
    "zero3:size=2",
    "zero3:size=2+accum2",
    "dp2+accum2",
    "zero3+pp2",
    "zero3+pp2:schedule=zb-h1",
    "dp2+zero3:size=2",
    "zero3:size=2,budget_gb=1+accum2",
)
PLACES = tuple(
    ",".join(
        f"{what}={where}" for what, where in zip(("optimizer", "params", "activations"), wheres, strict=True) if where
    )
    for wheres in product(("", "cpu", "nvme"), repeat=3)
    if any(wheres)
)
SELECTED = (
    ("zero2:size=2", "optimizer=nvme"),
    ("zero3+pp2", "optimizer=cpu,params=cpu,activations=cpu"),
    full("zero3+pp2", "params=nvme,activations=cpu"),
    ("zero3+pp2:schedule=zb-h1", "optimizer=nvme,activations=nvme"),
    ("zero3:size=2,budget_gb=1+accum2", "optimizer=cpu,params=nvme"),
)


def offloaded(plan: str, places: str, path: Path) -> str:
    return f"{plan}+offload:{places}" + (f",path={path}" if "nvme" in places else "")


UNCLIPPED = (
    ("dp2", "optimizer=nvme"),
    ("zero1:size=2", "optimizer=cpu,params=nvme"),
    ("zero3:size=2+accum2", "optimizer=nvme,params=nvme"),
    full("zero3+pp2", "optimizer=nvme,params=cpu"),
    full("zero3+pp2:schedule=zb-h1", "optimizer=nvme,activations=nvme"),
    ("dp1+accum2", "optimizer=cpu"),
)
"""Where an update begins before the backward ends."""


def trained(
    plan: str,
    batch_plan: str,
    optimizer: str,
    passes: Sequence[Pass] = (),
    name: str = "gpt",
    max_grad_norm: float | None = 0.5,
) -> tuple[Compiled, list[float]]:
    """Three steps with an evaluation in between."""
    torch.manual_seed(0)
    model, args, kwargs, loss_fn = maker(name, batch_plan)()
    compiled = graphshard.compile(
        model,
        plan,
        loss_fn=loss_fn,
        optimizer=OPTIMIZERS[optimizer](model),
        max_grad_norm=max_grad_norm,
        executor="local",
        passes=passes,
        measure_memory=True,
    )
    losses = [compiled.step(*args, **kwargs).item()]
    losses.append(compiled.evaluate(*args, **kwargs).item())
    losses += [compiled.step(*args, **kwargs).item() for _ in range(2)]
    return compiled, losses


def state_of(compiled: Compiled) -> dict[str, Any]:
    return {
        **compiled.state_dict(),
        **{
            f"{name} {key}": torch.as_tensor(value)
            for name, states in compiled.optimizer.state_dict()["state"].items()
            for key, value in states.items()
        },
    }


@functools.cache
def expected(plan: str, optimizer: str, max_grad_norm: float | None, name: str) -> tuple[list[float], dict[str, Any]]:
    compiled, losses = trained(plan, plan, optimizer, name=name, max_grad_norm=max_grad_norm)
    return losses, state_of(compiled)


def assert_same(found: Tensor, wanted: Tensor, what: str) -> None:
    """To the bit; but a GPU has kernels cut where something is moved, and the CPU may make its updates."""
    if torch.get_default_device().type == "cpu":
        assert torch.equal(found, wanted), what
    else:
        largest = wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * largest, msg=lambda told: f"{what}: {told}")


def check(
    plan: str, places: str, optimizer: str, path: Path, max_grad_norm: float | None = 0.5, name: str = "gpt"
) -> Compiled:
    passes = [TagSaved()] if "activations" in places else []
    moved = offloaded(plan, places, path)
    compiled, losses = trained(moved, plan, optimizer, passes, name, max_grad_norm)
    found = state_of(compiled)
    plain_losses, plain = expected(plan, optimizer, max_grad_norm, name)
    assert_same(torch.tensor(losses), torch.tensor(plain_losses), "losses")
    for key, value in plain.items():
        assert_same(found[key], value, key)
    for rank in compiled.report()["ranks"]:
        assert rank["peak_bytes"] == pytest.approx(rank["measured_peak_bytes"], rel=0.05)
    assert not list(path.iterdir())
    return compiled


@pytest.mark.parametrize(("plan", "places"), SELECTED)
def test_training_is_the_same_to_the_bit(plan: str, places: str, tmp_path: Path) -> None:
    check(plan, places, "adamw", tmp_path)


@pytest.mark.parametrize("optimizer", [full("sgd"), "adamw"])
@pytest.mark.parametrize(("plan", "places"), UNCLIPPED)
def test_an_update_during_the_backward_is_the_same_to_the_bit(
    plan: str, places: str, optimizer: str, tmp_path: Path
) -> None:
    compiled = check(plan, places, optimizer, tmp_path, max_grad_norm=None)
    for stage in compiled.execution_plan.stages:
        for end in filter(None, (stage.epilogue, stage.first_epilogue)):
            assert {ins.action for ins in end} > {"epilogue"}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("plan", ["zero3:size=2+fp16", "zero3:size=2+bf16", full("zero3:size=2+accum2+fp16")])
def test_a_lower_precision_is_the_same_to_the_bit(plan: str, max_grad_norm: float | None, tmp_path: Path) -> None:
    """Masters are reloaded beside the parameters, and loss scaling keeps either from being updated early."""
    compiled = check(plan, "optimizer=cpu,params=cpu", "adamw", tmp_path, max_grad_norm, "mlp")
    (stage,) = compiled.execution_plan.stages
    for end in filter(None, (stage.epilogue, stage.first_epilogue)):
        backward = [at for at, ins in enumerate(end) if ins.op is Op.RUN and ins.action != "epilogue"]
        updates = [at for at, ins in enumerate(end) if ins.op is Op.OFFLOAD]
        early = updates[0] < max(backward, default=-1)
        assert early == ("bf16" in plan and max_grad_norm is None)


def test_values_of_more_than_a_piece_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """A megabyte, from which on they are read where they are used: parameters, state and what a block keeps."""
    sizes = {"rows": 8, "depth": 2, "width": 256, "length": 128}

    def found(plan: str) -> list[Tensor]:
        torch.manual_seed(0)
        model, args, kwargs, loss_fn = maker("gpt", plan, **sizes)()
        optimizer = OPTIMIZERS["adamw"](model)
        compiled = graphshard.compile(model, plan, loss_fn=loss_fn, optimizer=optimizer, executor="local")
        losses = [compiled.step(*args, **kwargs) for _ in range(2)]
        away = compiled.report()["ranks"][0]["offloaded_bytes"].get("nvme", 0)
        assert away > 10 * 2**20 or "nvme" not in plan
        return [*losses, *compiled.state_dict().values()]

    moved = found(f"zero1+pp2+offload:optimizer=nvme,params=nvme,activations=nvme,path={tmp_path}")
    assert all(torch.equal(a, b) for a, b in zip(moved, found("zero1+pp2"), strict=True))


def test_a_view_of_a_hoisted_gather_is_no_storage_of_its_own(tmp_path: Path) -> None:
    """It outlives the segment that makes it, beside SGD's little state: counted twice it is the simulated peak."""
    check("zero3:size=2,budget_gb=1+accum2", "activations=cpu", "sgd", tmp_path)


class Mixing(nn.Module):
    """[batch, channels, rows, 16] both ways."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.across = nn.Conv2d(channels, channels, 3, padding=1)
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(torch.relu(self.up(torch.relu(self.across(x)))))
        return x + mixed


@pytest.mark.parametrize(
    "plan",
    ["dp1+accum4", "zero3:size=2,budget_gb=1+accum2", full("pp2:microbatches=4"), "pp2:schedule=zb-h2,microbatches=4"],
)
def test_a_product_is_rounded_with_what_it_is_added_to(plan: str) -> None:
    """Also where activations that come back lie between it and its bucket, which other micro-batches added to."""

    def run(plan: str) -> tuple[Compiled, list[Tensor]]:
        torch.manual_seed(0)
        model, x = nn.Sequential(Mixing(8), Mixing(8)), torch.randn(16, 8, 8, 16)
        made = graphshard.compile(
            model,
            plan,
            loss_fn=nn.functional.mse_loss,
            optimizer=OPTIMIZERS["adamw"](model),
            executor="local",
            measure_memory=True,
        )
        losses = [made.step(x, x.square()) for _ in range(3)]
        return made, [*losses, *made.state_dict().values()]

    moved, found = run(f"{plan}+offload:activations=cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, run(plan)[1], strict=True))
    for rank in moved.report()["ranks"]:
        assert rank["peak_bytes"] == pytest.approx(rank["measured_peak_bytes"], rel=0.05)


def test_state_that_the_first_step_makes(tmp_path: Path) -> None:
    check("zero1:size=2", "optimizer=nvme,params=cpu", "sgd", tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("plan", PLANS)
def test_everything(plan: str, places: str, optimizer: str, tmp_path: Path) -> None:
    check(plan, places, optimizer, tmp_path)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("plan", ["dp2", "zero1:size=2", "zero3:size=2"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_long_updates_use_the_same_kernels(
    optimizer: Any, plan: str, max_grad_norm: float | None, tmp_path: Path
) -> None:
    """Of buckets that are updated block by block, or by torch's own kernel, which rounds otherwise."""

    def run(plan: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(384, 384) for _ in range(3)])
        made = graphshard.compile(
            model,
            plan,
            loss_fn=nn.functional.mse_loss,
            optimizer=functools.partial(optimizer, lr=1e-2),
            max_grad_norm=max_grad_norm,
            executor="local",
        )
        x, y = torch.randn(4, 384), torch.randn(4, 384)
        losses = [made.step(x, y) for _ in range(3)]
        return [*losses, *made.state_dict().values()]

    plain, moved = run(plan), run(offloaded(plan, "optimizer=nvme,params=nvme", tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_state_goes_out_and_comes_in(tmp_path: Path) -> None:
    """A checkpoint of an offloaded run continues without offloading, and the other way round."""
    plan = "zero3:size=2"
    moved = offloaded(plan, "optimizer=nvme,params=cpu", tmp_path)
    _, args, kwargs, _ = maker("gpt", plan)()
    started, _ = trained(moved, plan, "adamw")
    parameters, states = started.state_dict(), started.optimizer.state_dict()
    following = [started.step(*args, **kwargs).item() for _ in range(2)]
    for continued in (plan, moved):
        other, _ = trained(continued, plan, "adamw")
        other.load_state_dict(parameters)
        other.optimizer.load_state_dict(states)
        assert [other.step(*args, **kwargs).item() for _ in range(2)] == following
