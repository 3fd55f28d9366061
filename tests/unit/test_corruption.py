"""Broken plans, of one rank or of a stage's ranks alike: none is let through, and no sound plan is turned away.

CORRUPTIONS in the environment sets how many are tried.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import graphshard
from corruption import kinds
from graphshard.errors import PlanError, PlanMismatch, WorldSizeMismatch
from graphshard.execution import ExecutionPlan, Op, Ref
from graphshard.plan import SCHEDULES
from graphshard.prove import prove
from graphshard.prove.ranks import prove_ranks
from marks import few
from models import zoo

PLANS = (
    "dp2",
    "zero1:size=2",
    "zero2:size=2",
    "zero3:size=4+accum2",
    "dp2+zero3:size=2",
    "zero3:size=2+accum2+offload:optimizer=nvme,params=cpu,path=/",
    "zero1:size=2+pp2+offload:optimizer=cpu,params=cpu,activations=nvme,path=/",
    *(
        f"{data}pp{stages}:schedule={schedule},microbatches={microbatches}"
        for data, stages, counts in (
            ("", 2, (2, 4)),
            ("", 4, (2, 4)),
            ("zero3:size=2+", 2, (4,)),
            ("zero1:size=2+", 4, (2,)),
            ("dp2+", 3, (2,)),
        )
        for schedule in SCHEDULES
        for microbatches in counts
    ),
)


@functools.cache
def made(plan: str) -> ExecutionPlan:
    """The plan of a small model, with each stage's later steps as one list, so that edits can be anywhere."""
    model, (args, kwargs), loss_fn = zoo.MODELS["mlp"](rows=16)
    compiled = graphshard.compile(
        model,
        plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        max_grad_norm=1.0,
        executor="local",
        example_inputs=(args, kwargs),
    )
    lowered = compiled.execution_plan
    prove(lowered)
    flat = (replace(s, prologue=(), body=s.step(), epilogue=(), first_epilogue=None) for s in lowered.stages)
    return replace(lowered, stages=tuple(flat))


FEW = (
    *PLANS[:7],
    "pp2:schedule=gpipe,microbatches=2",
    "pp4:schedule=1f1b,microbatches=4",
    "pp4:schedule=zb-h1,microbatches=4",
    "pp2:schedule=zb-h2,microbatches=4",
    "zero3:size=2+pp2:schedule=zb-h2,microbatches=4",
    "dp2+pp3:schedule=zb-h1,microbatches=2",
)
CORRUPTIONS = int(os.environ.get("CORRUPTIONS", "0"))


@pytest.mark.parametrize("plan", few(PLANS, FEW))
def test_sound_plans_pass(plan: str) -> None:
    prove(made(plan))
    copies = [replace(made(plan)) for _ in range(made(plan).mesh.world_size)]
    prove_ranks(copies)
    # The same for ranks that are not known to be alike: one has a name for itself.
    odd = copies[0].stages[0]
    renamed = tuple(replace(ins, made_by="somebody else") for ins in odd.body)
    prove_ranks([replace(copies[0], stages=(replace(odd, body=renamed), *copies[0].stages[1:])), *copies[1:]])


@settings(
    max_examples=CORRUPTIONS or 300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(st.sampled_from(PLANS if CORRUPTIONS else FEW), st.sampled_from(sorted(kinds(2))), st.integers(0, 2**32))
def test_every_corruption_is_found(name: str, kind: str, seed: int) -> None:
    choose, plan = random.Random(seed), made(name)
    stage = choose.randrange(len(plan.stages))
    body = list(plan.stages[stage].body)
    assume(kinds(len(plan.stages))[kind](body, choose))
    stages = list(plan.stages)
    stages[stage] = replace(stages[stage], body=tuple(body))
    broken = replace(plan, stages=tuple(stages))
    alone = "collective" in kind or "group" in kind or choose.random() < 0.5
    ranks = [rank for rank in range(plan.mesh.world_size) if plan.mesh.coordinates(rank)["pp"] == stage]
    victims = {choose.choice(ranks)} if alone else set(ranks)
    with pytest.raises(PlanError) as caught:
        prove_ranks([broken if rank in victims else plan for rank in range(plan.mesh.world_size)])
    assert "  > " in caught.value.excerpt
    if not alone:
        with pytest.raises(PlanError):
            prove(broken)


def test_ranks_must_have_plans_for_one_mesh() -> None:
    two, four = made("dp2"), made("zero3:size=4+accum2")
    with pytest.raises(PlanMismatch, match=r"mesh: ranks 0 have dp=2; ranks 1 have dp=4"):
        prove_ranks([two, four])
    with pytest.raises(WorldSizeMismatch):
        prove_ranks([two])


def test_both_ranks_are_shown() -> None:
    """One rank exchanges two values that the other does not: each list is sound by itself."""
    plan = made("dp2")
    (only,) = plan.stages
    reduced = [at for at, ins in enumerate(only.body) if ins.op is Op.REDUCE][:2]
    one, two = (only.body[at].outputs[0] for at in reduced)
    names = {one: two, two: one}

    def renamed(refs: Iterable[Ref]) -> list[Ref]:
        return [names.get(ref, ref) for ref in refs]

    body = (
        replace(
            ins,
            inputs=tuple(renamed(ins.inputs)),
            outputs=tuple(renamed(ins.outputs)),
            last=frozenset(renamed(ins.last)),
        )
        for ins in only.body
    )
    with pytest.raises(PlanError) as caught:
        prove_ranks([plan, replace(plan, stages=(replace(only, body=tuple(body)),))])
    assert caught.value.rule == "collective 0 over axis dp differs between rank 0 and rank 1"
    assert [line for line in caught.value.excerpt.splitlines() if line.startswith("rank")] == ["rank 0:", "rank 1:"]


def test_a_broken_list_is_its_rank_s() -> None:
    plan = made("zero3:size=2+pp2:schedule=1f1b,microbatches=2")
    body = list(plan.stages[1].body)
    assert kinds(2)["freed too early"](body, random.Random(0))
    broken = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], body=tuple(body))))
    with pytest.raises(PlanError) as caught:
        prove_ranks([plan, plan, plan, broken])
    assert caught.value.excerpt.startswith("rank 3 (stage 1):\n")
