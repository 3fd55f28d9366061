"""Calling the model as ``step``, ``evaluate`` and a call of the compiled object do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphshard.errors import LossNotScalar, LossWithoutGradient, NoLoss

Mode = Literal["train", "evaluate", "call"]
LossFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Request:
    """What to capture. ``leaves`` are the flattened (args, kwargs); of tensors only shapes and dtypes are read.
    ``lower``: what the plan computes in instead of float32."""

    model: nn.Module
    loss_fn: LossFn | None
    mode: Mode
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    lower: torch.dtype | None = None

    @property
    def train(self) -> bool:
        return self.mode == "train"


@dataclass(frozen=True)
class Output:
    """How the output of a call was flattened; of a loss, nothing."""

    spec: pytree.TreeSpec | None = None
    leaves: tuple[Any, ...] = ()  # None where a tensor belongs, and for what is neither tensor nor constant
    tensors: tuple[int, ...] = ()  # which leaves are tensors
    dropped: tuple[str, ...] = ()  # types of leaves that are neither


def call(request: Request, leaves: list[Any]) -> tuple[list[Tensor], Output]:
    """The loss, or the tensors of the model's output, for arguments given as leaves.

    Raises:
        NoLoss, LossNotScalar, LossWithoutGradient: what was computed is no loss to train with.
    """
    args, kwargs = pytree.tree_unflatten(leaves, request.spec)
    if request.loss_fn is None:
        result = forward_of(request.model, args, kwargs)
        loss = None if request.mode == "call" else _loss_in(result)
    else:
        x, *targets = args
        result = forward_of(request.model, *_arguments_of(x))
        loss = None if request.mode == "call" else loss_of(request.loss_fn, (result, *targets), kwargs)
    if request.mode == "call":
        return _flattened(result)
    return [_checked(loss, request.train)], Output()


# Frames of these two say in a traceback what was running.


def forward_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model returns."""
    return model(*args, **kwargs)


def loss_of(loss_fn: LossFn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the loss function returns."""
    return loss_fn(*args, **kwargs)


def _arguments_of(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments, where a loss function takes those behind the first."""
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, dict):
        return (), x
    return (x,), {}


def _loss_in(result: Any) -> Any:
    """The loss that a model returned: the result itself, or its ``loss`` item or attribute."""
    if isinstance(result, Tensor):
        return result
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if loss is None:
        raise NoLoss(result)
    return loss


def _checked(loss: Any, train: bool) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossNotScalar(f"a {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise LossNotScalar(f"a {loss.dtype} tensor of shape {list(loss.shape)}")
    if train and not loss.requires_grad:
        raise LossWithoutGradient()
    return loss.reshape(()) if loss.dim() else loss


_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def _flattened(result: Any) -> tuple[list[Tensor], Output]:
    """The tensors of a model's output; dataclasses become pytrees."""
    leaves, spec = pytree.tree_flatten(result)
    unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    if unknown:
        for kind in unknown:
            pytree.register_dataclass(kind)
        return _flattened(result)
    at = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    opaque = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))}
    plain = tuple(leaf if isinstance(leaf, _CONSTANTS) else None for leaf in leaves)
    return [leaves[i] for i in at], Output(spec, plain, at, tuple(sorted(opaque)))
