"""Eager training under autocast, with a GradScaler for float16: what precision plans must come close to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import graphshard
from graphshard.passes.fuse import Fuse
from graphshard.pipeline import Pass
from graphshard.plan import Plan
from numerics.cases import adamw
from numerics.reference import Eager, Make

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _of_float32(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``loss_fn`` of a float32 output: a GPU's autocast leaves the log-softmax inside of a cross-entropy as narrow as
    that was, where the CPU's, and ours, widen it."""

    def loss(output: Any, *targets: Any) -> Tensor:
        return loss_fn(output.float() if isinstance(output, Tensor) else output, *targets)

    return loss


class Autocast(Eager):
    """Eager training in the precision of a plan."""

    def __init__(self, plan: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        precision = Plan.parse(plan).precision
        assert precision is not None
        self.dtype = DTYPES[precision.dtype]
        self.scaler = torch.amp.GradScaler(
            torch.get_default_device().type,
            init_scale=precision.init_scale,
            growth_factor=precision.growth_factor,
            backoff_factor=precision.backoff_factor,
            growth_interval=precision.growth_interval,
            enabled=precision.dtype == "fp16",
        )

        if torch.get_default_device().type != "cpu" and self.loss_fn is not None:
            self.loss_fn = _of_float32(self.loss_fn)

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with torch.autocast(torch.get_default_device().type, self.dtype):
            return super()._loss(args, kwargs)

    def _scaled(self, loss: Tensor) -> Tensor:
        share = self.microbatches if self.scaler.is_enabled() else 1
        scaled: Tensor = self.scaler.scale(loss / share)
        return scaled

    def _summed(self) -> int:
        return self.ranks if self.scaler.is_enabled() else super()._summed()

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def rounding() -> list[Pass]:
    """A GPU's kernels keep what is between their operators in float32. With this pass each operator rounds, as eager
    ones do."""
    return [] if torch.get_default_device().type == "cpu" else [Fuse(body=False, on_gpu=True)]


def both(
    make: Make,
    plan: str,
    max_grad_norm: float | None = None,
    optimizer: Any = adamw,
    passes: Sequence[Pass] | None = None,
) -> tuple[graphshard.Compiled, Autocast, tuple[Any, ...], dict[str, Any]]:
    """The same model compiled by ``plan`` and eager, and a batch."""
    model, args, kwargs, loss_fn = make()
    ours = copy.deepcopy(model)
    compiled = graphshard.compile(
        ours,
        plan,
        loss_fn=loss_fn,
        optimizer=optimizer(ours),
        executor="local",
        max_grad_norm=max_grad_norm,
        passes=passes,
    )
    ranks, microbatches = compiled.dp_size, compiled.microbatches
    eager = Autocast(plan, model, loss_fn, optimizer, ranks, microbatches, max_grad_norm)
    return compiled, eager, args, kwargs
