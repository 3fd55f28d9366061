"""Arguments of ``compile`` and ``load`` of the wrong kind are refused in one line that names them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.errors import BadArgument, NothingToUpdate

adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
X, Y = torch.linspace(-1, 1, 16).view(4, 4), torch.linspace(1, -1, 12).view(4, 3)


def compiled(model: Any = None, **more: Any) -> graphshard.Compiled:
    torch.manual_seed(0)
    given: dict[str, Any] = {"loss_fn": F.mse_loss, "optimizer": adamw, "executor": "local"}
    return graphshard.compile(nn.Linear(4, 3) if model is None else model, **(given | more))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("model", 3, "a torch.nn.Module"),
        ("plan", 3, "a plan string such as 'zero3+pp4', or a Plan"),
        ("loss_fn", "mse", "a function of the model's output and targets, or None"),
        ("seed", "a", "an integer of at most 63 bits"),
        ("seed", 2**70, "an integer of at most 63 bits"),
        ("seed", 1.5, "an integer of at most 63 bits"),
        ("passes", 3, "a list of passes"),
        ("init", 3, "a function of the model, or None"),
        ("device", "foo", "a torch.device, its name such as 'cuda:0', or None"),
        ("device", 1.5, "a torch.device, its name such as 'cuda:0', or None"),
        ("timeout_s", 0, "a finite number of seconds above 0"),
        ("timeout_s", -1.0, "a finite number of seconds above 0"),
        ("timeout_s", "1", "a finite number of seconds above 0"),
        ("timeout_s", float("nan"), "a finite number of seconds above 0"),
        ("cache", 3, "True, False or a folder"),
        ("world_size", 0, "an integer of at least 1, or None"),
        ("world_size", "4", "an integer of at least 1, or None"),
        ("world_size", True, "an integer of at least 1, or None"),
        ("executor", 3, "'auto', 'distributed', 'local' or 'none'"),
        ("dump_dir", 3, "a folder, or None"),
        ("debug_nan", "yes", "True or False"),
        ("measure_memory", "yes", "True or False"),
        ("max_grad_norm", "1", "a number, such as 1.0, or None"),
        ("max_grad_norm", [1.0], "a number, such as 1.0, or None"),
        ("max_grad_norm", 1j, "a number, such as 1.0, or None"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(name: str, given: Any, expected: str) -> None:
    with pytest.raises(BadArgument) as caught:
        compiled(**{name: given})
    assert str(caught.value) == f"{name} is {given!r}; expected {expected}"


def test_of_several_passes_the_wrong_one_is_named() -> None:
    with pytest.raises(BadArgument, match=r"passes\[0\] is 3; expected a pass, which has a name"):
        compiled(passes=[3])


def test_a_tensor_of_several_elements_is_no_norm() -> None:
    with pytest.raises(BadArgument, match=r"max_grad_norm is tensor\(\[1\., 1\.\]\); expected a number"):
        compiled(max_grad_norm=torch.ones(2))


@pytest.mark.parametrize(
    ("name", "given"), [("model", 3), ("seed", "a"), ("init", 3), ("device", "foo"), ("timeout_s", 0)]
)
def test_load_refuses_the_same(name: str, given: Any, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=f"^{name} is {given!r}; expected"):
        graphshard.load(tmp_path, **{name: given})


@pytest.mark.parametrize(
    "norm", [np.float64(0.1), np.float32(0.1), torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)]
)
def test_a_norm_may_be_any_number(norm: Any) -> None:
    def values(max_grad_norm: Any) -> list[Tensor]:
        made = compiled(
            plan="zero1:size=2", max_grad_norm=max_grad_norm, optimizer=functools.partial(torch.optim.SGD, lr=1)
        )
        return [made.step(X, Y), *made.state_dict().values()]

    assert all(map(torch.equal, values(norm), values(float(norm))))


def test_a_seed_may_be_numpys_and_none_is_no_cache() -> None:
    assert compiled(seed=np.int64(3), cache=None).seed == 3


def test_a_model_without_parameters_has_nothing_to_update() -> None:
    with pytest.raises(NothingToUpdate, match="the model has no parameters"):
        compiled(nn.ReLU())
    assert compiled(nn.ReLU(), optimizer=None)(X).shape == X.shape
