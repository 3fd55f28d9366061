"""Smaller programs of the same structure: their sizes fit, they run, and a wrong pass is found on them too."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import graphshard
from graphshard import text
from graphshard.errors import NodeFailed, NotEquivalent, TooLargeToCheck
from graphshard.passes.zero import Zero
from graphshard.pipeline import Context
from graphshard.program import Program
from graphshard.rewrite import list_arg
from graphshard.shrink import shrunk
from graphshard.sizes import Constraints, Relation, choose, constraints
from two_layers import two_layers

aten = torch.ops.aten


class Attention(nn.Module):
    """Heads, a table of positions that is looked up up to ``longest``, and halves that are joined again."""

    def __init__(self, width: int, heads: int, longest: int, words: int) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, words)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length = tokens.shape
        x = self.words(tokens) + self.positions(torch.arange(length) + 2)
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(x.shape[-1], dim=-1)
        )
        half = q.shape[-1] // 2
        q = torch.cat([-q[..., half:], q[..., :half]], -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        logits: torch.Tensor = self.head(x + y)
        return logits


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 768, 16, 16), nn.GroupNorm(32, 768), nn.Linear(768 * 196, 100)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.patch(images)).flatten(1))
        return logits


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def classify(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels)


def compiled(plan: str, **changes: Any) -> graphshard.Compiled:
    """On paper: 400 million parameters."""
    tokens = torch.empty(64, 96, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model = Attention(4096, 32, 98, 32000)
    arguments: dict[str, Any] = {
        "loss_fn": next_token_loss,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "example_inputs": (tokens, tokens),
        "executor": "none",
    }
    return graphshard.compile(model, plan, **(arguments | changes))


def captured(what: graphshard.Compiled) -> Program:
    built = what._compiled()
    assert built.graphs.source is not None
    return built.graphs.source


@pytest.mark.parametrize("plan", ["zero3:size=16+pp2", "dp8", "dp2+zero3:size=8+accum4"])
def test_a_large_model_is_checked_in_a_small_one(plan: str) -> None:
    what = compiled(plan)
    assert what.verify(limit_gb=1.0) == what.passes
    with pytest.raises(TooLargeToCheck, match=r"which takes \d\d+\.\d GB where the limit is 4\.0 GB;"):
        what.verify(full_size=True)


def test_sizes_shrink_but_for_those_of_a_table_that_is_looked_up_to_its_end() -> None:
    program = captured(compiled("zero3:size=16+pp2"))
    small = shrunk(program, limit_gb=0.1)
    assert sum(p.numel for p in program.params.values()) > 3e8
    assert sum(p.numel for p in small.params.values()) < 50_000
    assert small.params["positions.weight"].shape[0] == 98
    assert str(small.mesh) == "pp=2 dp=3"
    assert small.microbatches == 2
    assert text.to_text(text.parse(text.to_text(small))) == text.to_text(small)


def test_windows_stay_and_channels_shrink() -> None:
    images, labels = torch.zeros(4, 3, 224, 224), torch.zeros(4, dtype=torch.int64)
    with torch.device("meta"):
        model = Patches()
    what = graphshard.compile(model, "dp2", loss_fn=classify, example_inputs=(images, labels), executor="none")
    small = shrunk(captured(what), limit_gb=1.0)
    out, into, *window = small.params["patch.weight"].shape
    assert (into, window) == (3, [16, 16])
    assert out < 768
    assert small.params["head.weight"].shape[1] == out * 196


def test_a_program_that_is_small_already_stays() -> None:
    program = text.parse(two_layers("dp=2"))
    assert text.to_text(shrunk(program, limit_gb=1.0)) == text.to_text(program)


class OffByOne:
    """Shards by the wrong element of every bucket."""

    name: ClassVar[str] = "zero"
    exact: ClassVar[bool] = False

    def run(self, program: Program, ctx: Context) -> Program:
        program = Zero(stage=3).run(program, ctx)
        for node in program.body.nodes():
            if node.target is torch.ops.graphshard.pack.default:
                offsets = [offset + 1 for offset in list_arg(node, 1)]
                node.args = (node.args[0], offsets, node.args[2])
                return program
        raise AssertionError("no gradient is packed")


def test_a_wrong_pass_is_found_in_the_small_program() -> None:
    what = compiled("zero3:size=16")
    what.passes[:] = [OffByOne() if item.name == "zero" else item for item in what.passes]
    with pytest.raises(NotEquivalent, match="pass 'zero' does not keep the program's meaning"):
        what.verify()


def test_a_pass_that_decides_by_size_is_said_to_have_decided_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "graphshard")
    compiled("zero3:size=16").verify()
    compiled("zero3:size=16,budget_gb=0.5").verify()
    (message,) = (record.getMessage() for record in caplog.records if record.name == "graphshard")
    assert "pass 'hoist' was checked at a smaller size, where it made" in message
    assert message.endswith("verify(full_size=True) checks that")


@pytest.mark.parametrize(
    ("relations", "fixed"),
    [
        ([Relation((4096,), (32, 128)), Relation((64, 64), (128,), additive=True)], ()),
        ([Relation((4096,), (32, 128)), Relation((4096,), (2, 2048))], ()),
        ([Relation((2048, 1), (2049,), additive=True), Relation((32, 2048), (65536,))], (32,)),
        ([Relation((3, 768), (2304,)), Relation((768, 768), (1536,), additive=True)], ()),
    ],
)
def test_chosen_sizes_obey_the_relations(relations: list[Relation], fixed: tuple[int, ...]) -> None:
    sizes = sorted({n for relation in relations for n in relation.left + relation.right if n > 8})
    chosen = choose(Constraints(tuple(sizes), tuple(relations), frozenset(fixed)))
    assert all(relation.holds(chosen) for relation in relations)
    assert all(chosen[size] == size for size in fixed)
    assert all(2 <= chosen[size] < size for size in sizes if size not in fixed and size != 65536)


def test_sizes_that_nothing_can_replace_stay() -> None:
    relations = (Relation((17,), (1, 16), additive=True), Relation((17, 16), (272,)), Relation((11, 11), (121,)))
    given = Constraints((11, 16, 17, 121, 272), (*relations, Relation((121, 151), (272,), additive=True)), frozenset())
    chosen = choose(given)
    assert all(relation.holds(chosen) for relation in given.relations)


def test_constraints_are_those_of_the_operators() -> None:
    source = """graphshard 1

graph body {
  %x : f32[4,96] = batch 0
  %a = aten.view.default(%x, [4, 12, 8])
  %b = aten.cat.default([%x, %x], 1)
  %c = aten.slice.Tensor(%b, 1, 32, 96)
  %d = aten.sum.default(%c)
  return output "0" %d
}
"""
    given = constraints(text.parse(source))
    assert set(given.sizes) == {12, 32, 64, 96, 192}
    assert {(relation.left, relation.right, relation.additive) for relation in given.relations} == {
        ((96,), (12, 8), False),
        ((96, 96), (192,), True),
        ((64, 32), (96,), True),
    }


def test_a_model_that_random_inputs_do_not_suit_is_refused() -> None:
    source = """graphshard 1

graph body {
  %x : i64[4,96] = batch 0
  %table : f32[1,16] = param "table"
  %rows = aten.embedding.default(%table, %x)
  return output "0" %rows
}
"""
    program = text.parse(source.replace("graph body", 'param "table" : f32[1,16]\n\ngraph body'))
    with pytest.raises(NodeFailed, match=r"on random inputs: %rows = aten.embedding.default says 'index out of range"):
        shrunk(program, limit_gb=1.0)
