"""Eager single-device training with a plan's split of the batch: what every plan must reproduce."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import graphshard
from graphshard.batch import split_batch

Tolerance = tuple[float, float]
Make = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any], Callable[..., Tensor] | None]]
"""Builds the model, the positional and the keyword arguments of its step, and the loss function."""
TOLERANCE: dict[torch.dtype, Tolerance] = {torch.float32: (1e-5, 1e-5), torch.float64: (1e-9, 1e-12)}


def loss_of(
    model: nn.Module, loss_fn: Callable[..., Tensor] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The loss as the public contract defines it."""
    if loss_fn is not None:
        x, *targets = args
        out = model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)
        return loss_fn(out, *targets)
    out = model(*args, **kwargs)
    if isinstance(out, Tensor):
        return out
    loss: Tensor = out["loss"] if isinstance(out, dict) else out.loss
    return loss


class Eager:
    """Trains ``model`` as every (data-parallel rank, micro-batch) together would. BatchNorm's statistics are those of
    data-parallel rank 0; the other ranks start each step from their own."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor] | None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        ranks: int,
        microbatches: int,
        max_grad_norm: float | None = None,
    ) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.optimizer = optimizer(model)
        self.ranks, self.microbatches, self.max_grad_norm = ranks, microbatches, max_grad_norm
        self.buffers = [copy.deepcopy(dict(model.named_buffers())) for _ in range(ranks)]

    def step(self, batch: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """One optimizer step; the mean loss."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        parts = split_batch(tuple(batch), kwargs, self.ranks, self.microbatches, {})
        for rank, row in enumerate(parts):
            self._load_buffers(self.buffers[rank])
            for part in row:
                loss = self._loss(*part.arguments())
                self._scaled(loss).backward()
                total = total + loss.detach()
            self.buffers[rank] = {k: v.detach().clone() for k, v in self.model.named_buffers()}
        self._load_buffers(self.buffers[0])
        # Averaged here, in the parameters' precision: transformers computes losses in float32, whatever the model's.
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self._summed()
        self._update()
        return total / (self.ranks * self.microbatches)

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return loss_of(self.model, self.loss_fn, args, kwargs)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss

    def _summed(self) -> int:
        """How many losses' gradients are summed, of which the mean is to be taken."""
        return self.ranks * self.microbatches

    def _update(self) -> None:
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()

    def _load_buffers(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(values[name])


def assert_close(
    name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype, tolerance: Tolerance | None = None
) -> None:
    """``|a-b| <= rtol·max|b| + atol``, the judgement of the parity tests. A value that eager PyTorch has in float32,
    such as the loss for which transformers casts logits down, is judged as float32 in float64 training too."""
    rtol, atol = tolerance or TOLERANCE[theirs.dtype if theirs.dtype in TOLERANCE else dtype]
    bound = rtol * theirs.abs().max().item() + atol if theirs.numel() else 0.0
    error = (ours.double() - theirs.double()).abs().max().item() if theirs.numel() else 0.0
    assert error <= bound, f"{name}: differs by {error:.3e}, allowed {bound:.3e}"


def check_parity(
    make: Make,
    plan: str,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    max_grad_norm: float | None = None,
    noisy: Iterable[str] = (),
    tolerance: Tolerance | None = None,
) -> graphshard.Compiled:
    """Train ``steps`` steps both ways and compare losses, weights, buffers and optimizer state.

    ``noisy``: names (or parts of names) of parameters whose true gradient is zero. ``tolerance``: None: as ``dtype``
    has it.
    """
    model, batch, kwargs, loss_fn = make()
    model = model.to(dtype)
    batch, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (batch, kwargs))
    ours_model = copy.deepcopy(model)
    made = optimizer(ours_model)
    compiled = graphshard.compile(
        ours_model, plan, loss_fn=loss_fn, optimizer=made, executor="local", max_grad_norm=max_grad_norm
    )
    eager = Eager(model, loss_fn, optimizer, compiled.dp_size, compiled.microbatches, max_grad_norm)
    for index in range(steps):
        args, named = rolled((batch, kwargs), index)
        theirs = eager.step(args, named)
        ours = compiled.step(*args, **named)
        assert_close(f"loss of step {index}", ours, theirs, dtype, tolerance)
    assert_same_training(compiled, eager, dtype, noisy, tolerance)
    return compiled


def rolled(batch: Any, index: int) -> Any:
    """The batch of step ``index``: its rows in another order, so that every micro-batch is another one."""
    return tree_map_only(Tensor, lambda t: t.roll(index, 0) if t.dim() else t, batch)


def assert_same_training(
    compiled: graphshard.Compiled,
    eager: Eager,
    dtype: torch.dtype,
    noisy: Iterable[str] = (),
    tolerance: Tolerance | None = None,
) -> None:
    """Weights, buffers and optimizer state of both are the same."""
    model = eager.model
    state = compiled.state_dict()
    expected = model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        if not any(part in name for part in noisy):
            assert_close(name, state[name], value, dtype, tolerance)
    names = {id(p): name for name, p in model.named_parameters()}
    ours_state = compiled.optimizer.state_dict()["state"]
    assert set(ours_state) == {names[id(p)] for p, values in eager.optimizer.state.items() if values}
    for parameter, values in eager.optimizer.state.items():
        name = names[id(parameter)]
        if any(part in name for part in noisy):
            continue
        for key, value in values.items():
            if isinstance(value, Tensor):
                assert_close(f"state {key} of {name}", ours_state[name][key], value, dtype, tolerance)
