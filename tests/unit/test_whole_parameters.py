"""An optimizer whose update looks at whole parameters trains with replicas, and its state can be saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphshard


class Cubed(torch.optim.Optimizer):
    """Adds products of its momentum, a matrix, to the parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].mul_(0.9).add_(p.grad)
                    m: Tensor = state["momentum"]
                    p.add_(m @ m.t() @ m, alpha=-group["lr"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
        self.h = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.h[0](x)
        return result


def test_updates_of_whole_parameters_in_one_block() -> None:
    torch.manual_seed(0)
    eager = Model().double()
    optimizer = Cubed(eager.parameters())
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    compiled = graphshard.compile(
        copy.deepcopy(eager), plan="dp2", loss_fn=nn.functional.mse_loss, optimizer=Cubed, executor="local"
    )
    for _ in range(3):
        expected = nn.functional.mse_loss(eager(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(compiled.step(x, y), expected.detach())
    assert len(compiled.program.buckets) == 2  # whose updates act on matrices
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)
    state = compiled.optimizer.state_dict()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(state["state"][name]["momentum"], optimizer.state[parameter]["momentum"])
    compiled.optimizer.load_state_dict(state)
    torch.testing.assert_close(compiled.step(x, y), nn.functional.mse_loss(eager(x), y).detach())


class Scaled(torch.optim.Optimizer):
    """Steps of a length that does not depend on the gradient's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * state["momentum"] / (state["momentum"].norm() + 1e-3))


@pytest.mark.parametrize(("precision", "close"), [("", 1e-5), ("+bf16", 2e-2), ("+fp16:init_scale=1024", 3e-3)])
def test_vectors_and_scalars_keep_their_shape(precision: str, close: float) -> None:
    """A vector is as long as its bucket was before that was padded; masters are whole like the state."""

    class WithScalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.h[1](torch.tanh(self.h[0](x)) * self.factor)
            return result

    torch.manual_seed(0)
    eager = WithScalar()
    optimizer = Scaled(eager.parameters())
    x, y = torch.randn(4, 8), torch.randn(4, 4)
    compiled = graphshard.compile(
        copy.deepcopy(eager), plan="dp2" + precision, loss_fn=nn.functional.mse_loss, optimizer=Scaled, executor="local"
    )
    for _ in range(3):
        expected = nn.functional.mse_loss(eager(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(compiled.step(x, y), expected.detach(), rtol=close, atol=0.0)
    saved = compiled.state_dict()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0.0, atol=close)
    compiled.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in compiled.state_dict().items())
