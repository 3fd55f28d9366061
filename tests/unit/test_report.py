"""The account of a plan: bytes at the minimum, memory as measured, and a page that says what was done."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch

import graphshard
from graphshard.plan_options import Memory
from graphshard.units import human
from models import zoo


def compiled(name: str, plan: str, measure_memory: bool = False, **sizes: Any) -> tuple[graphshard.Compiled, zoo.Batch]:
    """A model of the zoo, ready for a step on the local executor."""
    model, (args, kwargs), loss_fn = zoo.MODELS[name](**sizes)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3)
    made = graphshard.compile(
        model,
        plan,
        loss_fn=loss_fn,
        optimizer=optimizer,
        executor="local",
        example_inputs=(args, kwargs),
        measure_memory=measure_memory,
    )
    return made, (args, kwargs)


def stored_bytes(report: dict[str, Any], stage: int = 0) -> int:
    """Bytes of a stage's parameters in their buckets, padding included."""
    return sum(bucket["bytes"] for bucket in report["buckets"] if bucket["stage"] == stage)


@pytest.mark.parametrize("size", [2, 4])
def test_dp_sends_the_minimum(size: int) -> None:
    report = compiled("mlp", f"dp{size}+accum2", rows=16)[0].report()
    loss = 2 * (size - 1) * 4 // size
    for rank in report["ranks"]:
        assert rank["sent_bytes"] == {"dp": 2 * (size - 1) * stored_bytes(report) // size + loss}


@pytest.mark.parametrize(("size", "microbatches"), [(2, 1), (2, 2), (4, 2)])
def test_zero3_sends_the_minimum(size: int, microbatches: int) -> None:
    report = compiled("mlp", f"zero3:size={size}+accum{microbatches}", rows=16)[0].report()
    whole = stored_bytes(report)
    most = 3 * microbatches * (size - 1) * whole // size
    fewest = 2 * microbatches * (size - 1) * whole // size  # no parameter is needed again by the backward
    loss = 2 * (size - 1) * 4 // size
    for rank in report["ranks"]:
        assert fewest <= rank["sent_bytes"]["dp"] - loss <= most
        assert 1.0 <= rank["gathers_per_microbatch"] <= 2.0
        reductions = microbatches * (size - 1) * whole // size
        gathers = rank["gathers_per_microbatch"] * microbatches * (size - 1) * whole / size
        assert rank["sent_bytes"]["dp"] == pytest.approx(reductions + gathers + loss)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_simulated_and_measured_memory_stand_side_by_side(name: str) -> None:
    made, (args, kwargs) = compiled(name, "zero3+pp2", measure_memory=True, rows=16)
    assert "measured_peak_bytes" not in made.report()["ranks"][0]
    made.step(*args, **kwargs)
    assert "measured in the first step" in made.explain()
    made.step(*args, **kwargs)
    made.evaluate(*args, **kwargs)  # does not hide the training step
    report = made.report()
    for rank in report["ranks"]:
        assert rank["peak_bytes"] == rank["measured_peak_bytes"] and not rank["measured_first_step"]
        assert sum(rank["memory"].values()) == rank["peak_bytes"] == sum(rank["measured_memory"].values())
        for key in ("timeline", "measured_timeline"):
            columns = rank[key]["bytes"].values()
            assert max(map(sum, zip(*columns, strict=True))) == rank["peak_bytes"]
            assert len(rank[key]["positions"]) == len(rank[key]["actions"]) == len(next(iter(columns)))
        assert rank["timeline"]["most"] == pytest.approx(rank["measured_timeline"]["most"], rel=0.01)
        assert all(size <= rank["timeline"]["most"][name] for name, size in rank["memory"].items())
    assert {"parameters", "saved activations", "workspace"} <= report["ranks"][0]["memory"].keys()
    page = made.explain()
    assert "simulated    measured      simulated    measured" in page and "first step" not in page
    assert "the measured peak is 0.0% above the simulated one" in page and "lies in a block" not in page


@pytest.mark.parametrize("plan", ["dp", "memory:budget_gb=1"])
def test_a_measured_peak_above_what_is_stated_is_said_once(plan: str, caplog: pytest.LogCaptureFixture) -> None:
    made, (args, kwargs) = compiled("mlp", plan, measure_memory=True)
    made.step(*args, **kwargs)
    made.step(*args, **kwargs)
    assert not told(caplog)
    held = made.report()["ranks"][0]["measured_peak_bytes"]
    if made.plan.memory is None:
        stated = int(held / 1.06)
        object.__setattr__(made.execution_plan, "peak_bytes", (stated,))
        says = f"6% more than the {human(stated)} by simulation"
    else:
        made.plan = dataclasses.replace(made.plan, memory=Memory(budget_gb=held / 1e9 - 1e-8))
        says = "more than its budget of "
    made.step(*args, **kwargs)
    made.step(*args, **kwargs)
    assert ("as measured; that is over it" in made.explain()) == (made.plan.memory is not None)
    (line,) = told(caplog)
    assert line.startswith(f"graphshard: rank 0 held {human(held)} as measured, ") and says in line


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "graphshard" and r.levelname == "WARNING"]


def test_the_block_that_a_step_uses_is_beside_the_peak() -> None:
    made, (args, kwargs) = compiled("mlp", "dp")
    assert "lies in a block" not in made.explain()
    made.step(*args, **kwargs)
    size = made.report()["ranks"][0]["arena_bytes"]
    assert size > 0
    assert f"what a step makes lies in a block of {human(size)}; " in made.explain()


def test_memory_is_measured_only_where_that_is_asked_for() -> None:
    made, (args, kwargs) = compiled("mlp", "dp")
    made.step(*args, **kwargs)
    assert "measured_peak_bytes" not in made.report()["ranks"][0]
    assert "measured" not in made.explain()


def test_the_report_has_what_was_promised_and_is_json() -> None:
    report = json.loads(json.dumps(compiled("gpt", "zero3+pp2", rows=16)[0].report()))
    assert report["plan"] == "zero3+pp2"
    assert [item["name"] for item in report["passes"]] == [
        "normalize",
        "pipeline-cut",
        "zero",
        "bucket",
        "hoist",
        "overlap",
        "fuse",
    ]
    assert all(item["seconds"] >= 0 and item["nodes"] > 0 for item in report["passes"])
    assert len(report["ranks"]) == 4
    for rank in report["ranks"]:
        assert {"peak_bytes", "memory", "sent_bytes", "flops"} <= rank.keys()
        assert rank["flops"] > 0
    assert 0.0 < report["bubble_fraction"] < 0.5
    changes = {item["name"]: item["changes"] for item in report["passes"]}
    assert changes["pipeline-cut"]["transfers"] >= 2
    assert changes["zero"]["reduce-scatters"] == changes["zero"]["buckets"] > 0
    assert changes["bucket"]["reduce-scatters"] < 0


def test_the_page_says_what_each_pass_did() -> None:
    page = compiled("mlp", "zero3+pp2", rows=16)[0].explain()
    parts = "pipeline-cut", "transfers", "reduce-scatters", "buckets", "FLOP a step", "peak", "bubble", "stage 1"
    for words in parts:
        assert words in page
    assert max(map(len, page.splitlines())) < 200


def test_the_page_says_how_many_parameters_a_lower_precision_takes() -> None:
    """Those that are none of its business are not among them."""

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(self.first(x).double())
            return result

    for model, count in ((Mixed(), 2), (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), 4)):
        page = graphshard.compile(
            model,
            "zero3:size=2+bf16",
            loss_fn=lambda y: y.sum(),
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            example_inputs=(torch.randn(4, 4),),
        ).explain()
        line = next(line for line in page.splitlines() if line.startswith("  precision "))
        assert f"+{count} parameters in bfloat16" in line
        assert page.count("parameters in bfloat16") == 1


def test_what_regions_became_is_listed() -> None:
    made = compiled("gpt", "zero3+pp2", rows=16)[0]
    kernels = made.report()["kernels"]
    assert {kernel["name"] for kernel in kernels} == set(made.execution_plan.kernels)
    assert all(kernel["how"] and kernel["calls"] > 0 for kernel in kernels)
    listed = made.explain().partition("kernels (what regions became, with the segments that call each)\n")[2]
    assert all(kernel["name"] in listed and kernel["how"] in listed for kernel in kernels)
