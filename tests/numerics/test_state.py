"""Parameters and optimizer state move between plans, and between graphshard and eager PyTorch, without loss."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import graphshard
from graphshard.errors import (
    Closed,
    ExecutorNone,
    OptimizerStateMismatch,
    OptimizerStateMissing,
    OptimizerStateTogether,
    StateMismatch,
)
from numerics.cases import OPTIMIZERS, maker, sgd
from numerics.reference import Eager, Make, assert_close, assert_same_training, check_parity, rolled

adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
SHARDED, REPLICATED = "zero3+pp2:microbatches=2", "dp2+accum2"  # the same split of the batch


def start(make: Make, plan: str, optimizer: str = "adamw") -> tuple[graphshard.Compiled, Eager]:
    """The model of ``make`` in float64, compiled by ``plan``, and its eager twin."""
    model, _, _, loss_fn = make()
    model.double()
    twin = copy.deepcopy(model)
    compiled = graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=OPTIMIZERS[optimizer](model), executor="local"
    )
    return compiled, Eager(twin, loss_fn, OPTIMIZERS[optimizer], compiled.dp_size, compiled.microbatches)


def test_a_sharded_state_dict_loads_into_the_model_and_under_another_plan() -> None:
    make = maker("gpt", SHARDED)
    args = make()[1]
    sharded, _ = start(make, SHARDED)
    sharded.step(*args)
    state = sharded.state_dict()
    plain, _, _, loss_fn = make()
    plain.double().load_state_dict(state, strict=True)
    replicated, _ = start(make, REPLICATED)
    replicated.trace(*args)
    replicated.load_state_dict(state)
    for name, value in replicated.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert loss_fn is not None
    plain.eval()
    expected = torch.stack([loss_fn(plain(x), y).detach() for x, y in zip(*(a.split(2) for a in args), strict=True)])
    assert_close("loss", replicated.evaluate(*args), expected.mean(), torch.float64)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
@pytest.mark.parametrize(("before", "after"), [(SHARDED, REPLICATED), (REPLICATED, SHARDED)])
def test_training_continues_under_another_plan(before: str, after: str, optimizer: str) -> None:
    make = maker("mlp", before)
    args = [a.double() if a.is_floating_point() else a for a in make()[1]]
    first, eager = start(make, before, optimizer)
    for index in range(2):
        eager.step(rolled(args, index), {})
        first.step(*rolled(args, index))
    second, _ = start(make, after, optimizer)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for index in range(2, 4):
        theirs = eager.step(rolled(args, index), {})
        assert_close("loss", second.step(*rolled(args, index)), theirs, torch.float64)
    assert_same_training(second, eager, torch.float64)


def test_training_continues_from_an_eager_checkpoint() -> None:
    make = maker("mlp", SHARDED)
    args = [a.double() if a.is_floating_point() else a for a in make()[1]]
    compiled, eager = start(make, SHARDED)
    eager.step(args, {})
    compiled.trace(*args)
    compiled.load_state_dict(eager.model.state_dict())
    compiled.optimizer.load_state_dict(eager.optimizer.state_dict())
    eager.step(rolled(args, 1), {})
    compiled.step(*rolled(args, 1))
    assert_same_training(compiled, eager, torch.float64)


@pytest.mark.parametrize("plan", ["zero3+pp2:microbatches=2", "zero1:size=2+fp16:init_scale=256,growth_interval=2"])
def test_what_is_loaded_before_anything_was_traced_is_there_at_the_first_step(plan: str) -> None:
    model, args, _, loss_fn = maker("mlp", plan)()

    def fresh(lr: float) -> graphshard.Compiled:
        optimizer = functools.partial(torch.optim.AdamW, lr=lr)
        own = copy.deepcopy(model)
        return graphshard.compile(own, plan, loss_fn=loss_fn, optimizer=optimizer, executor="local", world_size=world)

    world = 4 if "pp2" in plan else 2
    trained, early, late = fresh(1e-2), fresh(1e-3), fresh(1e-3)
    for _ in range(3):
        trained.step(*args)
    state, update = trained.state_dict(), trained.optimizer.state_dict()
    late.trace(*args)
    late.load_state_dict(state)
    late.optimizer.load_state_dict(update)
    with pytest.raises(StateMismatch, match="given nothing"):
        early.load_state_dict({})
    with pytest.raises(OptimizerStateMismatch):
        early.optimizer.load_state_dict({})
    given, moments = copy.deepcopy(state), copy.deepcopy(update)
    early.load_state_dict({name: torch.zeros_like(value) for name, value in given.items()})
    early.load_state_dict(given)
    early.optimizer.load_state_dict(moments)
    for value in [*given.values(), *(v for found in moments["state"].values() for v in found.values())]:
        value.zero_()  # what was given is the caller's
    assert early.optimizer.param_groups[0]["lr"] == 1e-2, "for a scheduler that is made before the first step"
    for compiled in (early, late):
        compiled.step(*args)
    assert all(torch.equal(value, late.state_dict()[name]) for name, value in early.state_dict().items())
    ours, theirs = early.optimizer.state_dict(), late.optimizer.state_dict()
    assert ours["steps"] == theirs["steps"] == 4 and ours.get("scaler") == theirs.get("scaler")
    for name, found in theirs["state"].items():
        assert all(torch.equal(ours["state"][name][key], value) for key, value in found.items())
    early.load_state_dict(state)  # and once it has begun
    assert all(torch.equal(value, state[name]) for name, value in early.state_dict().items())


def test_state_that_a_step_cannot_go_on_from_is_refused_by_the_first_step_and_may_be_replaced() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    made = [nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "optimizer": adamw, "executor": "local"}
    first, compiled = (graphshard.compile(model, "zero3:size=2", **options) for model in made)
    first.step(x, y)
    whole = first.optimizer.state_dict()
    compiled.optimizer.load_state_dict(whole | {"state": dict(list(whole["state"].items())[1:])})
    with pytest.raises(OptimizerStateMissing):
        compiled.step(x, y)
    compiled.load_state_dict(first.state_dict())
    compiled.optimizer.load_state_dict(whole)
    assert torch.equal(compiled.step(x, y), first.step(x, y))
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in compiled.state_dict().items())


def test_a_learning_rate_that_is_a_tensor_is_not_shared_with_what_was_loaded() -> None:
    model, (x, y) = nn.Linear(6, 3), (torch.randn(8, 6), torch.randn(8, 3))
    make = functools.partial(torch.optim.AdamW, lr=torch.tensor(0.5))
    compiled = graphshard.compile(model, "dp2", loss_fn=F.mse_loss, optimizer=make, executor="local")
    given = make(model.parameters()).state_dict()
    compiled.optimizer.load_state_dict(given)
    scheduler = StepLR(compiled.optimizer, 1)
    compiled.step(x, y)
    scheduler.step()  # fills the tensor
    assert compiled.optimizer.lrs() == [pytest.approx(0.05)]
    assert given["param_groups"][0]["lr"].item() == 0.5


def test_what_is_closed_holds_nothing_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(8, 6), torch.randn(8, 3)
    plan = f"zero3:size=2+offload:optimizer=nvme,path={tmp_path}"
    before = _descriptors()
    with graphshard.compile(model, plan, loss_fn=F.mse_loss, optimizer=adamw, executor="local") as compiled:
        compiled.step(x, y)
        executor = weakref.ref(compiled._made_executor())
        assert _descriptors() > before, "its file"
    assert _descriptors() == before
    gc.collect()
    assert executor() is None, "and with it what it stored"
    for ask in (lambda: compiled.step(x, y), lambda: compiled(x), compiled.state_dict, compiled.optimizer.state_dict):
        with pytest.raises(Closed, match="compile the model again"):
            ask()
    with pytest.raises(Closed):
        compiled.load_state_dict(model.state_dict())
    compiled.close()
    assert "zero" in compiled.explain()


def _descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_an_account_takes_no_state() -> None:
    model = nn.Linear(4, 4)
    compiled = graphshard.compile(model, "zero3:size=2", loss_fn=F.mse_loss, optimizer=adamw, executor="none")
    with pytest.raises(ExecutorNone):
        compiled.load_state_dict(model.state_dict())
    with pytest.raises(ExecutorNone):
        compiled.optimizer.load_state_dict(adamw(model.parameters()).state_dict())


def test_optimizer_state_of_parameters_that_were_frozen_says_what_would_be_right() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(8, 6), torch.randn(8, 3)
    twin, make = copy.deepcopy(model), functools.partial(torch.optim.AdamW, lr=0.1)
    compiled = graphshard.compile(
        model, "zero3:size=2", loss_fn=F.mse_loss, optimizer=make, example_inputs=(x, y), executor="local"
    )
    eager = make(twin.parameters())
    for frozen, error, message in (
        (True, OptimizerStateMissing, r"given nothing; expected a tensor .*; give it for all of them, or begin with"),
        (False, OptimizerStateTogether, r"step of .*: given different values; expected one value, .*, or begin with"),
    ):
        twin[0].bias.requires_grad_(not frozen)
        F.mse_loss(twin(x), y).backward()
        eager.step()
        with pytest.raises(error, match=message):
            compiled.optimizer.load_state_dict(eager.state_dict())
    assert compiled.optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stepped_optimizer_brings_its_state_along(optimizer: str) -> None:
    model, args, _, loss_fn = maker("mlp", SHARDED)()
    model.double()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    eager = Eager(model, loss_fn, OPTIMIZERS[optimizer], 2, 2)
    eager.step(args, {})
    ours = copy.deepcopy(model)
    made = OPTIMIZERS[optimizer](ours)
    made.load_state_dict(copy.deepcopy(eager.optimizer.state_dict()))
    compiled = graphshard.compile(ours, SHARDED, loss_fn=loss_fn, optimizer=made, executor="local")
    eager.step(rolled(args, 1), {})
    compiled.step(*rolled(args, 1))
    assert_same_training(compiled, eager, torch.float64)


def test_a_scheduler_drives_the_learning_rates() -> None:
    make = maker("mlp", SHARDED)
    args = [a.double() if a.is_floating_point() else a for a in make()[1]]
    compiled, eager = start(make, SHARDED)
    ours, theirs = StepLR(compiled.optimizer, 1, gamma=0.5), StepLR(eager.optimizer, 1, gamma=0.5)
    for index in range(3):
        eager.step(rolled(args, index), {})
        compiled.step(*rolled(args, index))
        ours.step()
        theirs.step()
    assert ours.get_last_lr() == theirs.get_last_lr()
    assert_same_training(compiled, eager, torch.float64)


@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_new_shapes_are_traced_once_and_train_the_same_parameters(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make = maker(name, SHARDED)
    args = [a.double() if a.is_floating_point() else a for a in make()[1]]
    shorter = [a[:, :5] for a in args] if name == "gpt" else [a[:4] for a in args]
    compiled, eager = start(make, SHARDED)
    with caplog.at_level(logging.WARNING, "graphshard"):
        for batch in (args, shorter, args, shorter):
            theirs = eager.step(batch, {})
            assert_close("loss", compiled.step(*batch), theirs, torch.float64)
    notices = [r.getMessage() for r in caplog.records if "tracing" in r.getMessage()]
    assert len(notices) == 1, notices
    assert_same_training(compiled, eager, torch.float64)


def test_evaluate_neither_trains_nor_moves_statistics() -> None:
    make = maker("convnet", SHARDED)
    args = [a.double() if a.is_floating_point() else a for a in make()[1]]
    compiled, eager = start(make, SHARDED)
    eager.step(args, {})
    compiled.step(*args)
    before = compiled.state_dict()
    loss = compiled.evaluate(*args)
    after = compiled.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    eager.model.eval()
    assert eager.loss_fn is not None
    losses: list[Tensor] = []
    for x, y in zip(*(a.split(2) for a in args), strict=True):
        losses.append(eager.loss_fn(eager.model(x), y).detach())
    assert_close("loss", loss, torch.stack(losses).mean(), torch.float64)


class Counting(nn.Module):
    """One buffer under two names, tied weights, and a buffer that state dicts leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))  # Module.double() would untie it
        self.a.register_buffer("again", self.count)
        self.scale: Tensor
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        result: Tensor = self.b(torch.tanh(self.a(x))) * self.scale * self.count
        return result


def counting() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, object], Callable[..., Tensor] | None]:
    torch.manual_seed(0)
    return Counting(), (torch.randn(8, 4), torch.randn(8, 4)), {}, F.mse_loss


def test_tied_names_have_one_value() -> None:
    args = [a.double() for a in counting()[1]]
    compiled, _ = start(counting, SHARDED)
    compiled.step(*args)
    state = compiled.state_dict()
    assert "scale" not in state
    assert state["count"].item() == state["a.again"].item() == compiled.microbatches
    compiled.step(*args)
    del state["b.weight"], state["a.again"]
    compiled.load_state_dict(state)
    fresh, _ = start(counting, SHARDED)
    fresh.trace(*args)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["a.again"].item() == compiled.microbatches
    assert compiled.evaluate(*args) == fresh.evaluate(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.bias": None}, r"a.bias: given nothing; expected a tensor of shape \[4\]"),
        ({"count": None, "a.again": None}, r"count: given nothing; expected a tensor of shape \[\]"),
        ({"a.bias": torch.zeros(5)}, r"a.bias: given shape \[5\]; expected shape \[4\]"),
        ({"count": torch.zeros(2)}, r"count: given shape \[2\]; expected shape \[\]"),
        ({"a.bais": torch.zeros(4)}, r"a.bais: given a tensor; .* did you mean 'a.bias'\?"),
        ({"a.bias": [0.0] * 4}, r"a.bias: given a value of type list; expected a tensor of shape \[4\]"),
        ({"a.bias": torch.zeros(4, device="meta")}, "a.bias: given a tensor on the meta device; .* that has values"),
        ({"a.bias": torch.zeros(4, dtype=torch.complex64)}, "a.bias: given values of torch.complex64; expected values"),
        ({"a.bias": torch.zeros(4).to_sparse()}, "a.bias: given a tensor of layout torch.sparse_coo"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    compiled, _ = start(counting, SHARDED)
    compiled.trace(*(a.double() for a in counting()[1]))
    before = compiled.state_dict()
    changed = {name: value + 1 for name, value in before.items()} | change
    with pytest.raises(StateMismatch, match=message):
        compiled.load_state_dict({name: value for name, value in changed.items() if value is not None})
    assert all(torch.equal(before[name], value) for name, value in compiled.state_dict().items())
    with pytest.raises(StateMismatch, match="the state dict: given None; expected a dict of tensors"):
        compiled.load_state_dict(None)  # type: ignore[arg-type]


def test_without_strict_what_is_missing_stays_and_what_is_unexpected_is_listed() -> None:
    compiled, _ = start(counting, SHARDED)
    compiled.trace(*(a.double() for a in counting()[1]))
    before = compiled.state_dict()
    given = {"a.bias": before["a.bias"] + 1, "other": torch.zeros(1)}
    keys = compiled.load_state_dict(given, strict=False)
    missing, unexpected = keys
    assert missing == ["count", "a.weight", "a.again", "b.weight", "b.bias"] and unexpected == ["other"]
    assert keys == counting()[0].double().load_state_dict(given, strict=False)
    after = compiled.state_dict()
    assert all(torch.equal(after[name], before[name] + (name == "a.bias")) for name in before)
    assert compiled.load_state_dict(before, strict=True) == ([], [])


class Extra(nn.Module):
    """Has extra state, and hooks that rename a parameter and add an entry."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 4), 0
        self.register_state_dict_post_hook(self._add)  # type: ignore[no-untyped-call]

    @staticmethod
    def _add(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        state[f"{prefix}note"] = torch.ones(1)
        state[f"{prefix}renamed"] = state.pop(f"{prefix}inner.bias")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def extra() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, object], Callable[..., Tensor] | None]:
    torch.manual_seed(0)
    return nn.Sequential(Extra()), (torch.randn(8, 4), torch.randn(8, 4)), {}, F.mse_loss


def test_what_is_neither_parameter_nor_buffer_is_of_the_module_itself() -> None:
    args = [a.double() for a in extra()[1]]
    compiled, _ = start(extra, SHARDED)
    compiled.step(*args)
    module: Any = compiled.model[0]  # type: ignore[index]
    module.seen = 3
    saved = compiled.state_dict()
    assert list(saved) == list(compiled.model.state_dict())
    assert saved["0._extra_state"] == {"seen": 3} and saved["0.note"].item() == 1
    compiled.step(*args)
    assert not torch.equal(compiled.state_dict()["0.renamed"], saved["0.renamed"])
    with pytest.raises(StateMismatch, match=r"0.inner.weight: given shape \[5\]"):
        compiled.load_state_dict(saved | {"0._extra_state": {"seen": 7}, "0.inner.weight": torch.zeros(5)})
    with pytest.raises(StateMismatch, match=r"0._extra_state: given nothing; expected a value"):
        compiled.load_state_dict({name: value for name, value in saved.items() if name != "0._extra_state"})
    assert module.seen == 3
    compiled.load_state_dict(saved | {"0._extra_state": {"seen": 7}})
    assert module.seen == 7 and torch.equal(compiled.state_dict()["0.renamed"], saved["0.renamed"])


def test_a_resumed_run_draws_the_numbers_of_the_uninterrupted_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    x, y = torch.randn(8, 6), torch.randn(8, 3)

    def compiled(plan: str) -> graphshard.Compiled:
        optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        given = copy.deepcopy(model)
        return graphshard.compile(
            given, plan, loss_fn=F.mse_loss, optimizer=optimizer, example_inputs=(x, y), executor="local"
        )

    whole, resumed = compiled("dp1"), compiled("zero1:size=2")
    for _ in range(2):
        whole.step(x, y)
    saved = whole.optimizer.state_dict()
    assert saved["steps"] == 2
    resumed.load_state_dict(whole.state_dict())
    resumed.optimizer.load_state_dict(saved)
    again = compiled("dp1")
    again.load_state_dict(whole.state_dict())
    again.optimizer.load_state_dict(saved)
    losses = [whole.step(x, y).item() for _ in range(3)]
    assert [again.step(x, y).item() for _ in range(3)] == losses
    assert len({resumed.step(x, y).item() for _ in range(3)}) == 3 and resumed.optimizer.state_dict()["steps"] == 5


class Scaled(nn.Module):
    """Has a parameter without dims."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.t = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x) * self.t
        return result


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.ASGD])
@pytest.mark.parametrize("plan", ["dp1", "zero1", "zero3", "pp2", "pp2:schedule=zb-h1", "dp1+fp16:init_scale=256"])
def test_scalar_state_of_a_parameter_without_dims(plan: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """NAdam's product of momenta and ASGD's rates are one number, not a value for each element."""
    torch.manual_seed(0)
    eager, x, y = Scaled(), torch.randn(8, 4), torch.randn(8, 3)
    if "fp16" not in plan:
        eager, x, y = eager.double(), x.double(), y.double()
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "optimizer": optimizer, "executor": "local"}
    world_size = None if plan.startswith("dp1") else 2
    first, then = (graphshard.compile(copy.deepcopy(eager), plan, world_size=world_size, **options) for _ in range(2))
    used = optimizer(eager.parameters())
    for _ in range(3):
        used.zero_grad()
        F.mse_loss(eager(x), y).backward()
        used.step()
    first.step(x, y)
    state, moments = first.state_dict(), first.optimizer.state_dict()
    assert {item.shape for item in moments["state"]["t"].values()} == {torch.Size(())}
    then.trace(x, y)
    then.load_state_dict(state)
    then.optimizer.load_state_dict(moments)
    for _ in range(2):
        then.step(x, y)
    tolerance = 2e-3 if "fp16" in plan else 1e-9
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(then.state_dict()[name], value, rtol=tolerance, atol=tolerance)


class Threshold(nn.Module):
    """Its threshold is read by both layers, and has a gradient from the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.t = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x * (x > self.t))
        result: Tensor = self.b(x) * self.t
        return result


def test_scalar_state_of_a_parameter_whose_gradient_is_of_another_stage() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Threshold(), (torch.randn(8, 4), torch.randn(8, 3)), {}, F.mse_loss

    check_parity(make, "pp2:stages=b", sgd, dtype=torch.float64)


class Split(nn.Module):
    """Saves one weight in three parts, with the norm of another, and a bias in bfloat16 too; loads the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 6, bias=False), nn.Linear(6, 4)
        self.register_state_dict_post_hook(self._split)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self._join)  # type: ignore[no-untyped-call]

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        for name, part in zip("qkv", state.pop(f"{prefix}qkv.weight").chunk(3), strict=True):
            state[f"{prefix}{name}"] = part
        state[f"{prefix}norm"] = state[f"{prefix}out.weight"].norm().item()
        state[f"{prefix}half"] = state[f"{prefix}out.bias"].to(torch.bfloat16)

    @staticmethod
    def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        if f"{prefix}q" in state:
            state[f"{prefix}qkv.weight"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qkv"])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.qkv(x))
        return result


def split() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, object], Callable[..., Tensor] | None]:
    torch.manual_seed(0)
    return nn.Sequential(Split()), (torch.randn(8, 4), torch.randn(8, 4)), {}, F.mse_loss


def test_hooks_on_the_state_dict_see_the_trained_values() -> None:
    args = [a.double() for a in split()[1]]
    compiled, eager = start(split, SHARDED)
    before = dict(compiled.model.named_parameters())
    for _ in range(2):
        compiled.step(*args)
        eager.step(args, {})
    saved, expected = compiled.state_dict(), eager.model.state_dict()
    assert list(saved) == list(expected)
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    assert all(value is before[name] for name, value in compiled.model.named_parameters())
    with torch.device("meta"):
        empty = split()[0].double()
    fresh = graphshard.compile(empty, REPLICATED, loss_fn=F.mse_loss, executor="local", example_inputs=tuple(args))
    fresh.load_state_dict(saved)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(saved[k])) for k, v in fresh.state_dict().items())
    del saved["0.q"], saved["0.k"], saved["0.v"]
    with pytest.raises(StateMismatch, match=r"0\.qkv\.weight: given nothing; expected a tensor of shape \[6, 4\]"):
        fresh.load_state_dict(saved)


def test_init_that_ties_weights_is_told_what_would_be_right() -> None:
    def init(model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model[1].weight = model[0].weight  # type: ignore[index]

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compiled = graphshard.compile(model, "dp2", loss_fn=F.mse_loss, optimizer=adamw, executor="local", init=init)
    for _ in range(2):
        with pytest.raises(StateMismatch, match=r"1\.weight after init: given that of '0\.weight'; expected one"):
            compiled.step(torch.randn(8, 4), torch.randn(8, 4))


def test_init_that_leaves_a_parameter_without_values_is_told_which() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)

    def init(model: nn.Module) -> None:
        model.weight = nn.Parameter(torch.empty(4, 4, device="meta"))

    compiled = graphshard.compile(model, "dp2", loss_fn=F.mse_loss, optimizer=adamw, executor="local", init=init)
    with pytest.raises(StateMismatch, match=r"weight: given nothing; expected a tensor of shape \[4, 4\]"):
        compiled.step(torch.randn(8, 4), torch.randn(8, 4))
