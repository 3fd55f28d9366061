"""Buffers that the forward updates and the backward needs as they were: on a pipeline other forwards come in between,
and what is recomputed reads them late."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.errors import IllegalProgram
from graphshard.program import Phase, Role
from graphshard.rewrite import copied
from graphshard.verify import verify
from numerics.cases import sgd
from numerics.reference import check_parity

WIDTH = 8


class Block(nn.Module):
    """A layer with a buffer ``m``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("m", torch.ones(WIDTH))
        self.m: Tensor


class InPlace(Block):
    """The old value is used, and differentiated by, before it is overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        scaled: Tensor = hidden * self.m.clone()
        with torch.no_grad():
            self.m.mul_(0.5).add_(hidden.abs().mean(0), alpha=0.5)
        return scaled


class Rebound(Block):
    """The attribute is given another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        scaled: Tensor = hidden * self.m
        self.m = self.m * 0.5 + 0.5 * hidden.detach().abs().mean(0)
        return scaled


class Viewed(Block):
    """The backward reads a view of the old value."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        scaled = hidden.view(-1, 2, WIDTH // 2) * self.m.view(2, WIDTH // 2).clone()
        self.m = self.m * 0.9 + 0.1 * hidden.detach().mean(0)
        result: Tensor = scaled.view(-1, WIDTH) * self.m
        return result


class Cheap(Block):
    """What reads a view of the old value costs little, so that the backward would rather compute it again."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        shifted: Tensor = F.elu(hidden) + self.m.view(1, -1)
        with torch.no_grad():
            self.m.lerp_(hidden.mean(0), 0.1)
        return torch.sin(shifted * x)


class Late(Block):
    """The old value is used again behind other layers, by which ZeRO-3 has gathered their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        old = self.m
        hidden = self.linear(x)
        self.m = old * 0.5 + hidden.detach().mean(0)
        result: Tensor = self.second(torch.tanh(hidden * self.m)) * old
        return result


class Overwritten(Block):
    """What was there is never read."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.linear(x))
        self.m.copy_(hidden.detach().mean(0))
        return hidden


class Feedback(Block):
    """The new value is made far behind the last read of the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.rest(torch.tanh(self.linear(x) * self.m))
        self.m = 1 + hidden.detach().mean(0)
        return hidden


class Delay(Block):
    """One buffer takes the old value of another, which is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", torch.zeros(WIDTH))
        self.before: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x) * self.m + self.before
        self.before.copy_(self.m)
        self.m = 1 + hidden.detach().abs().mean(0)
        return hidden


class Swap(Delay):
    """Two buffers take each other's values."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x) * self.m + self.before
        self.m, self.before = self.before, self.m
        return hidden


class FromOther(Delay):
    """A buffer is made of another one alone, without the batch."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x) * self.m + self.before
        self.before = self.m * 2
        self.m = self.m * 0.5
        return hidden


class _Saving(torch.autograd.Function):
    """Needs the buffer in the backward alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return hidden * 1.5

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        return gradient * m, None


class SavedOnly(Block):
    """No operation of the forward reads the old value."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        result: Tensor = _Saving.apply(hidden, self.m)  # type: ignore[no-untyped-call]
        self.m = 1 + hidden.detach().mean(0)
        return result


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def made(kind: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (kind(), nn.Tanh())]
    return nn.Sequential(*layers), (torch.randn(16, WIDTH), torch.randint(WIDTH, (16,))), {}, F.cross_entropy


KINDS = (
    InPlace,
    Rebound,
    Viewed,
    Cheap,
    Late,
    Overwritten,
    Feedback,
    Delay,
    Swap,
    FromOther,
    SavedOnly,
    spectral,
)
PLANS = (
    "dp1+accum2",
    "dp1+recompute:policy=selective",
    "zero3:size=2+accum2+recompute:policy=full",
    "pp2:schedule=gpipe+recompute:policy=full",
    "zero1+pp2:schedule=zb-h1",
    "zero3:size=2+pp2+recompute:policy=selective",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_training_is_that_of_eager(kind: Any, plan: str) -> None:
    check_parity(lambda: made(kind), plan, sgd, dtype=torch.float64)


def test_a_late_read_of_what_the_forward_replaces_is_illegal() -> None:
    model, inputs, _, loss_fn = made(InPlace)
    compiled = graphshard.compile(
        model, "dp1", loss_fn=loss_fn, optimizer=sgd(model), example_inputs=inputs, executor="none"
    )
    program = copied(compiled.program)
    verify(program)
    body = program.body
    old = next(node for node, slot in body.inputs.items() if slot.role is Role.CARRY and slot.name == "buffer:0.m")
    copy = next(user for user in old.users if user.target is torch.ops.aten.clone.default)
    reader = next(user for user in copy.users if user.op != "output" and user.meta["info"].phase is Phase.BACKWARD)
    reader.replace_input_with(copy, old)
    with pytest.raises(
        IllegalProgram, match=r"buffer:0\.m\" is replaced by the forward and read by a later phase; that needs a copy"
    ):
        verify(program)


class Normed(nn.Module):
    """Statistics of two kinds: floats that batches change, and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.one, self.two = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.second(torch.tanh(self.one(self.first(x)))))
        return result


@pytest.mark.parametrize("plan", ["dp2", "zero3:size=2+pp2:stages=second", "dp2+zero2:size=2+accum2"])
def test_evaluation_is_with_the_buffers_that_a_checkpoint_has(plan: str) -> None:
    """In training every data-parallel rank has its own."""
    torch.manual_seed(0)
    model, x, y = Normed().double(), torch.randn(16, WIDTH).double(), torch.randn(16, WIDTH).double()
    given: Any = {"loss_fn": F.mse_loss, "optimizer": functools.partial(torch.optim.SGD, lr=0.1), "executor": "local"}
    compiled = graphshard.compile(copy.deepcopy(model), plan, **given)
    before = compiled.evaluate(x, y)
    for index in range(3):
        compiled.step(x.roll(index, 0) * (1 + index), y)
    evaluated, output = compiled.evaluate(x, y), compiled(x)
    assert not torch.equal(evaluated, before)
    model.load_state_dict(compiled.state_dict())
    expected = model.eval()(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evaluated, F.mse_loss(expected, y), rtol=1e-12, atol=1e-12)
    compiled.load_state_dict(model.state_dict())
    assert torch.equal(compiled.evaluate(x, y), evaluated)
