"""Models that share, freeze or leave out parameters, and what the compiled model returns when it is called."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._pytree import tree_flatten

import graphshard
from graphshard.errors import OutputNotJoined
from numerics.cases import adagrad, adamw, maker
from numerics.reference import assert_close, check_parity

PLANS = ("dp2", "zero2:size=2", "zero3+pp2", "zero3+pp2:schedule=zb-h1")


class Odd(nn.Module):
    """The first layer is frozen, one layer is never used, one is used twice, and a buffer is read at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.between = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.scale: Tensor
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.frozen(x)) * self.scale)
        for layer in self.between:
            x = x + torch.tanh(layer(x))
        result: Tensor = self.twice(x) * self.scale
        return result


def odd(rows: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    torch.manual_seed(0)
    return Odd(), (torch.randn(rows, 8), torch.randn(rows, 8)), {}, F.mse_loss


@pytest.mark.parametrize("plan", [*PLANS, "pp4"])
def test_frozen_unused_and_shared_parameters(plan: str) -> None:
    compiled = check_parity(lambda: odd(16), plan, adamw, dtype=torch.float64, max_grad_norm=0.1)
    untouched = Odd().state_dict() | odd(1)[0].state_dict()
    state = compiled.state_dict()
    for name in ("frozen.weight", "unused.weight", "unused.bias", "scale"):
        assert torch.equal(state[name], untouched[name].double()), name
    assert "unused.weight" not in compiled.optimizer.state_dict()["state"]


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2"])
def test_state_made_beforehand_of_parameters_that_are_never_updated(plan: str) -> None:
    """Adagrad makes all of its state in the constructor."""
    compiled = check_parity(lambda: odd(16), plan, adagrad, dtype=torch.float64)
    assert compiled.optimizer.state_dict()["state"]["unused.weight"]["sum"].shape == (8, 8)


class HalfTied(nn.Module):
    """A table is read at both ends, but only one of them trains it."""

    def __init__(self, trained: str) -> None:
        super().__init__()
        self.trained = trained
        self.table = nn.Parameter(torch.randn(16, 8))
        self.between = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        first = self.table if self.trained == "first" else self.table.detach()
        last = self.table if self.trained == "last" else self.table.detach()
        result: Tensor = self.between(F.embedding(ids, first)) @ last.t()
        return result


@pytest.mark.parametrize("trained", ["first", "last"])
@pytest.mark.parametrize("plan", ["dp2+pp2", "zero1+pp2", "zero3+pp2"])
def test_a_replica_that_gets_all_its_gradient_from_another_stage(plan: str, trained: str) -> None:
    def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
        torch.manual_seed(0)
        return HalfTied(trained), (torch.randint(16, (16,)), torch.randint(16, (16,))), {}, F.cross_entropy

    stages = plan.replace("pp2", "pp2:stages=between.2")
    check_parity(make, stages, adamw, dtype=torch.float64, max_grad_norm=0.1)


@pytest.mark.parametrize("plan", ["pp2", "dp2+pp2", "zero3+pp2:schedule=zb-h1"])
def test_a_gradient_that_depends_on_constants_alone(plan: str) -> None:
    """The last bias's, of a loss that is the output's mean."""

    def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        return model, (torch.randn(16, 4), torch.randn(16, 4)), {}, lambda out, target: out.mean()

    check_parity(make, plan, adamw, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_stage_that_keeps_no_optimizer_state(schedule: str) -> None:
    """Its parameter is frozen; the first step's collectives are issued in another order than those of later ones."""
    plan = f"zero2+pp2:schedule={schedule}"
    check_parity(maker("nested", plan), plan, adamw, dtype=torch.float64, max_grad_norm=0.5)


class Asks(nn.Module):
    """Asks whether it has parameters, and for what they were given, and keeps one under another name."""

    offset: Any

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("offset", torch.ones(4, dtype=torch.float64))
        weight: Any = self.linear.weight
        weight.gain, self.offset.factor = 2.0, -1

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.linear.weight
        self.last, gain = weight, weight.gain
        x = F.linear(x, self.last * gain, self.linear.bias) if isinstance(weight, nn.Parameter) else x
        asked = [isinstance(value, nn.Parameter) for value in (self.linear.bias, self.offset, x)]
        result: Tensor = x + self.offset * self.offset.factor * sum(asked)
        return result


def test_parameters_pass_for_parameters_while_the_model_is_captured() -> None:
    torch.manual_seed(0)
    model, x, y = Asks(), torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    expected = F.mse_loss(2 * F.linear(x, model.linear.weight, model.linear.bias / 2) - 1, y).item()
    compiled = graphshard.compile(model, "dp1", loss_fn=F.mse_loss, optimizer=partial(SGD, lr=0.1), executor="local")
    assert compiled.step(x, y).item() == pytest.approx(expected, rel=1e-12)
    assert compiled.evaluate(x, y).item() < expected
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]


class Skips(nn.Module):
    """Like a U-Net: every layer of the first half is read once more in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.layers[:4]:
            kept.append(x := torch.tanh(layer(x)))
        for layer in self.layers[4:]:
            x = torch.tanh(layer(x * kept.pop()))
        return x


@pytest.mark.parametrize("plan", ["pp2:schedule=zb-h2", "zero3:size=2+pp3:schedule=zb-h1", "pp4:schedule=zb-h2"])
def test_values_that_skip_stages_make_none_wait_in_a_circle(plan: str) -> None:
    def make() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
        torch.manual_seed(0)
        return Skips(), (torch.randn(48, 8), torch.randn(48, 8)), {}, F.mse_loss

    check_parity(make, plan, adamw, dtype=torch.float64)


class Outputs(nn.Module):
    """Returns a tensor, a tuple, or a dict with something that is no tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 16), nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        h = self.dropout(torch.tanh(self.a(x)))
        y = self.b(h)
        if self.kind == "tensor":
            return y
        if self.kind == "shapes":
            later = torch.stack([y, y + 1, y + 2, y + 3])  # as long as a part of the batch
            return {"y": y, "later": later, "flat": y.reshape(-1), "mean": y.mean(), "table": self.a.weight, "n": 4}
        if self.kind == "product":
            return y, y.t() @ y
        return (y, h) if self.kind == "tuple" else {"y": y, "rest": [h, "text", 3], "mean": None}


def loss_of_output(out: Any, target: Tensor) -> Tensor:
    y = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out["y"]
    return F.mse_loss(y, target)


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2"])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "shapes"])
def test_calling_returns_what_the_model_returns(kind: str, plan: str) -> None:
    torch.manual_seed(0)
    model = Outputs(kind)
    x, target = torch.randn(8, 8), torch.randn(8, 4)
    eager = copy.deepcopy(model)
    compiled = graphshard.compile(model, plan, loss_fn=loss_of_output, optimizer=partial(SGD, lr=0.1), executor="local")
    compiled.step(x, target)
    eager.load_state_dict(compiled.state_dict())
    eager.eval()
    expected, given = tree_flatten(eager(x)), tree_flatten(compiled(x))
    assert given[1] == expected[1]
    for ours, theirs in zip(given[0], expected[0], strict=True):
        if isinstance(theirs, Tensor):
            assert_close("output", ours, theirs.detach(), torch.float32)
        else:
            assert ours == theirs
    assert model.training


class TimeMajor(nn.Module):
    """Its batch is dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Any:
        out, (h, _) = self.lstm(x)
        return out, h


@pytest.mark.real_gpu("eager training's recurrent kernels")
def test_calling_a_model_whose_batch_is_not_dim_0() -> None:
    torch.manual_seed(0)
    model, x = TimeMajor(), torch.randn(2, 8, 4)
    compiled = graphshard.compile(
        copy.deepcopy(model), "dp4+batch_dims:0=1,1=1", loss_fn=lambda out, y: F.mse_loss(out[0], y), executor="local"
    )
    for ours, theirs in zip(compiled(x), model(x), strict=True):
        assert_close("output", ours, theirs.detach(), torch.float32)


class OneSize(nn.Module):
    """It takes four rows, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x.view(4, 8))
        return result


def test_calling_a_model_that_takes_one_batch_size() -> None:
    torch.manual_seed(0)
    model, x = OneSize(), torch.randn(8, 8)
    compiled = graphshard.compile(copy.deepcopy(model), "dp2", loss_fn=F.mse_loss, executor="local")
    assert_close("output", compiled(x), model.a(x).detach(), torch.float32)


def test_what_no_rank_can_say_of_the_whole_batch_is_refused() -> None:
    x = torch.randn(8, 8)
    with pytest.raises(
        OutputNotJoined, match=r"output 1 of the model \(in flattened order\), float32\[4,4\], is another"
    ):
        graphshard.compile(Outputs("product"), "dp2", loss_fn=loss_of_output, executor="local")(x)
    graphshard.compile(Outputs("product"), "pp2", loss_fn=loss_of_output, executor="local")(x)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_calling_a_transformers_model(name: str) -> None:
    plan = "zero3+pp2"
    model, _, kwargs, _ = maker(name, plan)()
    config: Any = model.config
    config.use_cache = False  # a cache is no tensor: the compiled model leaves it out
    eager = copy.deepcopy(model)
    compiled = graphshard.compile(model, plan, optimizer=adamw(model), executor="local")
    compiled.step(**kwargs)
    eager.load_state_dict(compiled.state_dict())
    eager.eval()
    inputs = {key: value for key, value in kwargs.items() if key != "labels"}
    ours, theirs = compiled(**inputs), eager(**inputs)
    assert type(ours) is type(theirs)
    assert list(ours) == list(theirs)
    assert_close("logits", ours.logits, theirs.logits.detach(), torch.float32)
    loss = torch.stack([eager(**{k: v[i : i + 2] for k, v in kwargs.items()}).loss for i in range(0, 16, 2)]).mean()
    assert_close("evaluation loss", compiled.evaluate(**kwargs), loss.detach(), torch.float32)
