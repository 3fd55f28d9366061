"""What capture would see of a model, as a hash: much cheaper than the graph, and different whenever the graph is.

The model and its backward run on fake tensors exactly as capture runs them, under the same switches, and every ATen
call is written down: operator, arguments, which earlier results they are, types of the results, autograd's sequence
number, module and line. Capture is a function of these calls (AOTAutograd functionalises them and nothing else), of the
names and types of the model's tensors, and of how its output is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from graphshard import fake
from graphshard.errors import NotHashable
from graphshard.text.spelling import to_stored
from graphshard.trace.call import LossFn, Mode, Output, Request
from graphshard.trace.context import capturing
from graphshard.trace.generators import draws_refused
from graphshard.trace.joint import Step
from graphshard.trace.model import ModelTensors, tensors_of

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_LAST = 2**64 - 1  # of the nodes that write a parameter's gradient


@dataclass(frozen=True)
class Seen:
    """What a run of the model looked like."""

    digest: str
    output: Output


@fake.default_device()
def seen(
    model: nn.Module,
    loss_fn: LossFn | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mode: Mode,
    lower: torch.dtype | None = None,
) -> Seen:
    """Run ``model`` as :func:`graphshard.trace.capture` does, without making a graph.

    Raises:
        NotHashable: an operator is given something whose value cannot be written down.
        RandomOutsideTorch: see :func:`graphshard.trace.generators.draws_refused`.
        Exception: whatever the model raises; capture says it better.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    return _seen(Request(model, loss_fn, mode, tuple(leaves), spec, lower), tensors_of(model), set())


def _seen(request: Request, tensors: ModelTensors, replaced: set[str]) -> Seen:
    """``replaced``: what buffers the model is known to replace."""
    step = Step(request, tensors)
    step.replaced |= replaced
    calls = _Calls()
    calls.note("model", _described(tensors), step.batch)
    for value in (*step.parameters(), *step.buffers(), *step.batch_values):
        calls.number(value)
    with (
        draws_refused(step.run_again),
        capturing(request.model, request.train, request.lower),
        step.left_alone(),
        step.mode,
        calls,
    ):
        results = step(*step.batch_values)
        # What autograd has saved of them is overwritten now: once more, as capture runs the model twice, with copies.
        again = request.train and step.replaced != replaced
        if request.train and not again:
            trained = [p for p in step.parameters() if p.requires_grad]
            tangents = [torch.empty_like(result) for result in results]
            calls.note("backward")
            results += torch.autograd.grad(results, trained, tangents, allow_unused=True)
    if again:
        return _seen(request, tensors, step.replaced)
    calls.note("results", [None if value is None else calls.number(value) for value in results])
    calls.note(sorted(step.changes), str(step.output))
    return Seen(calls.digest.hexdigest(), step.output)


def _described(tensors: ModelTensors) -> list[object]:
    return [(held.names, held.tensor.shape, held.tensor.dtype, held.tensor.requires_grad) for held in tensors.all()]


class _Calls(TorchDispatchMode):
    """Hashes every ATen call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.digest = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no id is given twice
        self._first = torch._C._autograd._get_sequence_nr()

    def note(self, *what: object) -> None:
        """Add ``what`` to the hash."""
        self.digest.update(repr(what).encode())

    def number(self, value: Tensor) -> int:
        """That of a tensor in the order of appearance."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._kept)
            self._kept.append(value)
        return self._numbers[id(value)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # a question about the type of a tensor
            return func(*args, **(kwargs or {}))
        given = self._spelled((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        marks = torch.fx.traceback.current_meta.get("custom")
        made = pytree.tree_map_only(Tensor, self._made, result)
        self.note(str(func), given, made, self._sequence(), marks)
        return result

    def _sequence(self) -> tuple[bool, int]:
        """Whether this is the backward, and the number by which it finds its forward."""
        node = torch._C._current_autograd_node()
        number = torch._C._autograd._get_sequence_nr() if node is None else node._sequence_nr()
        return node is None, -1 if number == _LAST else number - self._first

    def _spelled(self, value: Any) -> object:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, (tuple, list)):
            return [self._spelled(item) for item in value]
        if isinstance(value, dict):
            return [(key, self._spelled(item)) for key, item in value.items()]
        raise NotHashable(type(value).__name__)

    def _made(self, value: Tensor) -> object:
        return self.number(value), tuple(value.shape), value.stride(), value.dtype

    def _tensor(self, value: Tensor) -> object:
        if id(value) in self._numbers:
            return "%", self.number(value)
        if isinstance(value, FakeTensor):
            raise NotHashable("a tensor that no operator made")
        with no_dispatch():
            content = to_stored(value).reshape(-1).view(torch.uint8).numpy().tobytes()
        return "constant", self._made(value), hashlib.sha256(content).hexdigest()
