"""debug_nan: a step whose loss or gradient is not finite names the node that made it so, and changes nothing."""

from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphshard
from graphshard.errors import NonFiniteStep
from graphshard.runtime.local import LocalExecutor
from graphshard.runtime.watch import look
from marks import few, full
from models import zoo
from numerics.mixed import rounding

HERE = Path(__file__)
WIDTH, ROWS = 4, 16
NAN, INF = float("nan"), float("inf")


class Head(nn.Module):
    """A layer and what a test puts behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def log_of_zero(x: Tensor) -> Tensor:
    return torch.log(x * 0)


def overflow(x: Tensor) -> Tensor:
    big = torch.exp(x * 0 + 1000)
    return big - big  # NaN, of infinities


def root_of_zero(x: Tensor) -> Tensor:
    return torch.sqrt(x * 0)


def masked(x: Tensor) -> Tensor:
    scores = (x.unsqueeze(2) * x.unsqueeze(1)).masked_fill(torch.ones(WIDTH, WIDTH).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ x.unsqueeze(2).flatten(1).unsqueeze(2)


def masked_and_root(x: Tensor) -> Tensor:
    return masked(x) + torch.sqrt(x * 0).unsqueeze(2)


def mask_by_log(x: Tensor) -> Tensor:
    mask = torch.log(torch.ones(WIDTH).cumsum(0) - 1)
    return (torch.sqrt(x * 0 - 1) + mask).softmax(-1)


def cut_off(x: Tensor) -> Tensor:
    return torch.exp(x * 0 + 1000).detach()


def all_masked(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones(WIDTH).bool(), float("-inf")).softmax(-1)


def large_where_negative(x: Tensor) -> Tensor:
    return torch.exp(torch.relu(-1000 * x))


def fine(x: Tensor) -> Tensor:
    return torch.tanh(x)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y.flatten(1) - target).square().mean()


def compiled(
    function: Callable[[Tensor], Tensor], plan: str = "zero3+pp2:stages=1,microbatches=4", **options: Any
) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Head(function))
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    return graphshard.compile(
        model, plan, loss_fn=loss_of, optimizer=optimizer, executor="local", **{"debug_nan": True, **options}
    )


def told(compiled: Any, *given: Tensor) -> list[str]:
    """The lines of the error of a step, before which and after which the parameters are the same."""
    before = compiled.state_dict() if compiled._main is not None else None
    with pytest.raises(NonFiniteStep) as caught:
        compiled.step(*given)
    if before is not None:
        after = compiled.state_dict()
        assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)
    return str(caught.value).splitlines()


def line_of(function: Any, code: str) -> str:
    """``file:line: code`` of the line of ``function`` that is ``code``."""
    lines, begin = inspect.getsourcelines(function)
    return f"{HERE}:{begin + [line.strip() for line in lines].index(code)}: {code}"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([-1.5, 2.0], "from -1.5 to 2"),
        ([-0.0], "from 0 to 0"),
        ([NAN, 1.0, -3.0, INF, -INF], "of 5 elements 1 NaN and 2 infinite, the rest from -3 to 1"),
        ([NAN, NAN], "of 2 elements 2 NaN"),
        (NAN, "NaN"),
        ([complex(0.5, INF), complex(2.0, -1.0)], "of 4 elements 1 infinite, the rest from -1 to 2"),
        ([], "empty"),
    ],
)
def test_what_is_said_of_a_value(values: Any, says: str) -> None:
    seen = look(torch.tensor(values))
    assert str(seen) == says
    assert seen.bad == ("NaN" in says or "infinite" in says)


def test_the_log_of_zero_in_the_second_stage() -> None:
    lines = told(compiled(log_of_zero), *batch())
    assert lines[0].endswith("NaN or infinite; nothing was updated")
    assert lines[0].startswith("the loss and ")
    assert lines[1].startswith("  first made by %log : f32[2,4] = aten.log.default(%mul")
    assert lines[2] == f"  from {line_of(log_of_zero, 'return torch.log(x * 0)')}"
    assert lines[3] == ("  in graph body, phase forward, stage 1, micro-batch 0, data-parallel rank 0 of 2, module 1")
    assert lines[4] == "  its value: of 8 elements 8 infinite"
    assert lines[5:] == ["  of %mul: from 0 to 0"]


def test_an_overflow_is_named_not_the_nan_that_comes_of_it() -> None:
    lines = told(compiled(overflow), *batch())
    assert lines[1].startswith("  first made by %exp")
    assert lines[4:] == ["  its value: of 8 elements 8 infinite", "  of %add: from 1000 to 1000"]


def test_a_nan_of_the_backward_pass_alone_has_the_line_of_its_forward() -> None:
    lines = told(compiled(root_of_zero), *batch())
    assert "the loss" not in lines[0]
    assert re.match(r"  first made by %div\w* : .*phase=\w+, .*forward=sqrt", lines[1])
    assert lines[2] == f"  from {line_of(root_of_zero, 'return torch.sqrt(x * 0)')}"
    assert "phase backward, stage 1, micro-batch 0" in lines[3]


@pytest.mark.parametrize("function", [fine, masked])
@pytest.mark.parametrize(
    "plan", ["dp2", full("zero2"), full("zero3:budget_gb=1"), "pp2:stages=1,schedule=zb-h1", "zero3+pp2:stages=1"]
)
def test_a_finite_model_and_a_causal_mask_are_silent_and_train_alike(
    function: Callable[[Tensor], Tensor], plan: str
) -> None:
    plain, watched = (compiled(function, plan, debug_nan=flag, passes=rounding()) for flag in (False, True))
    for _ in range(3):
        assert torch.equal(plain.step(*batch()), watched.step(*batch()))
    other = watched.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in plain.state_dict().items())


def test_a_mask_is_not_blamed_for_a_nan_beside_it() -> None:
    assert "forward=sqrt" in told(compiled(masked_and_root), *batch())[1]


def test_an_infinity_that_meets_a_nan_did_not_make_it() -> None:
    lines = told(compiled(mask_by_log), *batch())
    assert lines[1].startswith("  first made by %sqrt")


def test_a_stage_whose_own_gradients_are_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Head(cut_off), nn.Linear(WIDTH, WIDTH))
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    step = graphshard.compile(
        model, "pp2:stages=1", loss_fn=loss_of, optimizer=optimizer, executor="local", debug_nan=True
    )
    lines = told(step, *batch())
    assert lines[1].startswith("  first made by %exp")
    assert "stage 0, micro-batch 0" in lines[3]


def test_of_a_row_that_is_masked_altogether_the_softmax_is_named() -> None:
    lines = told(compiled(all_masked), *batch())
    assert lines[1].startswith("  first made by %_softmax")
    assert lines[4] == "  its value: of 8 elements 8 NaN"
    assert lines[5] == "  of %masked_fill: of 8 elements 8 infinite"


def test_a_nan_in_the_batch() -> None:
    x, y = batch()
    x[9, 1] = float("nan")  # of sixteen rows, two data-parallel ranks, four micro-batches
    step = compiled(fine)
    step.step(*batch())
    lines = told(step, x, y)
    assert lines[1:] == [
        "  it was there before the step, in batch tensor 0: of 8 elements 1 NaN, the rest from "
        + lines[1].partition("the rest from ")[2],
        "  seen on stage 0, micro-batch 0, data-parallel rank 1 of 2",
    ]
    assert torch.isfinite(step.step(*batch()))  # goes on from where it was


@pytest.mark.parametrize("plan", ["dp2", "zero3", "zero3:budget_gb=1", "zero3+pp2:stages=1", "pp2:stages=1"])
def test_a_nan_in_a_parameter(plan: str) -> None:
    step = compiled(fine, plan)
    step.step(*batch())
    state = step.state_dict()
    state["1.linear.bias"][2] = float("nan")
    step.load_state_dict(state)
    lines = told(step, *batch())
    assert lines[1].startswith(
        "  it was there before the step, in parameter '1.linear.bias': of 4 elements 1 NaN, the rest"
    )


@pytest.mark.parametrize(
    "plan",
    ["dp2+accum4", "zero1+accum4", "zero2+accum4", "zero3:budget_gb=1+accum4", "zero3+pp2:stages=1,microbatches=4"],
)
def test_one_micro_batch_of_one_data_parallel_rank(plan: str) -> None:
    step = compiled(large_where_negative, plan)
    weight = torch.eye(WIDTH)
    names = ("0.weight", "0.bias", "1.linear.weight", "1.linear.bias")
    step.trace(*batch())
    step.load_state_dict({name: weight if "weight" in name else torch.zeros(WIDTH) for name in names})
    x = torch.ones(ROWS, WIDTH)
    x[13, 0] = -1.0  # the second rank's rows are 8 to 15, its third micro-batch 12 and 13
    lines = told(step, x, x)
    assert lines[1].startswith("  first made by %exp")
    assert "micro-batch 2, data-parallel rank 1 of 2" in lines[3]


def test_a_buffer_that_is_infinite_on_purpose_is_not_blamed() -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("mask", torch.full((WIDTH,), float("-inf")))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = (self.linear(x) + self.mask).softmax(-1)
            return result

    step = graphshard.compile(Masked(), "dp2", loss_fn=loss_of, executor="local", debug_nan=True)
    assert told(step, *batch())[1].startswith("  first made by %_softmax")


def test_buffers_are_put_back_too() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), Head(large_where_negative))
    optimizer = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    step = graphshard.compile(
        model, "zero1", loss_fn=loss_of, optimizer=optimizer, executor="local", debug_nan=True, example_inputs=batch()
    )
    assert told(step, *batch())[1].startswith("  first made by %exp")
    assert int(step.state_dict()["1.num_batches_tracked"]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_on_its_way_when_a_step_is_given_up(seed: int) -> None:
    """It would write into memory that the next step uses."""
    step = compiled(log_of_zero, "dp2+accum4", example_inputs=batch())
    step.state_dict()
    executor = step._runtime
    assert isinstance(executor, LocalExecutor)
    executor._random, executor._network._delayed = random.Random(seed), True
    told(step, *batch())
    assert not executor._network.deliverable


def test_a_view_of_a_parameter_does_not_replace_it() -> None:
    """Its weight is shown in one segment of the backward and read in the next, as each has a gradient to reduce."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(self.norm(x))
            return large_where_negative(x)

    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    step = graphshard.compile(
        Again(), "zero2", loss_fn=loss_of, optimizer=optimizer, executor="local", debug_nan=True, example_inputs=batch()
    )
    told(step, batch()[0] * INF, batch()[1])


def test_what_a_micro_batch_leaves_to_the_next_in_a_buffer() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) + self.seen
            self.seen = torch.log(self.seen)
            return y

    step = graphshard.compile(Counts(), "dp2+accum4", loss_fn=loss_of, executor="local", debug_nan=True)
    lines = told(step, *batch())
    assert lines[1].startswith("  first made by %log")
    assert "micro-batch 0, data-parallel rank 0 of 2" in lines[3]


def test_a_sum_over_ranks_that_overflows() -> None:
    def steep(y: Tensor) -> Tensor:
        return (y - y.detach()).sum() * 2e38 * 2  # of which a rank has half

    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=1e-2)
    step = graphshard.compile(
        nn.Linear(WIDTH, WIDTH), "zero2", loss_fn=steep, optimizer=optimizer, executor="local", debug_nan=True
    )
    lines = told(step, torch.ones(2, WIDTH))
    assert lines[0] == "a sum of losses or gradients is NaN or infinite; nothing was updated"
    assert lines[1].startswith("  first made by %reduce_scatter")
    assert lines[-1].endswith("from 0 to 2e+38")  # padded


@pytest.mark.parametrize("name", few(["gpt", "convnet", "encoder", "nested", "llama"], ["gpt", "nested"]))
def test_models_run_watched_as_they_do_otherwise(name: str) -> None:
    losses = []
    for debug_nan in (False, True):
        torch.manual_seed(0)
        model, (args, kwargs), loss_fn = zoo.MODELS[name]()
        optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
        options: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "executor": "local"}
        step = graphshard.compile(model, "zero3+pp2", **options, debug_nan=debug_nan, passes=rounding())
        losses.append([step.step(*args, **kwargs) for _ in range(2)])
    assert all(map(torch.equal, *losses))


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2:stages=1,microbatches=4"])
def test_gradients_of_a_scaled_loss_that_overflow_skip_the_step_and_a_loss_that_does_raises(plan: str) -> None:
    step = compiled(fine, f"{plan}+fp16:init_scale=1e30", example_inputs=batch())
    before = step.state_dict()
    assert step.step(*batch()).isfinite()
    assert step.optimizer.state_dict()["scaler"]["scale"] == pytest.approx(0.5e30)
    assert all(torch.equal(before[name], value) for name, value in step.state_dict().items())
    assert told(compiled(overflow, f"{plan}+fp16"), *batch())[0].startswith("the loss is NaN")


def test_without_it_no_code_is_emitted() -> None:
    for debug_nan in (False, True):
        step = compiled(fine, debug_nan=debug_nan, example_inputs=batch())
        sources = [s.source for stage in step.execution_plan.stages for s in stage.segments.values()]
        assert any("watch(" in source for source in sources) == debug_nan
        assert step.execution_plan.watched == debug_nan
