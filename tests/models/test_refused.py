"""What cannot be captured is refused with the line of the model, and nothing is left behind."""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import random
import threading
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphshard import errors
from graphshard.trace import capture, describe_params, input_signature


class Model(nn.Module):
    """A linear layer, then ``after(self, y)``."""

    def __init__(self, after: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.linear(x))


def item(_: Model, y: Tensor) -> Any:
    return y * y.max().item()


def branch(_: Model, y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def to_list(_: Model, y: Tensor) -> Any:
    return y * y.tolist()[0][0]


def to_numpy(_: Model, y: Tensor) -> Tensor:
    return y * float(y.detach().numpy()[0, 0])


def select(_: Model, y: Tensor) -> Tensor:
    return y[y > 0]


def unique(_: Model, y: Tensor) -> Any:
    return torch.unique(y)


def conditional(_: Model, y: Tensor) -> Tensor:
    result: Tensor = torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))
    return result


def random_relu(_: Model, y: Tensor) -> Tensor:
    return F.rrelu(y, training=True)


def own_generator(_: Model, y: Tensor) -> Tensor:
    return y * torch.rand(6, generator=torch.Generator())


def mismatch(_: Model, y: Tensor) -> Tensor:
    return y @ torch.ones(3, 3)


def written(model: Model, y: Tensor) -> Tensor:
    with torch.no_grad():
        model.linear.weight.mul_(0.5)
    return y


HIDDEN = nn.Linear(6, 6)


def elsewhere(model: Model, y: Tensor) -> Tensor:
    result: Tensor = y @ model.weights[0]  # type: ignore[index]
    return result


def assigned_rows(_: Model, y: Tensor) -> Tensor:
    y.clone()[y > 0] = y.flatten()[:5]
    return y


def assigned_by_two_masks(_: Model, y: Tensor) -> Tensor:
    y.clone()[y[:, 0] > 0, y[0] > 0] = y.sum()
    return y


def asserted(_: Model, y: Tensor) -> Tensor:
    assert (y < 9).all()
    return y


COUNTER = torch.zeros(6)


def counts(_: Model, y: Tensor) -> Tensor:
    COUNTER.add_(1)
    return y * COUNTER


def counts_in_a_view(_: Model, y: Tensor) -> Tensor:
    COUNTER[:2].add_(1)
    return y * COUNTER


def assigned(_: Model, y: Tensor) -> Tensor:
    y.data = torch.zeros(4, 6)
    return y


def draws(_: Model, y: Tensor) -> Tensor:
    return torch.mul(y, random.uniform(1, 2))


def draws_in_numpy(_: Model, y: Tensor) -> Tensor:
    return y * torch.from_numpy(np.random.permutation(6))


def expanded_and_written(_: Model, y: Tensor) -> Tensor:
    y[:, :1].expand(4, 6).add_(1)
    return y


def unfolded_and_written(_: Model, y: Tensor) -> Tensor:
    y.unfold(1, 3, 1).mul_(2)
    return y


def strided_and_written(_: Model, y: Tensor) -> Tensor:
    y.sin().as_strided((3, 3), (2, 1)).mul_(2)
    return y


def diagonal_of_a_view(_: Model, y: Tensor) -> Tensor:
    return y[:3].fill_diagonal_(0.0).sum() + y


def sparse(_: Model, y: Tensor) -> Any:
    return torch.sparse.mm(torch.eye(4).to_sparse(), y)


IDENTITY = torch.eye(4).to_sparse()


def sparse_constant(_: Model, y: Tensor) -> Any:
    return torch.sparse.mm(IDENTITY, y)


BY_LINE = [
    (sparse_constant, errors.UncapturableOperator, "IDENTITY, y); make it a dense one"),
    (sparse, errors.UncapturableOperator, "to_sparse(), y); it makes a sparse tensor"),
    (draws, errors.RandomOutsideTorch, "random.uniform(1, 2)"),
    (draws_in_numpy, errors.RandomOutsideTorch, "np.random.permutation(6)"),
    (expanded_and_written, errors.UncapturableOperator, "expand(4, 6).add_(1); elements of what it writes to"),
    (unfolded_and_written, errors.UncapturableOperator, "mul_(2); elements of what it writes to"),
    (strided_and_written, errors.UncapturableOperator, "mul_(2); elements of what it writes to"),
    (diagonal_of_a_view, errors.UncapturableOperator, "write x.diagonal().fill_(value)"),
    (assigned, errors.UncapturableOperator, "y.data = torch.zeros(4, 6)"),
    (item, errors.NeedsTensorValue, "y.max().item()"),
    (branch, errors.NeedsTensorValue, "if y.sum() > 0"),
    (to_list, errors.NeedsTensorValue, "y.tolist()"),
    (to_numpy, errors.NeedsTensorValue, ".numpy()"),
    (select, errors.ShapeNeedsValue, "y[y > 0]"),
    (unique, errors.ShapeNeedsValue, "torch.unique(y)"),
    (asserted, errors.NeedsTensorValue, "assert (y < 9).all()"),
    (conditional, errors.UncapturableOperator, "torch.cond("),
    (random_relu, errors.UnknownRandomOperator, "F.rrelu("),
    (own_generator, errors.UnknownRandomOperator, "torch.rand(6"),
    (mismatch, errors.ModelFailed, "torch.ones(3, 3)"),
    (counts, errors.UncapturableOperator, "COUNTER.add_(1)"),
    (counts_in_a_view, errors.UncapturableOperator, "COUNTER[:2].add_(1)"),
]


@pytest.mark.parametrize("mode", ["train", "call"])
@pytest.mark.parametrize(("after", "kind", "code"), BY_LINE, ids=[after.__name__ for after, _, _ in BY_LINE])
def test_the_line_is_named(after: Any, kind: type[Exception], code: str, mode: Any) -> None:
    model = Model(after)
    weight = model.linear.weight
    generators = random.getstate(), pickle.dumps(np.random.get_state())
    with pytest.raises(kind) as caught:
        capture(model, lambda y, t: (y - t).square().mean(), (torch.ones(4, 6), torch.ones(6)), {}, mode=mode)
    message = str(caught.value)
    assert f"test_refused.py:{after.__code__.co_firstlineno + 1}" in message
    assert code in message
    assert "\n" not in message
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == generators
    assert not COUNTER.any()
    assert model.linear.weight is weight
    assert model.training
    assert not torch.compiler.is_compiling()
    assert F.scaled_dot_product_attention.__module__ != "graphshard.trace.context"


def turned_and_written(_: Model, y: Tensor) -> Tensor:
    part = y[:, 2:5].t_()
    y.mul_(0.5)
    return y + part.sum()


def turned_and_written_itself(_: Model, y: Tensor) -> Tensor:
    y[:4, 1:5].t_().mul_(torch.arange(4.0))
    return y


def turned_and_a_view_of_it_written(_: Model, y: Tensor) -> Tensor:
    part = y[:, :1].squeeze_(1)[1:]
    y.mul_(0.5)
    return y + part.sum()


def turned_under_a_view(_: Model, y: Tensor) -> Tensor:
    part = (y := y * 2)[:, 2:5]
    y.unsqueeze_(0)
    return y[0] + part.sum()


@pytest.mark.parametrize(
    ("after", "offset", "what"),
    [
        (turned_and_written, 1, "t_ and then a write to the same memory"),
        (turned_and_written_itself, 1, "t_ and then a write to the same memory"),
        (turned_and_a_view_of_it_written, 1, "squeeze_ and then a write to the same memory"),
        (turned_under_a_view, 2, "unsqueeze_ and then a use of a view made before it"),
    ],
)
def test_dims_changed_in_place(after: Any, offset: int, what: str) -> None:
    message = str(refused(Model(after)))
    assert f"{what} in " in message
    assert f"test_refused.py:{after.__code__.co_firstlineno + offset}" in message
    assert "use the view that " in message


def test_reentrant_checkpoint() -> None:
    def after(_: Model, y: Tensor) -> Any:
        return checkpoint(torch.sin, y, use_reentrant=True)

    before = torch.utils.checkpoint.CheckpointFunction
    error = refused(Model(after))
    assert isinstance(error, errors.UncapturableOperator)
    assert "checkpoint(torch.sin, y, use_reentrant=True); say use_reentrant=False" in str(error)
    assert torch.utils.checkpoint.CheckpointFunction is before


def refused(model: nn.Module, loss_fn: Any = F.mse_loss, args: Any = None, **kwargs: Any) -> errors.GraphshardError:
    args = (torch.ones(4, 6), torch.ones(4, 6)) if args is None else args
    with pytest.raises(errors.GraphshardError) as caught:
        capture(model, loss_fn, args, kwargs, mode="train")
    return caught.value


@pytest.mark.parametrize("after", [assigned_rows, assigned_by_two_masks])
def test_a_gradient_of_as_many_elements_as_are_masked(after: Any) -> None:
    error = refused(Model(after))
    assert isinstance(error, errors.ShapeNeedsValue)
    assert f"test_refused.py:{after.__code__.co_firstlineno + 1}: y.clone()[y" in str(error)


def test_nothing_is_printed_of_a_backward_that_cannot_be_captured(recwarn: pytest.WarningsRecorder) -> None:
    class Selected(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad[ctx.saved_tensors[0] > 0].sum()

    apply: Any = Selected.apply
    assert isinstance(refused(Model(lambda m, y: apply(y))), errors.ShapeNeedsValue)
    assert not [warning for warning in recwarn if "Error detected" in str(warning.message)]


def test_parameter_written_in_forward() -> None:
    error = refused(Model(written))
    assert isinstance(error, errors.ParameterWritten)
    assert "'linear.weight'" in str(error)


def test_sparse_gradient() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    with pytest.raises(errors.UncapturableOperator, match="sparse=False"):
        capture(model, F.mse_loss, (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1)), {}, mode="train")


def test_parameter_in_a_list() -> None:
    model = Model(elsewhere)
    model.weights = [model.linear.weight]  # type: ignore[assignment]
    error = refused(model)
    assert isinstance(error, errors.ParameterOutsideModel)
    assert "'linear.weight'" in str(error)
    assert "model.weights[0]" in str(error)


def test_tensor_without_value() -> None:
    with torch.device("meta"):
        model = Model(lambda m, y: y + m.table)
        model.table = torch.ones(6)
    error = refused(model)
    assert isinstance(error, errors.TensorWithoutValue)
    assert "y + m.table" in str(error)
    assert "register_buffer" in str(error)


def test_parameters_that_share_memory() -> None:
    model = Model(lambda m, y: m.other(y))
    model.other = nn.Linear(6, 6)
    model.other.weight = nn.Parameter(model.linear.weight.detach())
    error = refused(model)
    assert isinstance(error, errors.UnsupportedParameter)
    assert "'linear.weight'" in str(error)
    assert "assign the same Parameter" in str(error)


def test_torchscript() -> None:
    error = refused(nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6))))
    assert isinstance(error, errors.UnsupportedModule)
    assert "module '1'" in str(error)


def test_wrapped_in_data_parallel() -> None:
    error = refused(nn.DataParallel(nn.Linear(6, 6)))
    assert isinstance(error, errors.UnsupportedModule)
    assert "the module inside it" in str(error)


def test_lazy_parameter() -> None:
    assert isinstance(refused(nn.LazyLinear(6)), errors.UnsupportedParameter)


def test_buffer_that_grows() -> None:
    def grow(model: Any, y: Tensor) -> Tensor:
        model.seen = torch.cat([model.seen, model.seen])
        return y

    model = Model(grow)
    model.register_buffer("seen", torch.ones(2))
    error = refused(model)
    assert isinstance(error, errors.BufferChangesType)
    assert "[2]" in str(error)
    assert "[4]" in str(error)


@pytest.mark.parametrize(
    ("after", "loss_fn", "kind"),
    [
        (lambda m, y: y, lambda y, t: y, errors.LossNotScalar),
        (lambda m, y: y, lambda y, t: y.sum() > 0, errors.LossNotScalar),
        (lambda m, y: y, lambda y, t: 1.0, errors.LossNotScalar),
        (lambda m, y: y.detach(), F.mse_loss, errors.LossWithoutGradient),
    ],
)
def test_what_is_no_loss(after: Any, loss_fn: Any, kind: type[Exception]) -> None:
    assert isinstance(refused(Model(after), loss_fn), kind)


def test_model_without_a_loss() -> None:
    error = refused(Model(lambda m, y: {"logits": y}), None, (torch.ones(4, 6),))
    assert isinstance(error, errors.NoLoss)
    assert "loss_fn" in str(error)


def test_loss_function_with_parameters() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            loss: Tensor = (self.scale * y - t).square().mean()
            return loss

    error = refused(Model(lambda m, y: y), Scaled())
    assert isinstance(error, errors.LossHasParameters)
    assert "scale" in str(error)


def test_step_without_input() -> None:
    assert isinstance(refused(Model(lambda m, y: y), F.mse_loss, ()), errors.MissingInput)


def test_numpy_input() -> None:
    error = refused(Model(lambda m, y: y), F.mse_loss, (np.ones((4, 6)), torch.ones(4, 6)))
    assert isinstance(error, errors.UnsupportedInput)
    assert "torch.from_numpy" in str(error)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(
    "batch",
    [UserDict(x=torch.ones(4, 6)), Slotted(torch.ones(4, 6)), SimpleNamespace(layers=[Slotted(torch.ones(4, 6))])],
    ids=["mapping", "slots", "nested"],
)
def test_tensors_in_an_object(batch: Any) -> None:
    error = refused(Model(lambda m, y: y), F.mse_loss, (batch, torch.ones(4, 6)))
    assert isinstance(error, errors.UnsupportedInput)
    assert f"is a {type(batch).__name__}; pass its tensors in a tuple, list or dict" in str(error)


def test_a_number_that_forward_changes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def count(model: Any, y: Tensor) -> Tensor:
        model.calls += 1
        return torch.mul(y, model.calls)

    model = Model(count)
    model.calls = 0  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, "graphshard"):
        capture(model, F.mse_loss, (torch.ones(4, 6), torch.ones(4, 6)), {}, mode="train")
    assert model.calls == 0
    assert [record.getMessage() for record in caplog.records] == [
        "graphshard: the forward pass changes calls from 0 to 1; a compiled step repeats the first"
    ]


def test_numbers_in_containers_that_forward_changes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def count(model: Any, y: Tensor) -> Tensor:
        model.linear.state["calls"] += 1
        model.linear.state["history"][0].append(7)
        model.linear.state["names"][:] = ["b"] * 5
        return torch.mul(y, model.linear.state["calls"])

    model = Model(count)
    state = model.linear.state = {"calls": 0, "history": (deque([1, 2], maxlen=2),), "names": ["a"] * 5}  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, "graphshard"):
        capture(model, F.mse_loss, (torch.ones(4, 6), torch.ones(4, 6)), {}, mode="train")
    assert state == {"calls": 0, "history": (deque([1, 2]),), "names": ["a"] * 5}
    assert [record.getMessage().split("changes ")[1].split(";")[0] for record in caplog.records] == [
        "2 more values of linear.state['names']",
        "linear.state['calls'] from 0 to 1",
        "linear.state['history'][0][0] from 1 to 2",
        "linear.state['history'][0][1] from 2 to 7",
        *(f"linear.state['names'][{i}] from 'a' to 'b'" for i in range(3)),
    ]


def python_sequence(count: int) -> list[float]:
    own = random.Random(5)
    return [own.random() for _ in range(count)]


def numpy_sequence(count: int) -> list[float]:
    own = np.random.RandomState(5)
    return [own.rand() for _ in range(count)]


@contextlib.contextmanager
def drawing(draw: Callable[[], float]) -> Iterator[list[float]]:
    """A thread that draws all the time, and what it has drawn."""
    drawn: list[float] = []
    begun, end = threading.Event(), threading.Event()

    def run() -> None:
        while not end.wait(0.0002):
            drawn.append(draw())
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    try:
        yield drawn
    finally:
        end.set()
        thread.join()


SHARED = [(random.random, random.seed, python_sequence), (np.random.rand, np.random.seed, numpy_sequence)]


@pytest.mark.parametrize(("draw", "seed", "sequence"), SHARED, ids=["python", "numpy"])
def test_draws_of_another_thread_are_none_of_the_models(draw: Any, seed: Any, sequence: Any) -> None:
    """They neither refuse the model nor begin again."""
    seed(5)
    with drawing(draw) as drawn:
        before = len(drawn)
        capture(Model(lambda _, y: y), F.mse_loss, (torch.ones(4, 6), torch.ones(4, 6)), {}, mode="train")
        assert len(drawn) > before
    assert drawn == sequence(len(drawn))


@pytest.mark.parametrize(
    ("draw", "after", "code"),
    [(random.random, draws, "random.uniform(1, 2)"), (np.random.rand, draws_in_numpy, "np.random.permutation(6)")],
    ids=["python", "numpy"],
)
def test_draws_of_the_model_beside_those_of_another_thread(draw: Any, after: Any, code: str) -> None:
    with drawing(draw):
        message = str(refused(Model(after)))
    assert f"test_refused.py:{after.__code__.co_firstlineno + 1}" in message
    assert code in message


@pytest.mark.parametrize("kind", [random.Random, np.random.RandomState, np.random.default_rng])
def test_a_generator_of_a_module_that_forward_draws_from_is_warned_of(
    kind: Callable[[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(lambda model, y: torch.mul(y, model.linear.rng.random()))
    model.linear.rng = kind(5)
    with caplog.at_level(logging.WARNING, "graphshard"):
        capture(model, F.mse_loss, (torch.ones(4, 6), torch.ones(4, 6)), {}, mode="train")
    assert model.linear.rng.random() == kind(5).random()  # type: ignore[operator, union-attr]
    assert [record.getMessage().split("; ")[0] for record in caplog.records] == [
        "graphshard: the forward pass changes the state of the generator linear.rng"
    ]


class Cell:
    """An object that a function's closure keeps, where capture does not look."""

    value: Any = None


@pytest.mark.parametrize("mode", ["train", "evaluate", "call"])
def test_a_tensor_kept_outside_the_model(mode: Any) -> None:
    cell = Cell()

    def table(_: Model, y: Tensor) -> Tensor:
        if cell.value is None:
            cell.value = torch.linspace(0, 1, 6)
        return torch.mul(y, cell.value)

    with pytest.raises(errors.TensorKeptOutside) as caught:
        capture(Model(table), F.mse_loss, (torch.ones(4, 6), torch.ones(4, 6)), {}, mode=mode)
    assert "return torch.mul(y, cell.value): it reads a tensor that an earlier forward pass made" in str(caught.value)
    assert "in a new process" in str(caught.value)


def test_a_cache_that_capture_does_not_find_is_named_and_emptied() -> None:
    @functools.lru_cache
    def table() -> Tensor:
        return torch.linspace(0, 1, 6)

    error = refused(model := Model(lambda m, y: y * table()))
    assert isinstance(error, errors.TensorKeptOutside)
    assert "in the cache of" in str(error)
    assert "test_refused.test_a_cache" in str(error)
    assert "in a new process" not in str(error)
    model(torch.ones(4, 6)).sum().backward()
    capture(model, F.mse_loss, (torch.ones(4, 6), torch.ones(4, 6)), {}, mode="train")


def test_describe_params_lists_every_parameter_once() -> None:
    model = Model(lambda m, y: y)
    model.tied = nn.Linear(6, 6, bias=False)
    model.tied.weight = model.linear.weight
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    params = describe_params(model)
    assert list(params) == [name for name, _ in model.named_parameters()]
    assert params["linear.weight"].aliases == ("tied.weight",)
    assert not params["frozen"].has_grad


def test_input_signature() -> None:
    x = torch.ones(2, 3)

    def key(*args: Any, **kwargs: Any) -> Any:
        return input_signature(args, kwargs)

    assert key(x, flag=True) == key(torch.zeros(2, 3), flag=True)
    assert hash(key({"a": [x]})) == hash(key({"a": [x]}))
    different = [key(x), key(x.double()), key(x[:1]), key((x,)), key(x, 1), key(x, 1.0), key(x, True), key(x=x)]
    assert len(set(different)) == len(different)


def without_target(y: Tensor) -> Tensor:
    return y.mean()


class Twice(torch.autograd.Function):
    """Of its gradient the backward makes one of another shape."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[0]


@pytest.mark.parametrize(
    ("model", "loss_fn", "args", "says"),
    [
        (nn.Linear(6, 6), F.cross_entropy, (torch.ones(4, 6),), "the call of loss_fn: cross_entropy() missing 1"),
        (nn.Linear(6, 6), without_target, None, "the call of loss_fn: without_target() takes 1 positional argument"),
        (nn.Linear(6, 6), F.mse_loss, (torch.ones(4, 6), "y"), "the call of loss_fn: "),
        (nn.Linear(6, 6), F.mse_loss, ("x", torch.ones(4, 6)), "the call of the model: linear(): argument 'input'"),
        (nn.Linear(6, 6), F.mse_loss, (((torch.ones(4, 6),) * 2), torch.ones(4, 6)), "the call of the model: "),
        (nn.Sequential(nn.Tanh(), nn.Linear(5, 6)), F.mse_loss, None, "the call of the model, module '1' (Linear): "),
        (Model(lambda m, y: Twice.apply(y)), F.mse_loss, None, "the backward pass, or in torch itself: "),  # type: ignore[no-untyped-call]
    ],
)  # fmt: skip
def test_without_a_line_of_the_users_it_says_what_was_running(
    model: nn.Module, loss_fn: Any, args: Any, says: str
) -> None:
    error = refused(model, loss_fn, args)
    assert isinstance(error, errors.ModelFailed)
    assert f" at {says}" in str(error)
