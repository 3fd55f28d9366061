"""Hooks on a parameter's gradient are part of the backward, as in eager training."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.errors import PostAccumulateHook
from numerics.mixed import rounding

sgd = partial(torch.optim.SGD, lr=0.5)


def model() -> nn.Module:
    """Two tied layers; half of their rows are frozen by a mask, a bias by its sign, and one hook only looks."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    made[2].weight = made[0].weight
    params = dict(made.named_parameters())
    mask = (torch.arange(6) % 2).double()[:, None]
    params["0.weight"].register_hook(lambda g: g * mask)
    params["0.weight"].register_hook(lambda g: 2 * g)
    params["4.weight"].register_hook(lambda g: None)
    params["4.bias"].register_hook(torch.neg)
    return made


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "plan", ["dp1", "accum2+recompute:policy=full", "zero3:size=2+accum2", "zero3:size=2+pp2", "pp2:schedule=zb-h1"]
)
def test_training_is_as_eager(plan: str) -> None:
    x, y = batch()
    eager = model()
    optimizer = sgd(eager.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(eager(x), y).backward()
        optimizer.step()
    ours = graphshard.compile(model(), plan, loss_fn=F.mse_loss, optimizer=sgd, executor="local")
    for _ in range(3):
        ours.step(x, y)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_hook_sees_each_micro_batch() -> None:
    """Clamped before they are added up, as eager gradients that are accumulated."""
    x, y = batch()
    eager, twin = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()
    twin.load_state_dict(eager.state_dict())
    for module in (eager, twin):
        module.weight.register_hook(lambda g: g.clamp(-0.01, 0.02))
    optimizer = sgd(eager.parameters())
    for part in range(2):
        (F.mse_loss(eager(x.chunk(2)[part]), y.chunk(2)[part]) / 2).backward()
    optimizer.step()
    ours = graphshard.compile(twin, "accum2", loss_fn=F.mse_loss, optimizer=sgd, executor="local")
    ours.step(x, y)
    torch.testing.assert_close(ours.state_dict()["weight"], eager.weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("plan", "dtype"), [("bf16", torch.bfloat16), ("fp16:init_scale=65536", torch.float16)])
def test_a_hook_has_a_float32_gradient(plan: str, dtype: torch.dtype) -> None:
    """Squares of scaled gradients are no float16."""
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    twin = copy.deepcopy(eager)
    for made in (eager, twin):
        first = dict(made.named_parameters())["0.weight"]
        first.register_hook(lambda g: 1e-3 * g / (g.pow(2).mean().sqrt() + 1e-12))
    x, y = (t.float() for t in batch())
    device = x.device.type
    optimizer, scaler = sgd(eager.parameters()), torch.amp.GradScaler(device, 65536.0, enabled=dtype is torch.float16)
    ours = graphshard.compile(twin, plan, loss_fn=F.mse_loss, optimizer=sgd, executor="local", passes=rounding())
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = F.mse_loss(eager(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(ours.step(x, y), loss.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_hook_that_is_removed_is_called_no_more() -> None:
    x, y = batch()
    made = nn.Linear(6, 3).double()
    handle = made.weight.register_hook(torch.zeros_like)
    ours = graphshard.compile(made, "dp1", loss_fn=F.mse_loss, optimizer=sgd, executor="local")
    ours.step(x, y)
    before = ours.state_dict()["weight"]
    ours.step(x, y)
    assert torch.equal(ours.state_dict()["weight"], before)
    handle.remove()
    ours.step(x, y)
    assert not torch.equal(ours.state_dict()["weight"], before)


def test_a_hook_on_the_whole_gradient_is_refused() -> None:
    made = nn.Sequential(nn.Linear(6, 3))
    dict(made.named_parameters())["0.weight"].register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(PostAccumulateHook) as caught:
        graphshard.compile(made, "dp1", loss_fn=F.mse_loss, optimizer=sgd, executor="local")
    assert str(caught.value).startswith("parameter '0.weight' has a post-accumulate-grad hook, which a compiled step")
