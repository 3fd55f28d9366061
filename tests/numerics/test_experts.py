"""Mixtures of experts, whose products of groups of rows are one operator: they train as eagerly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard import text
from graphshard.analysis import flops
from graphshard.trace import capture
from marks import few
from numerics.cases import rows_of, sgd
from numerics.mixed import both
from numerics.reference import Make, check_parity, rolled

gs = torch.ops.graphshard
PLANS = ("dp1", "zero3:size=2+accum2", "zero3+pp2")


def mixtral(plan: str) -> Make:
    """Two layers of four experts, two for each token, with the router's loss."""
    transformers = pytest.importorskip("transformers")

    def make() -> Any:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=8, num_local_experts=4, num_experts_per_tok=2,
            output_router_logits=True, router_aux_loss_coef=0.1,
        )  # fmt: skip
        ids = torch.randint(32, (rows_of(plan), 8))
        return transformers.MixtralForCausalLM(config).train(), (), {"input_ids": ids, "labels": ids}, None

    return make


@pytest.mark.real_gpu("eager counts of what goes to an expert")
@pytest.mark.parametrize("plan", few(PLANS, ["zero3+pp2"]))
def test_mixtral(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager in float64 with transformers' own operator, since torch's takes no float64."""
    experts = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(experts, "_can_use_grouped_mm", lambda *_: False)
    check_parity(mixtral(plan), plan, sgd, dtype=torch.float64)


@pytest.mark.real_gpu("eager counts of what goes to an expert")
def test_mixtral_follows_autocast() -> None:
    """Where products of groups are in float32."""
    compiled, eager, args, kwargs = both(mixtral("dp2"), "dp2+bf16", optimizer=sgd)
    before = {n: v.detach().clone() for n, v in eager.model.named_parameters()}
    for index in range(3):
        batch, named = rolled((args, kwargs), index)
        theirs, ours = eager.step(batch, named), compiled.step(*batch, **named)
        assert ours.item() == pytest.approx(theirs.item(), rel=4e-3)
    products = [node for node in compiled.program.body.nodes() if node.target is gs.grouped_mm.default]
    assert products and {node.meta["val"].dtype for node in products} == {torch.bfloat16}
    state = compiled.state_dict()
    moved = torch.cat([(state[n] - old).flatten() for n, old in before.items()])
    wanted = torch.cat([(v.detach() - before[n]).flatten() for n, v in eager.model.named_parameters()])
    assert F.cosine_similarity(moved, wanted, dim=0) > 0.9


ENDS = (2, 2, 7, 12)  # of 16 rows


class Grouped(nn.Module):
    """torch's products of groups, whose ends are those of a batch: of rows, of columns, of what is summed, of none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16) / 4), nn.Parameter(torch.randn(4, 8, 16) / 4)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        ends, all_rows = ends[0].to(torch.int32), self.first(x)
        behind = (
            torch.arange(len(x), device=x.device)[:, None] >= ends[-1]
        )  # where torch leaves anything in results and gradients
        x = all_rows.masked_fill(behind, 0.0)
        hidden = F.grouped_mm(x, self.up, offs=ends).masked_fill(behind, 0.0)
        by_rows = torch._grouped_mm(hidden.tanh(), self.down.mT, offs=ends)
        by_columns = F.grouped_mm(self.down.mT, x.t(), offs=ends).t()[:, :8]
        summed = F.grouped_mm(x.t(), hidden, offs=ends)
        grouped = torch.where(behind, all_rows, by_rows + by_columns)
        result: Tensor = self.last(grouped) + F.grouped_mm(summed, self.up.mT).mean((0, 1))
        return result


def groups(plan: str) -> Make:
    def make() -> Any:
        torch.manual_seed(0)
        count = rows_of(plan, 16)
        return (
            Grouped(),
            ((torch.randn(count, 8), torch.tensor(ENDS).expand(count, 4)), torch.randn(count, 8)),
            {},
            F.mse_loss,
        )

    return make


@pytest.mark.parametrize("plan", ["dp1", "zero3:size=2+accum2", "pp2", "recompute:policy=full"])
def test_groups_of_torch(plan: str) -> None:
    check_parity(groups(plan), plan, sgd)


def test_text_and_passes_know_the_operators(tmp_path: Path) -> None:
    plan = "zero3:size=2+recompute:policy=full"
    model, args, kwargs, loss_fn = groups(plan)()
    given: Any = {"example_inputs": (args, kwargs), "loss_fn": loss_fn, "optimizer": sgd(model)}
    compiled = graphshard.compile(model, plan, executor="none", dump_dir=tmp_path, **given)
    assert compiled.verify() == compiled.passes
    graphs = sorted(tmp_path.glob("*.graph"))
    assert "graphshard.grouped_outer" in graphs[-1].read_text()
    for path in graphs:
        assert text.to_text(text.read(path)) == path.read_text(), path.name
    kinds = (gs.grouped_mm.default, gs.grouped_outer.default)
    assert {flops(n) for n in compiled.program.body.nodes() if n.target in kinds} == {2 * 16 * 8 * 16}


def test_what_torch_refuses_is_refused_with_its_words() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.grouped_mm(x, self.w, offs=torch.tensor([1, 2], dtype=torch.int32))

    with pytest.raises(graphshard.errors.ModelFailed, match=r"offs=torch\.tensor"):
        capture(Model(), F.mse_loss, (torch.ones(4, 8), torch.ones(4, 8)), {}, mode="train")
