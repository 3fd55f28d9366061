"""Models with complex numbers train as eager ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard


class Filter(nn.Module):
    """A learned filter of frequencies, and one complex gain per output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        filtered = (torch.fft.fft(self.first(x)) * self.filter).real
        result: Tensor = self.last(filtered) * self.gain.abs()
        return result


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=1e-2)])
@pytest.mark.parametrize("plan", ["dp1", "dp2+accum2", "zero1:size=2", "zero3:size=2+accum2", "zero3:size=2+pp2"])
def test_clipped_training_is_as_eager(plan: str, kind: Callable[..., torch.optim.Optimizer]) -> None:
    """The norm of complex gradients is that of their parts, and Adam's moments are those of each part."""
    torch.manual_seed(0)
    x, y, model = torch.randn(8, 6), torch.randn(8, 3), Filter()
    eager = copy.deepcopy(model)
    optimizer = kind(eager.parameters())
    ours = graphshard.compile(model, plan, loss_fn=F.mse_loss, optimizer=kind, max_grad_norm=0.1, executor="local")
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(eager(x), y)
        loss.backward()
        assert nn.utils.clip_grad_norm_(eager.parameters(), 0.1) > 0.1
        optimizer.step()
        torch.testing.assert_close(ours.step(x, y), loss.detach())
    torch.testing.assert_close(ours.state_dict(), eager.state_dict())


class Conjugate(nn.Module):
    """Conjugates, and negatives, as views of the batch and of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.complex(self.first(x.real), x.imag).conj()
        parts = torch.view_as_real(hidden.resolve_conj()).flatten(1)
        result: Tensor = self.last(torch.tanh(parts)) * (hidden.imag.resolve_neg() + x.conj().real).sum(1, keepdim=True)
        return result


@pytest.mark.parametrize("plan", ["dp1", "pp2:stages=last"])
def test_conjugates_that_are_views(plan: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, dtype=torch.complex128).conj(), torch.randn(8, 3, dtype=torch.float64)
    eager = Conjugate().double()
    ours = graphshard.compile(
        copy.deepcopy(eager), plan, loss_fn=F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1), executor="local"
    )
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.mse_loss(eager(x), y)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(ours.step(x, y), loss.detach())
    torch.testing.assert_close(ours.state_dict(), eager.state_dict())
