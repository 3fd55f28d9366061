"""What is recomputed changes no bit of training, dropout included."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import graphshard
from marks import full
from numerics.cases import maker
from numerics.mixed import rounding

POLICIES = ("policy=full", "policy=selective", "policy=custom,ops=gelu/native_layer_norm/dropout_mask")
BUDGETS = ("recompute:policy=auto,", "memory:")


def train(
    name: str, plan: str, sizes: dict[str, object]
) -> tuple[list[Tensor], dict[str, Tensor], graphshard.Compiled]:
    model, args, kwargs, loss_fn = maker(name, plan, **sizes)()
    optimizer = partial(AdamW, lr=1e-3)
    compiled = graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=optimizer, executor="local", passes=rounding()
    )
    losses = [compiled.step(*args, **kwargs) for _ in range(3)]
    return losses, compiled.state_dict(), compiled


@pytest.mark.parametrize(
    ("name", "plan", "sizes"),
    [
        ("gpt", "accum2", {"dropout": 0.2}),
        ("bert", "zero3+pp2", {"dropout": 0.2}),
        full("t5", "pp2:schedule=zb-h1", {"dropout": 0.2}),
        full("llama", "zero2+accum2", {}),
        full("vit", "dp2+zero3:size=2", {"dropout": 0.2}),
        ("convnet", "zero3:budget_gb=1+accum2", {}),
        ("mlp", "pp4:schedule=zb-h1", {"dropout": 0.2}),
    ],
)
def test_training_is_the_same_to_the_bit(name: str, plan: str, sizes: dict[str, object]) -> None:
    losses, weights, _ = train(name, plan, sizes)
    for policy in POLICIES if name == "gpt" else POLICIES[:1]:
        again, other, compiled = train(name, f"{plan}+recompute:{policy}", sizes)
        repeated = [n for n in compiled.program.body.nodes() if n.meta["info"].made_by == "recompute"]
        assert repeated, f"{policy} recomputes nothing"
        assert torch.equal(torch.stack(again), torch.stack(losses)), policy
        assert all(torch.equal(other[key], value) for key, value in weights.items()), policy


@pytest.mark.parametrize("token", BUDGETS)
def test_training_under_a_budget_is_the_same_to_the_bit(token: str) -> None:
    sizes: dict[str, object] = {"dropout": 0.2, "depth": 2, "length": 32}
    losses, weights, free = train("gpt", "accum2", sizes)
    budget = 0.75 * max(free.execution_plan.peak_bytes)
    again, other, compiled = train("gpt", f"accum2+{token}budget_gb={budget / 1e9!r}", sizes)
    assert max(compiled.execution_plan.peak_bytes) <= budget
    assert any(node.meta["info"].made_by == "recompute" for node in compiled.program.body.nodes())
    assert torch.equal(torch.stack(again), torch.stack(losses))
    assert all(torch.equal(other[key], value) for key, value in weights.items())


def test_evaluation_is_that_of_the_model_without_recomputation() -> None:
    results = []
    for plan in ("zero3+pp2", "zero3+pp2+recompute:policy=custom,ops=dropout_mask"):
        model, args, kwargs, loss_fn = maker("gpt", plan, dropout=0.2)()
        compiled = graphshard.compile(model, plan, loss_fn=loss_fn, optimizer=partial(AdamW, lr=1e-3), executor="local")
        compiled.step(*args, **kwargs)
        results.append(compiled.evaluate(*args, **kwargs))
    assert torch.equal(*results)


class Recurrent(nn.Module):
    """A GRU, whose steps are long chains of small operations that lead through several regions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.embedding(ids))[0])
        return logits.transpose(1, 2)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_regions_that_depend_on_one_another_in_turn_are_not_made(policy: str) -> None:
    def trained(plan: str) -> list[Tensor]:
        torch.manual_seed(0)
        ids = torch.randint(32, (4, 9))
        compiled = graphshard.compile(
            Recurrent(), plan, loss_fn=F.cross_entropy, optimizer=partial(AdamW, lr=1e-2), executor="local"
        )
        return [compiled.step(ids[:, :-1], ids[:, 1:]) for _ in range(2)]

    assert torch.equal(torch.stack(trained(f"dp1+recompute:policy={policy}")), torch.stack(trained("dp1")))
