"""Keyed random operators: the key and the id alone decide the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphshard.ops  # noqa: F401
from graphshard import philox
from graphshard.program import Role, Slot
from graphshard.trace import capture
from graphshard.verify import verify
from models import interpret

gs = torch.ops.graphshard
KEY = torch.tensor([1, 2, 3, 4])
SEED = torch.tensor(0x1234567890ABCDEF)
DRAWS: dict[str, Callable[[Tensor, int], Any]] = {
    "dropout_mask": lambda key, id: gs.dropout_mask(gs.seed(key, id, device=torch.get_default_device()), [8, 8], 0.5),
    "bernoulli": lambda key, id: gs.bernoulli(torch.full((64,), 0.5), key, id),
    "poisson": lambda key, id: gs.poisson(torch.full((64,), 5.0), key, id),
    "multinomial": lambda key, id: gs.multinomial(torch.ones(64), key, 32, False, id),
    "permutation": lambda key, id: gs.permutation(key, 64, id, dtype=torch.int64, device=torch.get_default_device()),
    "sample": lambda key, id: gs.sample(
        key, [8, 8], "normal", [0.0, 1.0], id, dtype=torch.float32, device=torch.get_default_device()
    ),
    "sample_like": lambda key, id: gs.sample_like(torch.ones(64), key, "uniform", [0.0, 1.0], id),
}


@pytest.mark.parametrize("name", DRAWS)
def test_key_and_id_decide(name: str) -> None:
    draw = DRAWS[name]
    state = torch.get_rng_state()
    first = draw(KEY, 7)
    assert torch.equal(first, draw(KEY.clone(), 7))
    assert not torch.equal(first, draw(KEY, 8))
    for place in range(4):
        other = KEY.clone()
        other[place] += 1
        assert not torch.equal(first, draw(other, 7)), "every word of the key counts"
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize("name", DRAWS)
def test_types(name: str) -> None:
    real = DRAWS[name](KEY, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = DRAWS[name](KEY, 0)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_strides_do_not_change_the_numbers() -> None:
    x = torch.ones(5, 7)
    drawn = gs.sample_like(x, KEY, "uniform", [0.0, 1.0], 0)
    transposed = gs.sample_like(x.t().contiguous().t(), KEY, "uniform", [0.0, 1.0], 0)
    assert transposed.stride() == (1, 5)
    assert torch.equal(drawn, transposed)


def test_words_are_those_of_the_paper() -> None:
    """A known answer of the authors' Random123, whose other ones have counters of more than 64 bits."""
    found = [int(word[0]) for word in philox.numpy_blocks(0, 0, 1)]
    assert found == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_keeps_the_mean() -> None:
    for p in (0.1, 0.25, 0.9):
        kept = gs.dropout_mask(SEED, [100_000], p)
        assert abs(float(kept.float().mean()) - (1 - p)) < 0.005
    assert not gs.dropout_mask(SEED, [1000], 1.0).any()
    assert gs.dropout_mask(SEED, [1000], 0.0).all()


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 1), (3, 2), (4, 8), (65_530, 65_543), (2**34 + 1, 9)])
def test_any_part_of_a_mask_can_be_drawn(first: int, count: int) -> None:
    begin = first - min(first, 10)
    whole = gs.dropout_mask(SEED, [first - begin + count], 0.5, begin)
    assert torch.equal(gs.dropout_mask(SEED, [count], 0.5, first), whole[first - begin :])


def test_every_device_computes_the_same_words() -> None:
    for seed in (0, -1, 2**63 - 1, 0x1234567890ABCDEF):
        ours = philox.numpy_blocks(seed, 2**33 - 5, 2**33 + 5)
        others = philox.blocks_on(torch.get_default_device(), seed, 2**33 - 5, 2**33 + 5)
        assert [word.tolist() for word in ours] == [word.tolist() for word in others]


def test_words_of_the_key_do_not_cancel() -> None:
    """Swapping or shifting counters must not lead to the same numbers."""
    keys = [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1)]
    drawn = set()
    for key in keys:
        for id in range(3):
            out = gs.sample(torch.tensor(key), [2], "uniform", [0.0, 1.0], id, dtype=torch.float32, device="cpu")
            drawn.add(tuple(out.tolist()))
    assert len(drawn) == 3 * len(keys)


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: x * torch.rand(4, 6),
    "rand_like": lambda x: x * torch.rand_like(x.t()).t(),
    "randn": lambda x: x + torch.randn(6),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint": lambda x: x + torch.randint(2, 30, (6,)),
    "randint_like": lambda x: x + torch.randint_like(x, 30),
    "randperm": lambda x: x[torch.randperm(4)],
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli_": lambda x: x * torch.empty(4, 6).bernoulli_(0.5),
    "bernoulli_tensor": lambda x: x * torch.empty(4, 6).bernoulli_(torch.full((6,), 0.5)),
    "uniform_": lambda x: x * torch.empty(4, 6).uniform_(1, 2),
    "normal_": lambda x: x * torch.empty(6, 4).t().normal_(1, 2),
    "normal": lambda x: x + torch.normal(0.0, 1.0, (6,)),
    "normal_mean": lambda x: torch.normal(x.detach(), 2.0) + x,
    "normal_both": lambda x: x * torch.normal(torch.zeros(6), torch.ones(6)),
    "exponential_": lambda x: x * torch.empty_like(x).exponential_(),
    "multinomial": lambda x: x * torch.multinomial(torch.ones(9), 6),
    "poisson": lambda x: x * torch.poisson(torch.full((6,), 9.0)),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "dropout1d": lambda x: nn.functional.dropout1d(x, 0.5),
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x, 0.5, training=True),
    "gumbel_softmax": lambda x: nn.functional.gumbel_softmax(x),
    "rand_like_contiguous": lambda x: x * torch.rand_like(x.t(), memory_format=torch.contiguous_format).t(),
    "bernoulli_of_permuted": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5).t()).t(),
    "bernoulli_with_permuted": lambda x: x * torch.empty(4, 6).bernoulli_(torch.full((6, 4), 0.5).t()),
    "bernoulli_of_permuted_with": lambda x: x * torch.empty(6, 4).t().bernoulli_(torch.full((4, 6), 0.5)),
    "normal_of_permuted": lambda x: x * torch.normal(torch.zeros(6, 4).t(), torch.ones(4, 6)),
    "dropout_in_place_of_permuted": lambda x: nn.functional.dropout(x.t() * 1.0, 0.5, inplace=True),
    "alpha_dropout_of_permuted": lambda x: nn.functional.alpha_dropout(x.t(), 0.5, training=True),
}


class Noisy(nn.Module):
    """A linear layer whose output goes through a random function."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x)).square().sum()


@pytest.mark.only_cpu("runs a captured graph node by node")
@pytest.mark.parametrize("name", RANDOM)
def test_random_functions_of_torch_take_the_key(name: str) -> None:
    torch.manual_seed(0)
    model = Noisy(RANDOM[name])
    program = capture(model, None, (torch.ones(4, 6),), {}, mode="train").program
    verify(program)
    assert not any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in program.body.nodes()
    )
    x = torch.arange(24.0).view(4, 6)  # rows differ, so that their order counts
    batch = {Slot(Role.BATCH, "0"): x}
    stored = {Slot(Role.PARAM, path): p.detach() for path, p in model.named_parameters()}
    losses = [interpret.step(program, stored, [batch], seed)[0][Slot(Role.LOSS, "loss")] for seed in (1, 1, 2, 3, 4)]
    assert losses[0] == losses[1]
    if name != "randperm":  # the sum does not see the order
        assert len({float(loss) for loss in losses}) > 1
