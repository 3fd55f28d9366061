"""How to test a pass with the kit: a program in, nodes out. No device, no process group."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from graphshard.errors import UnknownPass
from graphshard.pipeline import parse_passes
from graphshard.program import Program
from graphshard.testing import apply, nodes, trainable
from my_pass import TanhGelu


@pytest.fixture(scope="module")
def program() -> Program:
    mlp = nn.Sequential(OrderedDict(up=nn.Linear(4, 8), act=nn.GELU()))
    return trainable(
        nn.Sequential(OrderedDict(mlp=mlp, head=nn.GELU())), [2, 4], [2, 8], loss_fn=nn.functional.mse_loss
    )


@pytest.mark.parametrize(
    ("below", "modules"), [("", ["mlp.act", "head"]), ("mlp", ["mlp.act"]), ("head", ["head"]), ("ml", [])]
)
def test_gelu_is_approximated_forward_and_backward(program: Program, below: str, modules: list[str]) -> None:
    changed = nodes(apply([TanhGelu(below)], program)).made_by("tanh-gelu")
    assert changed.op("gelu").count == changed.op("gelu_backward").count == len(modules)
    assert sum(changed.module(module).count for module in modules) == changed.count
    assert all(node.kwargs["approximate"] == "tanh" for node in changed)


def test_what_is_approximate_already_is_left_alone(program: Program) -> None:
    below = apply([TanhGelu("head"), TanhGelu()], program)
    assert nodes(below).made_by("tanh-gelu").count == 4
    assert [record.changes for record in apply([TanhGelu()], below).history] == [{}] * 3


def test_the_command_line_finds_it() -> None:
    assert parse_passes("my_pass:TanhGelu;my_pass:TanhGelu:below=mlp") == [TanhGelu(), TanhGelu("mlp")]
    with pytest.raises(UnknownPass, match="did you mean 'zero'"):
        parse_passes("zeroo:stage=3")
