"""Blocks of a model, and the minimum cuts that say what of each is kept."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphshard.analysis import FLOPS_PER_BYTE, cost, flops, nbytes
from graphshard.blocks import blocks, boundaries, forward_of, root
from graphshard.dataflow import is_pointwise, is_view
from graphshard.program import Program, info, val
from graphshard.saving import POLICIES, PRICES, Ladder, Rung, can_repeat, divide, saved_bytes, storages
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


class Gated(Feed):
    """A chain of pointwise operations, which is one region."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        result: Tensor = x + self.down(F.gelu(y * torch.sigmoid(y)).exp())
        return result


def program(depth: int = 3, width: int = 8, block: type[nn.Module] = Feed) -> Program:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(width, width))
    model.add_module("h", nn.Sequential(*(block(width) for _ in range(depth))))
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


@pytest.mark.parametrize("block", [Feed, Gated])
@pytest.mark.parametrize("level", range(1, len(PRICES) + 1, 3))
def test_no_other_choice_in_a_block_costs_less_than_the_cut(level: int, block: type[nn.Module]) -> None:
    made, price = program(1, block=block), PRICES[level - 1]
    ladder = Ladder(made, None)
    at = ladder.block_of[one(made, "gelu")]
    inside = [node for node, number in ladder.block_of.items() if number == at]
    free = [node for node in inside if not is_view(node) and node not in ladder.kept]

    def total(again: set[fx.Node]) -> float:
        kept, repeated = divide(forward_of(made, None), again)
        if any(not isinstance(val(node), Tensor) for node in kept):
            return float("inf")  # of an operator with several results, each is kept by itself
        held = sum(nbytes(val(node)) for node in storages(kept) if node in inside and node not in ladder.kept)
        return price * held + sum(time(node, repeated) for node in repeated if node in inside)

    views = {node for node in inside if is_view(node)}
    choices = itertools.chain.from_iterable(itertools.combinations(free, count) for count in range(len(free) + 1))
    best = min(total(views | set(choice)) for choice in choices)
    assert total(views | set(ladder.recomputed(Rung(level, at + 1)))) == best


def time(node: fx.Node, repeated: set[fx.Node]) -> int:
    """Of computing ``node`` again beside ``repeated``: what pointwise ones make for each other is not in memory."""
    if not is_pointwise(node):
        return round(cost(node))
    read = sum(
        nbytes(val(source)) for source in node.all_input_nodes if not (source in repeated and is_pointwise(source))
    )
    written = 0 if all(map(is_pointwise, node.users)) else nbytes(val(node))
    return round(flops(node) + FLOPS_PER_BYTE * (read + written))


def test_what_is_fused_is_cheaper_to_compute_again() -> None:
    """At a price at which each operation by itself is kept, all of a chain are computed again."""
    made = program(1, width=64, block=Gated)
    ladder = Ladder(made, None)
    chain = [node for node in ladder.block_of if is_pointwise(node) and info(node).module == "h.0"][:-1]
    assert len(chain) == 4
    alone = min(cost(node) / nbytes(val(node)) for node in chain)
    level = max(level for level, price in enumerate(PRICES, 1) if price < alone)
    assert set(chain[:3]) <= ladder.recomputed(Rung(level, len(ladder.members)))


def one(program: Program, op: str) -> fx.Node:
    (node,) = (n for n in program.body.nodes() if n.target is getattr(torch.ops.aten, op).default)
    return node


@pytest.mark.parametrize("block", [Feed, Gated])
@pytest.mark.parametrize("level", range(1, len(PRICES) + 1, 3))
def test_what_is_spent_on_computing_again_is_what_the_cuts_count(level: int, block: type[nn.Module]) -> None:
    made = program(2, block=block)
    ladder = Ladder(made, None)
    again = ladder.recomputed(Rung(level, 1))
    repeated = divide(forward_of(made, None), again)[1]
    assert ladder.spent(again) == sum(time(node, repeated) for node in repeated)


def test_policies_with_a_name_are_in_the_order_of_what_they_spend() -> None:
    ladder = Ladder(program(), None)
    chosen = [ladder.named(policy) for policy in POLICIES]
    assert chosen[0] < chosen[1] < chosen[2] == set(filter(can_repeat, forward_of(ladder.program, None)))
    spent = list(map(ladder.spent, chosen))
    assert 0 < spent[0] < spent[1] < spent[2]
    assert [sum(saved_bytes(ladder, again)) for again in chosen][-1] == 0


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
