"""Run an optimizer's ``step`` on one fake parameter and record the operators it calls."""

from __future__ import annotations

import inspect
import traceback
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphshard import fake
from graphshard.dataflow import is_pointwise
from graphshard.errors import OptimizerNotTraceable
from graphshard.saved.optimizer import is_torchs

aten = torch.ops.aten

COUNTER = torch.float64
"""The dtype of scalars: learning rate, step counts and whatever is computed from them, as Python computes in eager
mode. A 0-dim tensor does not promote what it is combined with; a float32 ``1 - 0.999**step`` would be wrong by 3e-5."""

StateTypes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""State key to shape and dtype."""


_KEEP_SHAPE = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.copy.default,
    aten.copy_.default,
)


def traced_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape a parameter is traced in. A 0-dim one is traced as one element: as a scalar it would be promoted by the
    learning rate and the step count, which are numbers in eager training."""
    return tuple(shape) or (1,)


@dataclass(frozen=True)
class Trace:
    """The functional graph of one parameter's update: placeholders parameter, gradient, learning rate, then state in
    the order it was given; outputs the new parameter, then ``keys``."""

    module: fx.GraphModule
    keys: tuple[str, ...]  # of the state the step leaves
    fixed: Mapping[str, object]  # state that is no number
    shape: tuple[int, ...]  # of the parameter
    asked: bool  # whether the step's code saw anything of it, which another shape may change

    @property
    def types(self) -> StateTypes:
        """Of the state the step leaves; a number is a scalar."""
        outputs: Any = self.module.graph.output_node().args[0]
        values = (item.meta["val"] if isinstance(item, fx.Node) else item for item in outputs[1:])
        return {
            key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ((), COUNTER)
            for key, value in zip(self.keys, values, strict=True)
        }

    @property
    def fits_all(self) -> bool:
        """Whether a parameter of any shape is updated by these operators: the code did not ask for the shape, and they
        are pointwise on tensors like the parameter, and scalars."""
        # One element looks like any other shape of one, and like a scalar that is stored as one.
        return not self.asked and prod(self.shape) > 1 and all(map(self._fits_all, self.module.graph.nodes))

    def _fits_all(self, node: fx.Node) -> bool:
        if node.op in ("get_attr", "output"):
            return True
        value = node.meta.get("val")
        if not (isinstance(value, Tensor) and value.dim()):
            # From scalars alone: a number made of a tensor with dims would tell its size.
            return all(not _has_dims(source) for source in node.all_input_nodes)
        like = tuple(value.shape) == self.shape
        return like and (node.op == "placeholder" or is_pointwise(node) or node.target in _KEEP_SHAPE)


@dataclass(frozen=True)
class Subject:
    """What is traced: a parameter of an optimizer's group."""

    optimizer: Optimizer
    group: int
    param: Tensor
    constructs: bool = False  # its constructor makes state

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    @property
    def options(self) -> dict[str, Any]:
        """The group's options, with one-element tensors as numbers, so that they become constants of the graph."""
        group = self.optimizer.param_groups[self.group]
        return {k: _number(v) for k, v in group.items() if k != "params"}

    @property
    def capturable_choices(self) -> list[bool | None]:
        """The values of ``capturable`` to try in turn, None for an optimizer without that option.

        Without it the operators are those of eager training; with it Adam computes 0/0 for an untouched element while a
        warm-up's learning rate is zero. It is for optimizers that branch on their step count otherwise.
        """
        return [False, True] if "capturable" in self.options else [None]


def trace_step(
    subject: Subject,
    state: StateTypes | None,
    fixed: Mapping[str, object],
    capturable: bool | None,
    default: torch.dtype,
) -> Trace:
    """The update of a parameter like the subject's; ``state`` is None for the first step, ``default`` the default
    dtype meanwhile. A step of torch.optim's own is recorded once in a process: programs for other shapes ask again.

    Raises:
        OptimizerNotTraceable: the step branches on values, keeps state where it cannot be followed, or fails.
    """
    key = _key(subject, state, fixed, capturable, default)
    if key is not None and key in _known:
        return _known[key]
    try:
        trace = _trace(subject, state, fixed, capturable, default)
    except OptimizerNotTraceable:
        raise
    except Exception as error:  # whatever the optimizer's own code raises: the message names its line
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "data-dependent" in reason:
            reason = "it decides something by the value of a tensor, or makes a Python number of it"
        raise OptimizerNotTraceable(subject.name, reason, _line(error, subject)) from error
    if key is not None:
        if len(_known) == _MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = trace
    return trace


_known: dict[Hashable, Trace] = {}
_MOST_KNOWN = 64


def _key(
    subject: Subject,
    state: StateTypes | None,
    fixed: Mapping[str, object],
    capturable: bool | None,
    default: torch.dtype,
) -> Hashable | None:
    """Equal only for what has the same trace; None where that may depend on more than can be told: an optimizer's own
    code, state that its constructor makes, options that are no plain values."""
    kind, like, options = type(subject.optimizer), subject.param, subject.options
    if not is_torchs(subject.optimizer) or subject.constructs or not all(map(_plain, options.values())):
        return None
    # As text, since 1, 1.0 and True are equal.
    spelled = sorted((name, repr(value)) for name, value in options.items() if name != "lr")
    given = None if state is None else tuple(state.items())
    of_parameter = traced_shape(like.shape), like.dtype
    return kind, kind.step, tuple(spelled), of_parameter, given, repr(fixed), capturable, default


def _trace(
    subject: Subject,
    state: StateTypes | None,
    fixed: Mapping[str, object],
    capturable: bool | None,
    default: torch.dtype,
) -> Trace:
    mode = fake.symbolic_mode()
    like = subject.param
    value = fake.tensor(mode, traced_shape(like.shape), like.dtype)
    given = [fake.tensor(mode, shape, dtype) for shape, dtype in (state or {}).values()]
    keys: list[str] = []
    left: dict[str, object] = {}

    def update(param: Tensor, gradient: Tensor, lr: Tensor, *tensors: Tensor) -> list[object]:
        keys.clear()
        left.clear()
        with questions:
            optimizer = _twin(subject, param, lr, capturable, fresh=state is None)
        if state is not None:
            optimizer.state[param] = dict(zip(state, tensors, strict=True)) | dict(fixed)
        param.grad = gradient
        with questions:
            _run(subject, optimizer)
        if any(key is not param for key in optimizer.state):
            raise OptimizerNotTraceable(subject.name, "it keeps state that belongs to no parameter")
        results: list[object] = [param]
        for key, item in optimizer.state.get(param, {}).items():
            if item is None or isinstance(item, (bool, str)):
                left[key] = item
            elif isinstance(item, (Tensor, int, float, torch.SymInt, torch.SymFloat)):
                keys.append(key)
                results.append(item)
            else:
                raise OptimizerNotTraceable(subject.name, f"its state {key!r} is a {type(item).__name__}, not a tensor")
        return results

    lr = fake.tensor(mode, (), COUNTER)
    gradient = fake.tensor(mode, traced_shape(like.shape), like.dtype)
    questions = _Questions()
    with torch.no_grad(), mode, fake.compiling(), _default_dtype(default), _SubtractAsAdd():
        module = make_fx(torch.func.functionalize(update), tracing_mode="fake")(value, gradient, lr, *given)
    return Trace(module, tuple(keys), dict(left), traced_shape(like.shape), questions.asked)


def _twin(subject: Subject, param: Tensor, lr: Tensor, capturable: bool | None, fresh: bool) -> Optimizer:
    """An optimizer like the subject's, over ``param`` alone, without state but for what its constructor makes."""
    original = subject.optimizer
    options = subject.options
    options.update({k: False for k in ("foreach", "differentiable") if k in options})
    options.update({"fused": None} if "fused" in options else {})
    options.update({"capturable": capturable} if capturable is not None else {})
    twin: Optimizer = object.__new__(type(original))
    twin.__dict__.update(original.__dict__)
    twin.defaults = original.defaults | {"differentiable": False}
    twin.state = defaultdict(dict)
    if fresh and subject.constructs:
        accepted = inspect.signature(type(original)).parameters
        built = type(original)([param], **{k: v for k, v in options.items() if k in accepted})
        twin.state.update(built.state)
    twin.param_groups = [{**options, "params": [param], "lr": lr}]
    return twin


def _run(subject: Subject, optimizer: Optimizer) -> None:
    """Call ``step`` without the profiler's and the user's hooks, and see to it that only state has changed."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise OptimizerNotTraceable(subject.name, "it has step hooks, which a compiled step does not call")
    options, attributes = dict(optimizer.param_groups[0]), dict(optimizer.__dict__)
    inspect.unwrap(type(optimizer).step, stop=lambda f: not getattr(f, "hooked", False))(optimizer)
    for key, item in optimizer.param_groups[0].items():
        if options.get(key) is not item and not (_plain(item) and options.get(key) == item):
            raise OptimizerNotTraceable(subject.name, f"it changes {key!r} of its parameter group, which is not state")
    for key, item in optimizer.__dict__.items():
        if attributes.get(key) is not item and not (_plain(item) and attributes.get(key) == item):
            raise OptimizerNotTraceable(subject.name, f"it changes its attribute {key!r}, which is not state")


class _Questions(TorchFunctionMode):
    """Notices when Python code learns anything of a tensor that depends on its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) and result is not None and _name(func) not in _SAME_FOR_ALL_SHAPES:
            given = tree_leaves((args, kwargs))
            self.asked |= any(isinstance(value, Tensor) and value.dim() > 0 for value in given)
        return result


_SAME_FOR_ALL_SHAPES = (
    "dtype",
    "device",
    "layout",
    "requires_grad",
    "is_leaf",
    "is_sparse",
    "is_complex",
    "is_floating_point",
)


def _name(func: Any) -> str:
    """Of a function, or of the attribute that it reads."""
    getter = func.__name__ == "__get__"
    return str(func.__self__.__name__ if getter else func.__name__)


class _SubtractAsAdd(TorchFunctionMode):
    """``sub(x, y, alpha=a)`` as ``add(x, y, alpha=-a)``: the fake kernel of ``sub`` branches on the value of alpha."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("sub", "sub_", "subtract", "subtract_") and isinstance(
            kwargs.get("alpha"), (Tensor, torch.SymFloat)
        ):
            add = torch.Tensor.add_ if name.endswith("_") else torch.Tensor.add
            return add(*args, **(kwargs | {"alpha": -kwargs["alpha"]}))
        return func(*args, **kwargs)


def _has_dims(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0


def _plain(item: object) -> bool:
    return isinstance(item, (bool, int, float, str, tuple, type(None)))


def _number(item: Any) -> Any:
    if isinstance(item, Tensor) and item.numel() == 1:
        return item.item()
    return tuple(map(_number, item)) if type(item) in (tuple, list) else item


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch.optim makes its scalar state in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _line(error: Exception, subject: Subject) -> str:
    """Where in the optimizer's own file ``error`` was raised."""
    file = inspect.unwrap(type(subject.optimizer).step).__code__.co_filename
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f"{file}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
