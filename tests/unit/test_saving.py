"""Blocks of a model, and the minimum cuts that say what of each is kept."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphshard.analysis import cost, nbytes
from graphshard.blocks import blocks, boundaries, forward_of, root
from graphshard.dataflow import is_view
from graphshard.program import Program, info, val
from graphshard.saving import PRICES, Ladder, Rung, can_repeat, divide, saved_bytes, storages
from graphshard.testing import apply, trainable


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


def program(depth: int = 3, width: int = 8) -> Program:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(width, width))
    model.add_module("h", nn.Sequential(*(Feed(width) for _ in range(depth))))
    model.add_module("last", nn.Linear(width, 1))
    return apply("normalize", trainable(model, [16, width], loss_fn=Tensor.mean))


def names(program: Program) -> list[str]:
    """Of each block, the modules in it."""
    found: dict[int, list[str]] = {}
    for node, block in blocks(forward_of(program, None)).items():
        found.setdefault(block, []).append(info(node).module)
    return ["/".join(dict.fromkeys(paths)) for _, paths in sorted(found.items())]


def test_a_block_is_what_a_repeated_module_does() -> None:
    assert names(program(2)) == ["first", "h.0.norm/h.0.up/h.0/h.0.down", "h.1.norm/h.1.up/h.1/h.1.down", "last", ""]


def test_single_layers_are_joined_into_blocks_of_about_the_root_of_their_number() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    assert names(apply("normalize", trainable(model, [2, 4], loss_fn=Tensor.mean))) == [
        "0/1/2", "3/4/5", "6/7/8", "",
    ]  # fmt: skip


def test_what_enters_a_block_is_kept_whatever_the_price() -> None:
    made = program()
    ladder = Ladder(made, None)
    crossing = {node for node in boundaries(made, ladder.block_of) if node.op == "call_function"}
    assert {info(node).module for node in crossing} == {"first", "h.0", "h.1", "h.2", "last"}
    assert not crossing & ladder.recomputed(ladder.rungs[-1])


def test_a_ladder_keeps_less_for_more_work_on_every_rung() -> None:
    made = program()
    ladder = Ladder(made, None)
    chosen = [ladder.recomputed(rung) for rung in ladder.rungs]
    kept = [sum(saved_bytes(ladder, again)) for again in chosen]
    work = [sum(cost(node) for node in again) for again in chosen]
    assert chosen[0] == set()
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 3
    assert work == sorted(work) and len(set(work)) == len(work)


@pytest.mark.parametrize("level", range(1, len(PRICES) + 1, 3))
def test_no_other_choice_in_a_block_costs_less_than_the_cut(level: int) -> None:
    made, price = program(1), PRICES[level - 1]
    ladder = Ladder(made, None)
    inside = [node for node, block in ladder.block_of.items() if block == ladder.block_of[one(made, "gelu")]]
    free = [node for node in inside if not is_view(node) and node not in ladder.kept]

    def total(again: set[fx.Node]) -> float:
        kept, repeated = divide(forward_of(made, None), again)
        if any(not isinstance(val(node), Tensor) for node in kept):
            return float("inf")  # of an operator with several results, each is kept by itself
        held = sum(nbytes(val(node)) for node in storages(kept) if node in inside and node not in ladder.kept)
        return price * held + sum(round(cost(node)) for node in repeated if node in inside)

    views = {node for node in inside if is_view(node)}
    choices = itertools.chain.from_iterable(itertools.combinations(free, count) for count in range(len(free) + 1))
    best = min(total(views | set(choice)) for choice in choices)
    block = ladder.block_of[inside[0]]
    assert total(views | set(ladder.recomputed(Rung(level, block + 1)))) == best


def one(program: Program, op: str) -> fx.Node:
    (node,) = (n for n in program.body.nodes() if n.target is getattr(torch.ops.aten, op).default)
    return node


def test_blocks_that_are_alike_share_their_cuts() -> None:
    ladder = Ladder(program(6), None)
    first = [len(ladder.choice(index, 20)) for index in range(1, 7)]
    assert len(set(first)) == 1 and first[0] > 0
    assert len(ladder._cuts) == 1
    assert len(ladder.rungs) > 6


def test_numbers_drawn_without_a_key_are_never_drawn_again() -> None:
    made = program(1)
    node = one(made, "gelu")
    assert can_repeat(node)
    node.target = torch.ops.aten.rand_like.default
    assert not can_repeat(node)
    network = Ladder(made, None)
    assert node not in network.recomputed(network.rungs[-1])
    tagged = apply("memory-policy:policy=full;recompute", made)
    assert sum(n.target is torch.ops.aten.rand_like.default for n in tagged.body.nodes()) == 1


def test_a_view_is_kept_with_its_storage() -> None:
    made = program(1)
    kept, _ = divide(forward_of(made, None), set())
    assert all(root(node) in storages(kept) for node in kept if root(node).op == "call_function")
