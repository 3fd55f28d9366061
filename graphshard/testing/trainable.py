"""A whole training program from a forward: captured as ``graphshard.compile`` captures a model.

The backward is autograd's and the update the optimizer's own, so that a test's program is right by construction and
looks like those that passes meet. Writing gradients by hand is for tests of odd graphs: builder.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphshard.mesh import Mesh
from graphshard.program import Program
from graphshard.trace import LossFn, capture, parameter_names
from graphshard.update import add_update, make_optimizer

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]

_SGD: Factory = functools.partial(torch.optim.SGD, lr=0.1)


def trainable(
    forward: nn.Module | Callable[..., Tensor],
    *batch: Tensor | Sequence[int],
    params: Mapping[str, Sequence[int]] | None = None,
    loss_fn: LossFn | None = None,
    optimizer: Factory | None = _SGD,
    mesh: str = "",
    microbatches: int = 1,
) -> Program:
    """The captured program of a training step: loss, gradients summed over micro-batches, an update of every parameter.

    ::

        trainable(lambda p, x: (x @ p["a"]).tanh().mean(), [2, 4], params={"a": [4, 4]}, mesh="dp=2", microbatches=2)
        trainable(nn.Linear(4, 4), [2, 4], [2, 4], loss_fn=nn.functional.mse_loss, mesh="pp=2 dp=2")

    Args:
        forward: a model; or a function of the parameters, a dict by name, and the batch, that returns the loss.
        batch: one micro-batch: tensors, of which only shapes and dtypes count, or shapes of float32 tensors.
        params: for a function: name to shape, float32.
        loss_fn: ``loss_fn(model(x), *targets)``; None: ``forward`` returns the loss.
        optimizer: a factory; None: no update, the step returns the mean gradients.

    Raises:
        GraphshardError: the forward cannot be captured; see graphshard.trace.capture.
    """
    model = forward if isinstance(forward, nn.Module) else _Function(forward, params or {})
    made = None if optimizer is None else make_optimizer(model, optimizer)
    names = parameter_names(model)
    inputs = tuple(given if isinstance(given, Tensor) else torch.empty(*given, device="meta") for given in batch)
    program = capture(model, loss_fn, inputs, {}, mode="train", microbatches=microbatches).program
    program.mesh = Mesh.parse(mesh)
    add_update(program, made, names, None)
    return program


class _Function(nn.Module):
    """A function of parameters and a batch as a model; a dotted name makes modules on its way, as a model has them."""

    def __init__(self, function: Callable[..., Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            path, _, leaf = name.rpartition(".")
            owner: Any = self
            for part in filter(None, path.split(".")):
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(leaf, nn.Parameter(torch.empty(*shape, device="meta")))

    def forward(self, *batch: Tensor) -> Tensor:
        return self.function(dict(self.named_parameters()), *batch)
