"""A second start takes its plan from the cache, and does what a compiled one does; what fits no entry is compiled."""

from __future__ import annotations

import copy
import functools
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.pipeline import Context
from graphshard.program import Program
from graphshard.saved.cache import PlanCache
from graphshard.text import to_text
from numerics.cases import OPTIMIZERS, maker
from uncompiled import refuse_compiling

BATCH = (torch.linspace(-1, 1, 32).view(8, 4), torch.linspace(1, -1, 24).view(8, 3))
Compiled = graphshard.Compiled


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def start(cache: Path | bool, **more: Any) -> Compiled:
    given: dict[str, Any] = {
        "model": model(),
        "plan": "zero3+pp2:microbatches=2",
        "loss_fn": F.mse_loss,
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2),
        "executor": "local",
        "example_inputs": BATCH,
    }
    return graphshard.compile(**(given | more), cache=cache)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one plan."""
    folder = tmp_path_factory.mktemp("cache")
    start(folder)
    return folder


def is_cached(compiled: Compiled) -> bool:
    return "from the cache" in compiled._told()  # what explain says, without the graphs that it looks at


def training(compiled: Compiled, args: Any, kwargs: Any) -> list[Tensor]:
    losses = [compiled.step(*args, **kwargs) for _ in range(3)]
    return [*losses, compiled.evaluate(*args, **kwargs), *compiled.state_dict().values()]


@pytest.mark.parametrize(
    ("name", "plan", "optimizer"),
    [
        ("gpt", "zero3+pp2", "adamw"),
        ("convnet", "dp2", "sgd"),
        ("mlp", "zero1+pp2+fp16:init_scale=1024", "adamw"),
        ("mlp", "zero3+memory:budget_gb=0.1", "adagrad"),
    ],
)
def test_a_second_start_trains_bit_for_bit(
    name: str, plan: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, args, kwargs, loss_fn = maker(name, plan)()

    def started() -> Compiled:
        twin = copy.deepcopy(made)
        more = {"loss_fn": loss_fn, "optimizer": OPTIMIZERS[optimizer](twin), "max_grad_norm": 1.0, "seed": 3}
        return start(tmp_path, model=twin, plan=plan, example_inputs=None, **more)

    expected = training(started(), args, kwargs)
    refuse_compiling(monkeypatch)
    assert all(map(torch.equal, training(started(), args, kwargs), expected))


def test_what_is_asked_about_it_is_the_same(tmp_path: Path) -> None:
    first, second = start(tmp_path / "cache"), start(tmp_path / "cache")
    assert not is_cached(first) and is_cached(second)
    told = f"the plan is from the cache, {tmp_path / 'cache'}"
    assert second.explain().splitlines()[1].startswith(told)
    assert told not in first.explain()
    assert str(second.execution_plan) == str(first.execution_plan)
    assert to_text(second.program) == to_text(first.program)
    assert second.passes == first.passes
    assert second.verify() == first.verify()
    first.dump(tmp_path / "first")
    second.dump(tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == names
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_the_graphs_are_those_of_the_plan_even_if_settings_have_changed(tmp_path: Path) -> None:
    expected = to_text(start(tmp_path).program)
    compiled = start(tmp_path)
    compiled.optimizer.param_groups[0]["weight_decay"] = 0.5
    compiled.model.eval()
    assert to_text(compiled.program) == expected
    assert compiled.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert not compiled.model.training


def test_other_shapes_and_calls_have_entries_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(compiled: Compiled) -> list[Tensor]:
        short = tuple(tensor[:4] for tensor in BATCH)
        return [compiled.step(*BATCH), compiled.step(*short), compiled(BATCH[0]), compiled.evaluate(*short)]

    expected = run(start(tmp_path))
    mixed = start(tmp_path)
    assert torch.equal(mixed(BATCH[0][:2]), start(False)(BATCH[0][:2]))  # cached, then compiled beside it
    refuse_compiling(monkeypatch)
    assert all(map(torch.equal, run(start(tmp_path)), expected))


class Scaled(nn.Module):
    """A model with a constant and an attribute that its code reads."""

    def __init__(self, factor: float, table: float) -> None:
        super().__init__()
        self.linear, self.factor, self.table = nn.Linear(4, 3), factor, torch.full((3,), table)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) * self.factor + self.table
        return result


@functools.cache
def adam_with(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, lr=1e-2, **options)


@pytest.mark.parametrize(
    "more",
    [
        {"plan": "zero2+pp2:microbatches=2"},
        {"plan": "zero3+pp2:microbatches=4"},
        {"world_size": 2},
        {"max_grad_norm": 1.0},
        {"loss_fn": F.l1_loss},
        {"optimizer": adam_with(weight_decay=0.5)},
        {"optimizer": functools.partial(torch.optim.Adam, lr=1e-2)},
        {"optimizer": None},
        {"debug_nan": True},
        {"example_inputs": tuple(tensor[:4] for tensor in BATCH)},
        {"model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))},
        {"model": nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))},
        {"model": Scaled(1.0, 1.0)},
    ],
    ids=",".join,
)
def test_what_makes_another_plan_is_compiled(more: dict[str, Any], filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    assert is_cached(start(tmp_path))
    assert not is_cached(start(tmp_path, **more))
    assert is_cached(start(tmp_path, **more))


class Rebinds(nn.Module):
    """A model that replaces a buffer, of which its backward needs the old value."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        y = h * self.mean
        self.mean = self.mean * 0.5 + h.detach().mean(0)
        return y


@pytest.mark.parametrize("plan", ["dp2", "dp2+bf16"])
def test_a_model_that_replaces_a_buffer_is_cached(plan: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Rebinds()
    first, second = (start(tmp_path, plan=plan, model=copy.deepcopy(made)) for _ in range(2))
    assert not is_cached(first) and is_cached(second)
    assert all(map(torch.equal, training(first, BATCH, {}), training(second, BATCH, {})))


def test_values_that_the_models_code_reads_count(tmp_path: Path) -> None:
    plan = {"plan": "dp2", "model": Scaled(1.0, 1.0)}
    start(tmp_path, **plan)
    assert is_cached(start(tmp_path, **(plan | {"model": Scaled(1.0, 1.0)})))
    assert not is_cached(start(tmp_path, **(plan | {"model": Scaled(2.0, 1.0)})))
    assert not is_cached(start(tmp_path, **(plan | {"model": Scaled(1.0, 2.0)})))


def test_values_that_a_plan_does_not_depend_on_do_not_count(tmp_path: Path) -> None:
    start(tmp_path)
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    faster = functools.partial(torch.optim.AdamW, lr=0.5)
    assert is_cached(start(tmp_path, model=other, optimizer=faster, seed=7))


class Nothing:
    """A pass of somebody's."""

    name: ClassVar[str] = "nothing"
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> Program:
        return program


class Signs(torch.optim.SGD):
    """An optimizer of somebody's."""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"passes": [Nothing()]}, "what pass 'nothing' does"),
        ({"optimizer": functools.partial(Signs, lr=1e-2)}, "what optimizer test_plan_cache.Signs does"),
    ],
)
def test_what_only_code_can_tell_is_not_cached(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    for _ in range(2):
        compiled = start(tmp_path / "cache", **more)
        assert compiled.explain().splitlines()[1].startswith("the plan is compiled at every start: ")
        assert said.rpartition(".")[2] in compiled.explain().splitlines()[1]
    compiled.evaluate(*BATCH)
    assert not (tmp_path / "cache").exists()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "graphshard"]


def changed(path: Path) -> None:
    path.write_text(path.read_text().replace("o", "0", 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["stage0.py", "kernels.py", "plan.json", "files.json"])
@pytest.mark.parametrize("harm", [changed, cut, Path.unlink])
def test_an_entry_that_is_not_whole_is_compiled_anew(
    name: str, harm: Callable[[Path], None], filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (entry,) = tmp_path.iterdir()
    before = (entry / name).read_bytes()
    harm(entry / name)
    with caplog.at_level(logging.WARNING, "graphshard"):
        assert not is_cached(start(tmp_path))
    (said,) = warnings(caplog)
    assert said.startswith(f"graphshard: {entry} is no whole plan (") and said.endswith("); compiling anew")
    assert (entry / name).read_bytes() == before
    assert is_cached(start(tmp_path))


@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_folder_in_the_place_of_an_entry_is_replaced(
    link: bool, filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (entry,) = tmp_path.iterdir()
    shutil.rmtree(entry)
    if link:
        entry.symlink_to("nowhere")
    else:
        entry.write_text("no entry")
    with caplog.at_level(logging.WARNING, "graphshard"):
        assert not is_cached(start(tmp_path))
        caplog.clear()
        assert is_cached(start(tmp_path))
    assert not warnings(caplog)


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path)
    tmp_path.chmod(0o777)
    with caplog.at_level(logging.WARNING, "graphshard"):
        assert not is_cached(start(tmp_path))
    assert set(warnings(caplog)) == {f"graphshard: {tmp_path} is not used: others can write to it; chmod 700 it"}


def test_a_new_folder_is_its_owners_alone(tmp_path: Path) -> None:
    start(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "graphshard"):
        start(tmp_path / "file" / "cache").step(*BATCH)
    (said,) = warnings(caplog)
    assert said.startswith("graphshard: the plan is not kept for the next start: ")


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    plan = start(False).execution_plan
    PlanCache(tmp_path).write("first", plan)
    size = sum(file.stat().st_size for file in (tmp_path / "first").iterdir())
    cache = PlanCache(tmp_path, most_bytes=int(2.5 * size))
    cache.write("second", plan)
    for age, name in enumerate(("second", "first")):
        os.utime(tmp_path / name, (age, age))
    assert cache.read("second") is not None
    cache.write("third", plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["second", "third"]


def test_what_a_killed_process_left_is_removed_in_time(tmp_path: Path) -> None:
    for name, age in ((".old.tmp", 7200), (".new.tmp", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    PlanCache(tmp_path).write("key", start(False).execution_plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.tmp", "key"]
