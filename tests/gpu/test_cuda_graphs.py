"""Segments captured as CUDA graphs train as those that are not, and what cannot be captured is said."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphshard
from graphshard.execution import type_of
from graphshard.runtime.cuda_graphs import CudaRecorder

STEPS = 8
PLANS = (
    "dp1",
    "accum3",
    "dp2+accum2",
    "zero3:size=2+accum2",
    "pp2:schedule=zb-h1,microbatches=3",
    "zero3+pp2",
    "bf16+accum2",
    "fp16:init_scale=16777216,growth_interval=2",
    "accum2+recompute:policy=full",
    "offload:optimizer=cpu,activations=cpu+accum2",
)


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Dropout(dropout)) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(64, 32))


def compiled(plan: str, dropout: float = 0.0, **options: Any) -> Any:
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
    mse = nn.functional.mse_loss
    return graphshard.compile(model(dropout), plan, loss_fn=mse, optimizer=adamw, executor="local", **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(step)
    made = [torch.randn(24, size, generator=generator, device="cpu") for size in (64, 32)]
    return made[0].cuda(), made[1].cuda()


def trained(run: Any, steps: int = STEPS, begin: int = 0) -> list[float]:
    return [run.step(*batch(step)).item() for step in range(begin, begin + steps)]


def check_same(one: Any, other: Any) -> None:
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_steps_are_the_same(plan: str) -> None:
    run, plain = compiled(f"{plan}+cudagraphs", max_grad_norm=0.5), compiled(plan, max_grad_norm=0.5)
    assert trained(run) == pytest.approx(trained(plain), rel=1e-5)
    check_same(run, plain)
    assert run.report()["uncaptured"] == {}, "everything is captured"
    assert " RUN instructions; " in run.report()["machine"]["CUDA graphs"]


def test_losses_are_right_though_nobody_waits_for_the_device() -> None:
    """Batches come from memory that is given back and taken again while graphs that were issued still run."""
    run, plain = compiled("accum2+cudagraphs"), compiled("accum2")
    ours, theirs = ([one.step(*batch(step)) for step in range(20)] for one in (run, plain))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=1e-6)


def test_values_that_are_loaded_are_found() -> None:
    run, plain = compiled("dp1+cudagraphs"), compiled("dp1")
    for one in (run, plain):
        trained(one)
        one.load_state_dict({name: value * 0.5 for name, value in one.state_dict().items()})
    assert trained(run, begin=STEPS) == pytest.approx(trained(plain, begin=STEPS), rel=1e-5)


def test_dropout_is_captured_but_for_its_seeds() -> None:
    run, plain = compiled("accum2+cudagraphs", 0.5), compiled("accum2", 0.5)
    assert trained(run) == pytest.approx(trained(plain), rel=1e-5)
    assert len(run.report()["uncaptured"]) == 1
    assert "a key that the host reads" in run.explain()


def test_evaluation_and_calls_between_steps() -> None:
    run, plain = compiled("dp1+cudagraphs"), compiled("dp1")
    for step in range(STEPS):
        assert trained(run, 1, step) == pytest.approx(trained(plain, 1, step), rel=1e-5)
        x, y = batch(step)
        assert run.evaluate(x, y).item() == pytest.approx(plain.evaluate(x, y).item(), rel=1e-5)
        first, second = run(x), run(x + 1)
        torch.testing.assert_close(first, plain(x))
        torch.testing.assert_close(second, plain(x + 1))


@pytest.mark.real_gpu("the memory of a pool")
def test_memory_is_used_again_from_graph_to_graph() -> None:
    """Micro-batches one after the other need what the largest needs, not the sum, which is the same for both."""

    def grown(plan: str) -> int:
        run = compiled(plan)
        x, y = (value.repeat(8192, 1) for value in batch(0))
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(4):
            run.step(x, y)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    assert grown("accum8+cudagraphs") < 0.75 * grown("accum2+cudagraphs")


def test_a_place_is_memory_of_any_type() -> None:
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64):
        value = torch.ones(6, 4, dtype=dtype)[1:, ::2].t()
        place = recorder.place(value.data_ptr(), type_of(value))
        assert place.dtype == dtype and place.stride() == value.stride() and torch.equal(place, value)
        place.zero_()
        assert not value.any(), "the same memory"
    empty = torch.empty(0, 3)
    assert recorder.place(empty.data_ptr(), type_of(empty)).shape == (0, 3)


def test_what_fails_to_be_recorded_leaves_the_device_as_it_was() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stream, value, spent = torch.cuda.current_stream(), torch.ones(4), CudaRecorder(device)
    with pytest.raises(RuntimeError):
        spent.record(lambda: (value * value.sum().item(),))
    assert torch.cuda.current_stream() == stream
    assert (value + 1).sum().item() == 8
    replay, (result,) = CudaRecorder(device).record(lambda: (value + 1,))
    value.fill_(2.0)
    replay()
    assert result.tolist() == [3.0] * 4


@pytest.mark.real_gpu("how long something takes")
def test_a_step_takes_the_host_less_time() -> None:
    def host_seconds(plan: str) -> float:
        run, data = compiled(plan), batch(0)
        for _ in range(4):
            run.step(*data)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            run.step(*data)
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    assert host_seconds("accum4+cudagraphs") < host_seconds("accum4")
