"""What a model is set to after its first step counts: training flags of its parts, and which parameters are trained."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.errors import TrainedParametersChanged

X, Y = torch.linspace(-1, 1, 32).view(8, 4), torch.linspace(1, -1, 24).view(8, 3)
adamw = functools.partial(torch.optim.AdamW, lr=1e-2)


class Net(nn.Module):
    """Of two layers one is used, by an argument; a third is never reached by the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.a, self.b, self.unused = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        x = self.norm(self.begin(x))
        result: Tensor = self.b(x) if second else self.a(x)
        return result


def compiled(model: nn.Module, plan: str, **more: Any) -> graphshard.Compiled:
    given: dict[str, Any] = {"optimizer": adamw, "executor": "local", "loss_fn": F.mse_loss, "cache": False}
    return graphshard.compile(model, plan, **(given | more))


def flagged(second: bool) -> tuple[Any, ...]:
    return ({"x": X, "second": second}, Y)


@pytest.mark.parametrize("plan", ["dp1", "zero3"])
def test_a_part_that_is_switched_to_evaluation_after_the_first_step(plan: str, caplog: Any) -> None:
    model = Net()
    eager = copy.deepcopy(model)
    optimizer = adamw([p for name, p in eager.named_parameters() if "unused" not in name and not name.startswith("b.")])
    made = compiled(model, f"{plan}:size=1" if plan == "zero3" else plan)
    for training in (True, False, True):
        made.model.norm.train(training)  # type: ignore[union-attr]
        eager.norm.train(training)
        loss = F.mse_loss(eager(X), Y)
        torch.testing.assert_close(made.step(X, Y), loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(made.state_dict()["norm.running_mean"], eager.norm.running_mean)
    told = [record.getMessage() for record in caplog.records if "tracing" in record.getMessage()]
    assert told == ["graphshard: norm.training is False now: tracing train again"]


def test_a_parameter_that_the_loss_does_not_reach_may_be_frozen(caplog: Any) -> None:
    made = compiled(Net(), "dp2")
    made.step(X, Y)
    made.model.unused.requires_grad_(False)
    made.step(X, Y)
    assert "graphshard: unused.weight.requires_grad is False now, and that of 1 other has changed" in caplog.text


@pytest.mark.parametrize("plan", ["dp1", "dp2", "zero3+pp2:microbatches=2", "zero1"])
def test_other_trained_parameters_are_refused_and_nothing_changes(plan: str) -> None:
    model = Net()
    model.norm = nn.Identity()  # type: ignore[assignment]
    twin = copy.deepcopy(model)
    made, expected = compiled(model, plan), compiled(twin, plan)
    for each in (made, expected):
        each.step(X, Y)
    made.model.begin.bias.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(TrainedParametersChanged) as caught:
        made.step(X, Y)
    assert str(caught.value) == (
        "parameter 'begin.bias' is trained no longer, and the first training step has settled which parameters have "
        "optimizer state; compile again, and give the new one this one's state_dict() and optimizer.state_dict()"
    )
    made.evaluate(X, Y)
    made(X)
    made.model.begin.bias.requires_grad_()  # type: ignore[union-attr]
    assert torch.equal(made.step(X, Y), expected.step(X, Y))
    assert all(map(torch.equal, made.state_dict().values(), expected.state_dict().values()))
    # As it says:
    model = copy.deepcopy(twin)
    model.begin.bias.requires_grad_(False)
    again = compiled(model, plan, example_inputs=(X, Y))
    again.load_state_dict(made.state_dict())
    again.optimizer.load_state_dict(made.optimizer.state_dict())
    again.step(X, Y)
    assert torch.equal(again.state_dict()["begin.bias"], made.state_dict()["begin.bias"])


@pytest.mark.parametrize("cached", [False, True])
def test_a_parameter_that_is_trained_only_now(cached: bool, tmp_path: Path) -> None:
    def started() -> graphshard.Compiled:
        model = Net()
        model.begin.requires_grad_(False)
        made = compiled(model, "zero3:size=2", cache=tmp_path)
        made.step(X, Y)
        return made

    made = started()
    made = started() if cached else made
    made.model.begin.requires_grad_()
    with pytest.raises(TrainedParametersChanged) as caught:
        made.step(X, Y)
    assert str(caught.value).startswith("parameter 'begin.weight' and 1 other are trained only now, and the first")
    assert str(caught.value).endswith("this one's state_dict() and a fresh optimizer")


def test_an_argument_that_selects_what_is_trained() -> None:
    made = compiled(Net(), "dp2")
    made.step(*flagged(False))
    with pytest.raises(TrainedParametersChanged, match=r"parameter 'b\.weight' and 1 other are trained only now"):
        made.step(*flagged(True))
    assert made.evaluate(*flagged(True)).isfinite()


def test_parameters_that_the_optimizer_does_not_have_may_be_frozen() -> None:
    model = Net()
    made = compiled(model, "zero2:size=2", optimizer=adamw(model.a.parameters()), max_grad_norm=0.1)
    made.step(X, Y)
    made.model.begin.requires_grad_(False)
    assert made.step(X, Y).isfinite()


def test_graphs_of_a_cached_plan_are_those_of_what_was_trained_then(tmp_path: Path) -> None:
    expected = compiled(Net(), "dp2", cache=tmp_path, example_inputs=(X, Y))
    made = compiled(Net(), "dp2", cache=tmp_path, example_inputs=(X, Y))
    made.model.begin.requires_grad_(False)
    assert made.program.params == expected.program.params
    assert not made.model.begin.weight.requires_grad  # type: ignore[union-attr]


def test_tracing_again_says_which_argument_has_changed(caplog: Any) -> None:
    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(out, target.to(out.dtype))

    made = compiled(Net(), "dp2", optimizer=None, loss_fn=loss_fn)
    made.step(*flagged(False))
    made.step(*flagged(True))
    made.step({"x": X, "second": True}, Y.double())
    made.step({"x": X}, Y.double())
    made.step({"x": X[:4]}, Y.double()[:4])
    assert [record.getMessage() for record in caplog.records if "tracing" in record.getMessage()] == [
        "graphshard: argument 1 is True now: tracing train again",
        "graphshard: argument 2 is float64[4,3] now: tracing train again",
        "graphshard: arguments of another structure now: tracing train again",
        "graphshard: new input shapes [2, 4], [2, 3]: tracing train again",
    ]
