"""Assignments through masks: models that make them train as eagerly, where no shape depends on how much is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphshard.trace import capture
from numerics.test_operators import PLANS, WIDTH, Model, trained


def rows(model: Any, hidden: Tensor) -> Tensor:
    """One row for all masked ones: absent and present dims of it, and functions, which keep strides."""
    mask = hidden[:, 0] > 0
    hidden = hidden.clone()
    hidden[mask] = model.weight[0]
    hidden[~mask, :] = model.weight[1:2].tanh()
    hidden = torch.index_put(hidden, (mask,), model.weight[2])
    turned = hidden.t().index_put((model.weight[3] > 0,), model.weight[3, 3])
    return turned.t().view(-1).view(hidden.shape).index_put((mask.roll(1),), model.weight[:1, :1])


def elements(model: Any, hidden: Tensor) -> Tensor:
    """A mask of all dims, and of dims behind others."""
    hidden = torch.tanh(hidden) + 0.1
    hidden[hidden > 0.2] = model.weight[0, 0]
    hidden[:, model.weight[0] > 0] = model.weight[1, 1:2]
    hidden[..., model.weight[2] > 0] = model.weight[:1, :1]
    hidden[None, hidden < -0.2] = model.weight[2].sum()
    return hidden


def parts(model: Any, hidden: Tensor) -> Tensor:
    """Parts of a tensor, and of views of it."""
    hidden = hidden * 2
    mask = hidden > 0
    hidden[mask[:, 1], 2:4] = model.weight[0, 2:4]
    hidden[mask[:, 2], 0] = model.weight[0, 0]
    hidden[3, mask[3]] = model.weight[3, 3]
    hidden[1::2][mask[1::2, 4]] = model.weight[4]
    hidden.t()[2, mask[:, 5]] = model.weight[5, 5]
    return hidden


def added(model: Any, hidden: Tensor) -> Tensor:
    mask = hidden > 0
    hidden = torch.index_put(hidden, (mask[:, 1],), model.weight[0], accumulate=True)
    hidden.index_put_((mask,), model.weight[1, 1], accumulate=True)
    torch.index_put_(hidden, (mask[:, 0],), model.weight[2])
    return hidden.index_put_((hidden[:, 3] > 0,), model.weight[:1])


def untrained(model: Any, hidden: Tensor) -> Tensor:
    """Numbers, and what has no gradient, which may have a row for each masked one: torch's own operator writes them."""
    hidden = hidden.clone()
    hidden[hidden.detach() > 0] = 0.5
    hidden[torch.arange(len(hidden)) < 2] = torch.arange(2.0, dtype=hidden.dtype)[:, None].expand(2, WIDTH)
    return hidden


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("between", [rows, elements, parts, added, untrained])
def test_assignments(between: Any, plan: str) -> None:
    trained(between, plan)


def test_a_mask_is_read_by_no_index() -> None:
    batch = torch.zeros(16, WIDTH), torch.zeros(16, WIDTH)
    for between in (rows, elements, parts, added):
        graph = capture(Model(between), F.mse_loss, batch, {}, mode="train").program.body
        names = {str(node.target).split(".")[1] for node in graph.nodes() if node.op == "call_function"}
        assert "where" in names and not names & {"index", "index_put", "nonzero"}, between.__name__
