"""The planner: budgets are kept, smaller ones never hold more, impossible ones are refused with what is possible."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import graphshard
from graphshard.codegen.lower import lower
from graphshard.errors import BudgetTooSmall, NothingMatches, PassOptionError
from graphshard.memory import planner
from graphshard.memory.ladders import ladders
from graphshard.memory.planner import fit, levers_of
from graphshard.offloaded import offloaded_bytes
from graphshard.passes.memory_policy import MemoryPolicy
from graphshard.passes.pipeline_cut import PipelineCut
from graphshard.pipeline import Context, parse_passes, run_passes
from graphshard.plan import Plan
from graphshard.rewrite import copied
from graphshard.surroundings import offload_folder
from marks import full
from models.zoo import gpt
from numerics.cases import rows_of


def compiled(plan: str, run: bool = False, frozen: str = "", **sizes: Any) -> graphshard.Compiled:
    sizes = {"rows": rows_of(plan, 8), "depth": 2, "width": 16, "length": 32} | sizes
    model, (args, kwargs), loss_fn = gpt(**sizes)
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    made = graphshard.compile(
        model,
        plan,
        loss_fn=loss_fn,
        optimizer=partial(AdamW, lr=1e-3),
        example_inputs=(args, kwargs),
        executor="local" if run else "none",
        measure_memory=run,
    )
    for _ in range(2 if run else 0):
        made.step(*args, **kwargs)
    return made


def peaks(made: graphshard.Compiled, key: str = "peak_bytes") -> list[int]:
    return [rank[key] for rank in made.report()["ranks"]]


SWEEPS = [
    ("accum2", 4),
    *(full(plan, 10) for plan in ("accum2", "zero3+pp2", "pp2:schedule=gpipe")),
]


def asked(plan: str, nbytes: float) -> str:
    token = "memory:" if "zero3" in plan else "recompute:policy=auto,"
    return f"{plan}+{token}budget_gb={nbytes / 1e9!r}"


def least(plan: str) -> int:
    with pytest.raises(BudgetTooSmall) as caught:
        compiled(asked(plan, 1000))
    return caught.value.smallest_bytes


@pytest.mark.parametrize(("plan", "budgets"), SWEEPS)
def test_over_a_sweep_of_budgets_the_measured_peak_fits_and_never_grows(plan: str, budgets: int) -> None:
    most, smallest = max(peaks(compiled(asked(plan, 1e12)))), least(plan)
    assert smallest < 0.9 * most
    measured: list[int] = []
    for step in range(budgets):
        budget = most - (most - smallest) * step / (budgets - 1)
        made = compiled(asked(plan, math.ceil(budget)), run=True)
        measured.append(max(peaks(made, "measured_peak_bytes")))
        assert max(peaks(made)) <= math.ceil(budget)
        assert measured[-1] <= budget * 1.05
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] < measured[0]


def test_a_budget_that_is_large_enough_changes_nothing() -> None:
    assert peaks(compiled("accum2+recompute:policy=auto,budget_gb=1")) == peaks(compiled("accum2"))
    roomy = compiled("zero3+accum2+memory:budget_gb=1").report()
    assert roomy["ranks"][0]["gathers_per_microbatch"] == 0.5, "every parameter is gathered once a step"


def test_what_a_stage_has_to_do_depends_on_what_it_holds() -> None:
    plan = "pp4:microbatches=8"
    free = peaks(compiled(plan, depth=4))
    made = compiled(f"{plan}+recompute:policy=auto,budget_gb={sorted(free)[-2] / 1e9!r}", depth=4)
    (policy,) = (item for item in made.passes if item.name == "memory-policy")
    assert isinstance(policy, MemoryPolicy)
    instead = policy.instead or ("cut",) * 4
    acts = [level > 0 or name != "cut" for level, name in zip(policy.levels, instead, strict=True)]
    assert acts == [peak == max(free) for peak in free]
    assert "memory-policy (policy=cut,levels=" in made.explain()


@pytest.mark.parametrize("settled", [False, True])
def test_stages_that_do_not_fit_as_the_schedule_wants_them_are_equal(
    settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a program whose parameters have their stages already."""
    smallest = {"zb-h2": 9, "": 5}

    def choose(program: Any, passes: list[Any], ctx: Any, budget: Any, *rest: Any) -> list[Any]:
        (cut,) = passes
        if smallest[cut.schedule] > budget.nbytes:
            raise BudgetTooSmall(budget.nbytes, smallest[cut.schedule], 0, "gradients", ("bf16", "zero3"))
        return passes

    def fitted(nbytes: int) -> str:
        plan = Plan.parse(f"pp2:schedule=zb-h2+recompute:policy=auto,budget_gb={nbytes / 1e9!r}")
        program: Any = None
        (cut,) = fit(program, [PipelineCut(schedule="zb-h2")], Context(), plan, program, on_gpu=False, settled=settled)
        assert isinstance(cut, PipelineCut)
        return cut.schedule

    monkeypatch.setattr(planner, "choose", choose)
    assert fitted(9) == "zb-h2"
    if not settled:
        assert fitted(5) == ""
    with pytest.raises(BudgetTooSmall) as caught:
        fitted(4)
    assert caught.value.smallest_bytes == smallest["zb-h2" if settled else ""]


def flops(made: graphshard.Compiled) -> float:
    total: float = sum(rank["flops"] for rank in made.report()["ranks"])
    return total


@pytest.mark.parametrize(
    ("policy", "plan"), [("selective", "accum2"), ("full", "pp2"), full("selective", "pp2"), full("full", "accum2")]
)
def test_no_policy_with_a_name_costs_less_at_its_peak_than_what_is_chosen(plan: str, policy: str) -> None:
    named = compiled(f"{plan}+recompute:policy={policy}")
    chosen = compiled(f"{plan}+recompute:policy=auto,budget_gb={max(peaks(named)) / 1e9!r}")
    assert max(peaks(chosen)) <= max(peaks(named)) and flops(chosen) <= flops(named)


class FrozenEnd(nn.Module):
    """What is frozen needs no gradients of parameters, so that little but what enters its blocks is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64)) for _ in range(4)
        )
        self.end = nn.Linear(64, 4)
        for module in (self.h[2], self.h[3], self.end):
            module.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = x + block(x)
        result: torch.Tensor = self.end(x)
        return result


def test_no_budget_is_refused_that_computing_everything_again_keeps() -> None:
    def peak(recompute: str) -> int:
        plan = f"zero3+pp2:schedule=zb-h1+recompute:policy={recompute}"
        example, loss_fn, optimizer = (torch.ones(64, 64), torch.ones(64, 4)), nn.functional.mse_loss, partial(AdamW)
        given: Any = {"loss_fn": loss_fn, "optimizer": optimizer, "example_inputs": example, "executor": "none"}
        return max(peaks(graphshard.compile(FrozenEnd(), plan, **given)))

    least = peak("custom,ops=*")
    assert peak(f"auto,budget_gb={least / 1e9!r}") <= least < peak("full")


def test_an_impossible_budget_is_refused_with_the_smallest_and_what_it_holds() -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        compiled("zero3+accum2+memory:budget_gb=0.00001")
    least = caught.value.smallest_bytes
    with pytest.raises(BudgetTooSmall) as below:
        compiled(f"zero3+accum2+memory:budget_gb={(least - 1) / 1e9!r}")
    assert below.value.smallest_bytes == least
    message = str(caught.value)
    assert message.startswith("a budget of 1e-05 GB per rank is too small: the smallest possible is 0.00")
    assert (
        "for a rank of stage 0 that holds workspace " in message
        and "saved activations" in message
        and "\n" not in message
    )
    assert message.endswith("; more ranks, smaller micro-batches, bf16 or memory with a path may take less")
    fitting = compiled(f"zero3+accum2+memory:budget_gb={math.ceil(caught.value.smallest_bytes / 1e3) / 1e6!r}")
    assert max(peaks(fitting)) <= caught.value.smallest_bytes


def test_whatever_recomputation_alone_keeps_to_is_not_refused_where_more_may_be_chosen() -> None:
    """The smallest peak is at a cut in the middle, where the ladder with gathers has given up others already."""
    smallest = []
    for token in ("recompute:policy=auto,", "memory:"):
        with pytest.raises(BudgetTooSmall) as caught:
            compiled(f"zero3+accum2+{token}budget_gb=0.00001")
        smallest.append(caught.value.smallest_bytes)
    assert smallest[1] <= smallest[0]


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(NothingMatches) as caught:
        compiled("accum2+recompute:policy=custom,modules=layers.*,ops=relu")
    assert str(caught.value).startswith("recompute: modules=layers.* and ops=relu matches nothing that is kept for ")


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        ("ops=gelu/reluu", "ops=reluu"),
        ("modules=h.*/nosuch,ops=gelu", "modules=nosuch"),
        ("modules=h.*/nosuch,ops=gelu/reluu", "modules=nosuch and ops=reluu"),
        ("modules=h.0/tokens,ops=gelu", "modules=tokens"),  # a module of the model, without that operator
    ],
)
def test_each_pattern_that_matches_nothing_is_named(patterns: str, named: str) -> None:
    with pytest.raises(NothingMatches) as caught:
        compiled(f"accum2+recompute:policy=custom,{patterns}")
    assert str(caught.value).startswith(f"recompute: {named} matches nothing that is kept for ")


def test_an_operator_by_name_is_computed_again_through_the_views_of_its_result() -> None:
    assert max(peaks(compiled("accum2+recompute:policy=custom,ops=gelu"))) < 0.9 * max(peaks(compiled("accum2")))


def test_a_module_by_name_keeps_what_enters_its_blocks() -> None:
    by_module = compiled("accum2+recompute:policy=custom,modules=h.*", depth=4)
    assert max(peaks(by_module)) < 0.7 * max(peaks(compiled("accum2", depth=4)))


def test_another_shape_is_fitted_to_the_budget_too() -> None:
    free, larger = (max(peaks(compiled("accum2", rows=rows))) for rows in (8, 32))
    made = compiled(f"accum2+recompute:policy=auto,budget_gb={(free + larger) / 2e9!r}", run=True, rows=8)
    assert max(made.execution_plan.peak_bytes) == free
    _, (args, kwargs), _ = gpt(rows=32, depth=2, width=16, length=32)
    made.step(*args, **kwargs)
    assert sorted(max(build.plan.peak_bytes) <= (free + larger) / 2 for build in made._builds.values()) == [True, True]


def test_a_call_before_the_first_step_does_not_lift_the_budget() -> None:
    model, ((ids, targets), _), loss_fn = gpt(rows=8, depth=2, width=16, length=32)
    made = graphshard.compile(model, "memory:budget_gb=0.00001", loss_fn=loss_fn)
    made(ids)
    with pytest.raises(BudgetTooSmall):
        made.step(ids, targets)


@pytest.mark.parametrize("plan", ["zero3+accum2", full("zero3+pp2")])
def test_the_smallest_budget_is_no_more_than_offloading_everything_takes(plan: str, tmp_path: Path) -> None:
    everything = f"{plan}+offload:optimizer=nvme,params=nvme,activations=nvme,path={tmp_path}"
    most = max(peaks(compiled(everything, depth=3)))
    compiled(f"{plan}+memory:budget_gb={most / 1e9!r},path={tmp_path}", depth=3)


@pytest.mark.parametrize("options", ["policy=auto", "policy=ful", "policy=custom", "policy=cut"])
def test_options_of_the_pass_that_say_nothing_are_refused(options: str) -> None:
    with pytest.raises(PassOptionError, match=f"pass 'memory-policy' does not take '{options}'"):
        parse_passes(f"memory-policy:{options}")


def test_with_a_folder_state_leaves_bucket_by_bucket_before_the_budget_is_refused(tmp_path: Path) -> None:
    plan = "zero3+accum2+memory:budget_gb={},path=" + str(tmp_path)
    with pytest.raises(BudgetTooSmall) as caught:
        compiled("zero3+accum2+memory:budget_gb=0.00001", width=64, length=8, depth=3)
    budget = caught.value.smallest_bytes - 20_000  # nothing but offloading gets below
    made = compiled(plan.format(budget / 1e9), run=True, width=64, length=8, depth=3)
    (offload,) = (item for item in made.passes if item.name == "offload")
    assert offload.optimizer == "nvme" and 0 < len(offload.optimizer_of) < len(made.program.buckets)  # type: ignore[attr-defined]
    assert max(peaks(made, "measured_peak_bytes")) <= budget
    roomy = compiled("zero3+accum2", run=True, width=64, length=8, depth=3)
    assert all(torch.equal(value, roomy.state_dict()[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("tokens", ["offload:optimizer=cpu+memory:budget_gb=1,path=/x", "offload:params=nvme,path=/x"])
def test_files_are_in_the_folder_that_any_token_gives(tokens: str) -> None:
    assert offload_folder(Plan.parse(f"zero3+{tokens}")) == "/x"


def homes_of(plan: str, on_gpu: bool) -> list[str]:
    levers = levers_of(Plan.parse(plan), on_gpu)
    assert levers.optimizer == levers.params == levers.activations
    prices = [away.flops_per_byte for away in levers.optimizer]
    assert prices == sorted(prices)
    return [away.home for away in levers.optimizer]


def test_values_may_go_to_host_memory_on_a_gpu_and_to_files_where_there_is_a_folder() -> None:
    assert homes_of("zero3+memory:budget_gb=1,path=/x", on_gpu=True) == ["cpu", "nvme"]
    assert homes_of("zero3+memory:budget_gb=1", on_gpu=True) == ["cpu"]
    assert homes_of("zero3+memory:budget_gb=1,path=/x", on_gpu=False) == ["nvme"]
    assert homes_of("zero3+memory:budget_gb=1", on_gpu=False) == []
    levers = levers_of(Plan.parse("offload:params=cpu+memory:budget_gb=1"), on_gpu=True)
    assert levers.optimizer and not levers.params, "the plan says where they are"


@pytest.mark.parametrize(
    ("said", "frozen"),
    [full("", ""), ("offload:optimizer=cpu,activations=cpu+", ""), full("offload:params=cpu+", "h.0")],
)
def test_what_host_memory_has_no_room_for_goes_to_files(said: str, frozen: str) -> None:
    """A GPU's ladder, without one. What the plan offloads itself takes room, too, be it trained or not."""
    made = compiled(f"zero3+accum2+{said}memory:budget_gb=1,path=/x", frozen=frozen)
    source = made._compiled().graphs.source
    assert source is not None
    at = [item.name for item in made.passes].index("memory-policy")
    ctx = Context(made.mesh)
    before = run_passes(copied(source), made.passes[:at], ctx)
    sharded = run_passes(copied(before), made.passes[at:], ctx)
    schedule = made.builder.schedule("train", made.microbatches)
    by_plan = offloaded_bytes(made.execution_plan, 0).get("cpu", 0)

    def last(host_gb: float) -> tuple[set[str], dict[str, int]]:
        plan = Plan.parse(f"zero3+{said}memory:budget_gb=1,host_gb={host_gb!r},path=/x")
        (ladder,) = ladders(before, sharded, schedule, levers_of(plan, on_gpu=True))
        held = [step.held_bytes for step in ladder if not step.is_mark]
        assert held == sorted(set(held), reverse=True), "every rung holds less than the one before"
        setting = ladder[-1].setting
        passes = [planner.with_settings(item, [setting], levers_of(plan, on_gpu=True)) for item in made.passes[at:]]
        lowered = lower(run_passes(copied(before), passes, ctx), schedule, on_gpu=True)
        buckets = [home for _, home in setting.optimizer + setting.params]
        return {*buckets, *setting.activations}, offloaded_bytes(lowered, 0)

    homes, most = last(1)
    assert homes == {"cpu"} and set(most) == {"cpu"}
    host = by_plan + 0.6 * (most["cpu"] - by_plan)
    homes, there = last(1.03 * host / 1e9)  # values of a few bytes are counted that stay on the device
    assert homes == {"cpu", "nvme"}
    assert by_plan < there["cpu"] <= 1.03 * host
    assert there["cpu"] + there["nvme"] == most["cpu"]
    homes, there = last(by_plan / 1e9)
    assert homes == {"nvme"} and there.get("cpu", 0) == by_plan


def test_what_the_plan_says_itself_is_not_chosen() -> None:
    made = compiled("zero3:budget_gb=0+accum2+recompute:policy=selective+offload:optimizer=cpu+memory:budget_gb=1")
    by_name = {record.name: record.options for record in made.program.history}
    assert by_name["memory-policy"] == "policy=selective"
    assert by_name["hoist"] == "budget_gb=0.0"
    assert by_name["offload"] == "optimizer=cpu"
