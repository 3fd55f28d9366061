"""Capture: from a model, a loss function and example inputs to a Program for one micro-batch."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphshard import fake
from graphshard.errors import LossHasParameters, MissingInput, UnsupportedInput
from graphshard.execution import type_of
from graphshard.program import Program
from graphshard.trace.call import LossFn, Mode, Request
from graphshard.trace.context import capturing
from graphshard.trace.convert import convert
from graphshard.trace.joint import Step, trace_joint
from graphshard.trace.model import describe_params, gradient_hooks, parameter_names, tensors_of

__all__ = [
    "Captured",
    "LossFn",
    "Mode",
    "Signature",
    "capture",
    "describe_params",
    "gradient_hooks",
    "input_signature",
    "output_shapes",
    "parameter_names",
    "spell_signature",
]

_DEPTH = 6
"""How deep a tensor is looked for in an argument: a cache has a list of layers, objects with attributes."""
_NOT_SEARCHED = (nn.Module, type, ModuleType, FunctionType)

Signature = tuple[str, tuple[Hashable, ...]]
"""Of arguments: their structure, and what counts of each in flattening order."""


@dataclass(frozen=True)
class Captured:
    """A captured program and how its inputs and outputs were flattened.

    BATCH slot "i" is leaf i of (args, kwargs); OUTPUT slot "i" is leaf i of the model's output. Other leaves are
    constants of the program.
    """

    program: Program
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec | None = None  # of a call
    output_leaves: tuple[Any, ...] = ()  # of a call; None where a tensor belongs


@fake.default_device()
def capture(
    model: nn.Module,
    loss_fn: LossFn | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    mode: Mode,
    microbatches: int = 1,
    group_of: Mapping[str, int] | None = None,
    lower: torch.dtype | None = None,
) -> Captured:
    """Run ``model`` once on fake tensors; nothing is computed, and the model is left as it was.

    "train": forward and backward, in the model's own training flags, body with gradient carries; the epilogue averages
    the loss and stores buffers, without an update. "evaluate": forward in evaluation mode. "call": that without the
    loss; the body returns the model's output.

    Args:
        loss_fn: ``loss_fn(model(x), *targets)``; None: the model returns its loss.
        args, kwargs: one micro-batch, as given to ``step``; only shapes and dtypes of tensors are read.
        group_of: parameter name to index of its optimizer group.
        lower: what the plan computes in instead of float32: what the model says of precision itself is kept then.

    Raises:
        GraphshardError: the subclass that says what cannot be captured, where in the model, and what to do instead.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    _check_inputs(leaves)
    if loss_fn is not None:
        if not args:
            raise MissingInput()
        if isinstance(loss_fn, nn.Module):
            _check_loss(loss_fn, model)
    groups = group_of or {}
    params = {name: replace(p, group=groups.get(name)) for name, p in describe_params(model).items()}
    tensors = tensors_of(model)
    joint = trace_joint(Request(model, loss_fn, mode, tuple(leaves), spec, lower), tensors)
    program = convert(joint, tensors, params, microbatches, mode == "train")
    return Captured(program, spec, joint.output.spec, joint.output.leaves)


@fake.default_device()
def output_shapes(
    model: nn.Module, loss_fn: LossFn | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[int, tuple[int, ...]]:
    """Of the tensors that a call of ``model`` returns, by leaf. Raises what the model raises."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    step = Step(Request(model, loss_fn, "call", tuple(leaves), spec), tensors_of(model))
    with capturing(model, False), step.mode:
        results = step(*step.batch_values)
    return {leaf: tuple(result.shape) for leaf, result in zip(step.output.tensors, results, strict=True)}


def input_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
    """Equal for arguments that one captured program serves: structure, shapes, dtypes, and values of non-tensors."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    return str(spec), tuple(_key(leaf) for leaf in leaves)


def spell_signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """:func:`input_signature` as text, the structure first and then the arguments in flattening order, for another
    process: arguments that are no tensors count as equal there if they print the same."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = (str(type_of(leaf)) if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}" for leaf in leaves)
    return str(spec), *tensors


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (torch.Tensor, tuple(leaf.shape), leaf.dtype)
    # 1, 1.0 and True are equal, but not the same constant.
    return (type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf))


def _check_inputs(leaves: list[Any]) -> None:
    for index, leaf in enumerate(leaves):
        kind = type(leaf).__name__
        if type(leaf).__module__ == "numpy" and kind == "ndarray":
            raise UnsupportedInput(index, kind, "pass a tensor, such as torch.from_numpy(x)")
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided or leaf.is_nested:
                raise UnsupportedInput(index, f"{leaf.layout} tensor", "pass a dense tensor")
        elif _holds_tensor(leaf):
            raise UnsupportedInput(index, kind, "pass its tensors in a tuple, list or dict")


def _holds_tensor(argument: Any) -> bool:
    """Whether a tensor is in an attribute, a slot or a container of it, or inside what is there. Modules are the
    model's own, and what code refers to is no argument."""
    seen, held = set[int](), [argument]
    for _ in range(_DEPTH):
        held = [one for one in held if id(one) not in seen and not isinstance(one, _NOT_SEARCHED)]
        seen.update(map(id, held))
        held = gc.get_referents(*held)
        if any(isinstance(one, Tensor) for one in held):
            return True
    return False


def _check_loss(loss_fn: nn.Module, model: nn.Module) -> None:
    own = {id(p) for p in model.parameters()}
    for name, parameter in loss_fn.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise LossHasParameters(name)
