"""The hash that stands for a captured model: equal for equal graphs, different for different ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from graphshard.errors import NotHashable
from graphshard.testing.random_model import ModelSpec, RandomModel
from graphshard.testing.strategies import model_specs
from graphshard.text import to_text
from graphshard.trace import capture
from graphshard.trace.key import seen
from marks import few
from models.zoo import MODELS


def key(model: nn.Module, *args: Tensor, mode: Any = "train") -> str:
    return seen(model, lambda y: y.sum(), args, {}, mode).digest


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("name", few(MODELS, ("mlp", "convnet", "nested", "gpt", "llama", "bert")))
def test_a_model_has_one_key(name: str, mode: Any) -> None:
    found = set()
    for _ in range(2):
        model, (args, kwargs), loss_fn = MODELS[name]()
        found.add(seen(model, loss_fn, args, kwargs, mode).digest)
    assert len(found) == 1


class Calls(nn.Module):
    """A parameter and a function of it and the batch."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(4, 4)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Keeps(torch.autograd.Function):
    """Adds; its backward reads one of two values of the same type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, which: int) -> Tensor:
        made = (x.exp(), w.exp())
        ctx.save_for_backward(x, w, *made)
        ctx.which = which
        return made[0] + made[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0] * ctx.saved_tensors[ctx.which], None


CONSTANT = torch.arange(4.0)

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, w: x @ w,
    "other order": lambda x, w: w @ x,
    "transposed": lambda x, w: x @ w.t(),
    "number": lambda x, w: x @ w * 2,
    "other number": lambda x, w: x @ w * 3,
    "number of another type": lambda x, w: x @ w * 2.0,
    "constant": lambda x, w: x @ w + CONSTANT,
    "other constant": lambda x, w: x @ w + (CONSTANT + 1),
    "inline constant": lambda x, w: x @ w + torch.tensor([0.0, 1.0, 2.0, 3.0]),
    "other inline constant": lambda x, w: x @ w + torch.tensor([0.0, 1.0, 2.0, 4.0]),
    "no gradient": lambda x, w: x @ w + (x @ w).detach(),
    "gradient": lambda x, w: x @ w + x @ w,
    "written": lambda x, w: (x @ w).add_(1),
    "not written": lambda x, w: (x @ w).add(1),
    **{f"keeps {i}": lambda x, w, i=i: Keeps.apply(x, w, i) for i in range(4)},  # type: ignore[misc, no-untyped-call]
}


def test_different_functions_have_different_keys() -> None:
    x = torch.ones(4, 4)
    found = {name: key(Calls(function), x) for name, function in FUNCTIONS.items()}
    assert len(set(found.values())) == len(FUNCTIONS), found


def test_names_shapes_types_and_modes_count() -> None:
    x = torch.ones(4, 4)

    model = nn.Linear(4, 4)
    frozen = nn.Linear(4, 4)
    frozen.weight.requires_grad = False
    found = [
        key(model, x),
        key(model, x[:2]),
        key(nn.Sequential(nn.Linear(4, 4)), x),
        key(nn.Linear(4, 4).double(), x.double()),
        key(model, x, mode="evaluate"),
        key(frozen, x),
    ]
    assert len(set(found)) == len(found)


def test_what_cannot_be_written_down_is_said() -> None:
    generator = torch.Generator()
    with pytest.raises(NotHashable, match="Generator"):
        key(Calls(lambda x, w: x @ w + torch.rand(4, generator=generator)), torch.ones(4, 4))


no_autocast: Any = torch.autocast("cpu", enabled=False)

# On one line, which counts.
PRECISIONS: list[Any] = [lambda x, w: x @ w, lambda x, w: (x @ w).float(), no_autocast(lambda x, w: x @ w)]


def test_what_a_model_says_of_precision_counts() -> None:
    """Where the plan has one; without, none of it has an effect."""
    for lower, count in ((torch.bfloat16, 3), (None, 1)):
        keys = {seen(Calls(f), lambda y: y.sum(), (torch.ones(4, 4),), {}, "train", lower).digest for f in PRECISIONS}
        assert len(keys) == count


@settings(max_examples=15, deadline=None)
@given(model_specs(), model_specs())
def test_different_graphs_have_different_keys(first: ModelSpec, second: ModelSpec) -> None:
    graphs, keys = set(), []
    for spec in (first, second, first):
        model, batch = RandomModel(spec), tuple(torch.empty(shape) for shape in spec.batch)
        program = capture(model, None, batch, {}, mode="train").program
        graphs.add((to_text(program), *sorted(program.sources.items())))
        keys.append(seen(model, None, batch, {}, "train").digest)
    assert keys[0] == keys[2]
    assert len(set(keys)) >= len(graphs)
