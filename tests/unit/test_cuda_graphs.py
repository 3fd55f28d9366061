"""Steps whose segments are recorded once and replayed are the same steps, whatever the plan; and what is left out is
said. Recorded on the CPU (recorded.py); tests/gpu has the same on a device."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphshard
from graphshard.codegen import blocks
from graphshard.errors import PlanFieldError
from graphshard.plan import Plan
from graphshard.runtime import executor
from recorded import OnCpu

STEPS = 6
"""Run as they are in the first two, with an optimizer that has state; recorded in the third; then replayed."""


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[OnCpu]:
    """Those that were made, one for each rank and each time that its steps were recorded."""
    made: list[OnCpu] = []

    def make() -> OnCpu:
        made.append(OnCpu())
        return made[-1]

    monkeypatch.setattr(executor, "recorder_of", lambda device: make)
    monkeypatch.setattr(blocks, "BLOCK", 32)  # an update of so many elements is long, and done in place
    return made


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout)) for _ in range(2)]
    return nn.Sequential(*layers, nn.Linear(8, 4))


class Normed(nn.Module):
    """Its buffers are written in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.norm(self.one(x)))
        return out


def compiled(plan: str, make: Callable[[], nn.Module] = model, optimizer: Any = None, **options: Any) -> Any:
    optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-2)
    return graphshard.compile(
        make(), plan, loss_fn=nn.functional.mse_loss, optimizer=optimizer, executor="local", **options
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(24, 8, generator=generator), torch.randn(24, 4, generator=generator)


def trained(run: Any, steps: int = STEPS, begin: int = 0) -> list[float]:
    return [run.step(*batch(step)).item() for step in range(begin, begin + steps)]


def check_same(one: Any, other: Any) -> None:
    """Two runs have come to the same parameters, buffers and state."""
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name
    state = one.optimizer.state_dict()["state"]
    for name, values in other.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(state[name][key]), torch.as_tensor(value)), (name, key)


PLANS = (
    "dp2",
    "accum3",
    "zero3:size=2",
    "pp2:schedule=zb-h1,microbatches=3",
    "zero3+pp2",
    "bf16+accum2",
    "offload:optimizer=cpu,activations=cpu+accum2",
)


@pytest.mark.parametrize("plan", PLANS)
def test_steps_are_the_same(plan: str, recorders: list[OnCpu]) -> None:
    run, plain = compiled(f"{plan}+cudagraphs", max_grad_norm=0.5), compiled(plan, max_grad_norm=0.5)
    assert trained(run) == trained(plain)
    check_same(run, plain)
    assert len(recorders) == run.mesh.world_size, "each rank records one step"
    runs = sum(ins.op.name == "RUN" for stage in run.execution_plan.stages for ins in stage.step())
    assert sum(one.recorded for one in recorders) == runs * run.mesh.world_size // len(run.execution_plan.stages)
    assert not run.report()["uncaptured"]
    # What a step left is not touched by the next one.
    loss = run.step(*batch(0))
    value = loss.item()
    run.step(*batch(1))
    assert loss.item() == value


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_other_optimizers(optimizer: Any, recorders: list[OnCpu]) -> None:
    options = functools.partial(optimizer, lr=1e-2)
    run, plain = compiled("zero2:size=2+cudagraphs", optimizer=options), compiled("zero2:size=2", optimizer=options)
    assert trained(run) == trained(plain)
    check_same(run, plain)
    assert recorders


@pytest.mark.parametrize("plan", ["accum2", "pp2"])
def test_buffers_that_a_step_replaces(plan: str, recorders: list[OnCpu]) -> None:
    run, plain = compiled(f"{plan}+cudagraphs", Normed), compiled(plan, Normed)
    assert trained(run) == trained(plain)
    check_same(run, plain)
    assert all(one.recorded for one in recorders)


def test_a_skipped_step_of_fp16(recorders: list[OnCpu]) -> None:
    plan = "dp2+fp16:init_scale=16777216,growth_interval=2"
    run, plain = compiled(f"{plan}+cudagraphs"), compiled(plan)
    losses = trained(run, 9), trained(plain, 9)
    assert losses[0] == losses[1]
    check_same(run, plain)
    assert run.optimizer.state_dict()["scaler"] == plain.optimizer.state_dict()["scaler"]


def test_values_that_are_loaded_are_found(recorders: list[OnCpu]) -> None:
    run, plain = compiled("dp2+cudagraphs"), compiled("dp2")
    for one in (run, plain):
        trained(one)
        one.load_state_dict({name: value * 0.5 for name, value in one.state_dict().items()})
    assert trained(run, begin=STEPS) == trained(plain, begin=STEPS)
    check_same(run, plain)
    assert len(recorders) == 2 * 2, "recorded again, once"


def test_evaluation_and_calls_between_steps(recorders: list[OnCpu]) -> None:
    run, plain = compiled("zero3+pp2+cudagraphs"), compiled("zero3+pp2")
    for step in range(STEPS):
        assert trained(run, 1, step) == trained(plain, 1, step)
        x, y = batch(step)
        assert run.evaluate(x, y).item() == plain.evaluate(x, y).item()
        first, second = run(x), run(x + 1)
        assert torch.equal(first, plain(x)) and torch.equal(second, plain(x + 1)), "a call's output is the caller's"


def test_a_step_that_fails_while_it_is_recorded(recorders: list[OnCpu], monkeypatch: pytest.MonkeyPatch) -> None:
    run, plain = compiled("dp1+accum2+cudagraphs"), compiled("dp1+accum2")
    assert trained(run, 2) == trained(plain, 2)

    def fails(self: OnCpu, issue: Any) -> Any:
        if self.recorded == 1:
            raise ValueError("interrupted")
        return record(self, issue)

    record = OnCpu.record
    with monkeypatch.context() as patched:
        patched.setattr(OnCpu, "record", fails)
        with pytest.raises(ValueError, match="interrupted"):
            trained(run, 1, 2)
    run._steps = plain._steps
    assert trained(run, 4, 2) == trained(plain, 4, 2)
    check_same(run, plain)
    runs = sum(ins.op.name == "RUN" for ins in run.execution_plan.stages[0].step())
    assert [one.recorded for one in recorders] == [1, runs], "it is recorded from the beginning again"


def test_dropout_is_captured_but_for_its_seeds(recorders: list[OnCpu]) -> None:
    make = functools.partial(model, 0.5)
    run, plain = compiled("accum2+cudagraphs", make), compiled("accum2", make)
    assert trained(run) == trained(plain)
    check_same(run, plain)
    (left,) = run.report()["uncaptured"]
    assert run.execution_plan.stages[0].segments[left].source.count("torch.ops.graphshard.seed") == 2
    runs = sum(ins.op.name == "RUN" for ins in run.execution_plan.stages[0].step())
    assert sum(one.recorded for one in recorders) == runs - 2, "all others are graphs"


class Noisy(nn.Module):
    """It draws from a generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_what_draws_by_a_key_is_run_as_it_is_and_said(recorders: list[OnCpu]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(Noisy(), model())

    run, plain = compiled("pp2:microbatches=2+cudagraphs", make), compiled("pp2:microbatches=2", make)
    report = graphshard.compile(
        make(), "pp2+cudagraphs", loss_fn=nn.functional.mse_loss, example_inputs=batch(0), executor="none"
    ).report()
    assert trained(run) == trained(plain)
    check_same(run, plain)
    assert all("a key that the host reads" in why for why in run.report()["uncaptured"].values())
    assert report["uncaptured"].keys() == run.report()["uncaptured"].keys() != set(), "known without running"
    assert sum(one.recorded for one in recorders) > 0, "the others are graphs"
    told = run.explain()
    assert "segments that are no CUDA graphs\n" in told and "RUN instructions; " in told


def test_what_cannot_be_recorded_is_run_as_it_is_and_said(
    recorders: list[OnCpu], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(OnCpu, "refuse", (torch.ops.aten.native_layer_norm_backward.default,))
    run, plain = compiled("zero3:size=2+accum2+cudagraphs"), compiled("zero3:size=2+accum2")
    with caplog.at_level(logging.WARNING, "graphshard"):
        assert trained(run) == trained(plain)
    check_same(run, plain)
    left = run.report()["uncaptured"]
    assert left and all("not permitted when stream is capturing" in why for why in left.values())
    for name in left:
        assert f"segment {name} is no CUDA graph: operation not permitted" in caplog.text
    assert sum(one.recorded for one in recorders) > len(left)


@pytest.mark.parametrize("option", ["measure_memory", "debug_nan"])
def test_what_is_looked_at_while_it_runs_is_not_recorded(option: str, recorders: list[OnCpu]) -> None:
    options: dict[str, Any] = {option: True}
    run = compiled("dp2+cudagraphs", **options)
    assert trained(run) == trained(compiled("dp2"))
    assert not any(one.recorded for one in recorders)
    assert set(run.report()["uncaptured"]) == set(run.execution_plan.stages[0].segments)
    assert all(option in why for why in run.report()["uncaptured"].values())


def test_on_a_cpu_it_has_no_effect_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graphshard"):
        run = compiled("dp1+cudagraphs")
        assert trained(run, 3) == trained(compiled("dp1"), 3)
    assert caplog.text.count("plan token 'cudagraphs' has no effect on cpu; it needs a CUDA device") == 1


def test_a_field_that_is_no_bool() -> None:
    with pytest.raises(PlanFieldError, match="True or False"):
        Plan(cudagraphs=1)  # type: ignore[arg-type]
