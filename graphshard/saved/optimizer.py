"""What a plan needs of an optimizer: its class, its parameter groups, and options, which are constants of the plan."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import nn
from torch.optim import Optimizer

from graphshard.optim import CompiledOptimizer

Options = Sequence[Mapping[str, str]]
"""By parameter group: each option but the learning rate as Python spells it; see optim.spell_options."""


@dataclass(frozen=True)
class OptimizerRecord:
    """The optimizer that plans were compiled for. Its options are each plan's own."""

    kind: str  # "torch.optim.adamw.AdamW"
    params: tuple[tuple[str, ...], ...]  # names by parameter group
    lrs: tuple[float, ...]  # by parameter group, when the record was made
    scaler: dict[str, float] = field(default_factory=dict)  # growth_factor, …; {} without loss scaling


def record_of(optimizer: CompiledOptimizer, scaler: Mapping[str, float]) -> OptimizerRecord:
    """The record of the optimizer of a compiled model."""
    return OptimizerRecord(kind_of(optimizer.source), optimizer.names, tuple(optimizer.lrs()), dict(scaler))


def kind_of(optimizer: Optimizer) -> str:
    """Its class with its module."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether it is one of torch.optim as it is there, without hooks: its options tell all that its step does."""
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer) and not hooked


def remade(record: OptimizerRecord, options: Options, model: nn.Module) -> Optimizer | None:
    """The optimizer over the parameters of ``model``, with the learning rates of the record; None: it is not one of
    torch.optim with plain options, and whoever loads the plan has to give it."""
    kind = getattr(torch.optim, record.kind.rpartition(".")[2], None)
    if kind is None or f"{kind.__module__}.{kind.__qualname__}" != record.kind:
        return None
    named = dict(model.named_parameters())
    groups = []
    for names, lr, spelled in zip(record.params, record.lrs, options, strict=True):
        try:
            values = {key: ast.literal_eval(value) for key, value in spelled.items()}
        except (ValueError, SyntaxError):
            return None
        groups.append({**values, "params": [named[name] for name in names], "lr": lr})
    made: Optimizer = kind(groups)
    return made


def other_optimizer(
    record: OptimizerRecord | None, optimizer: Optimizer | None, names: Mapping[int, str]
) -> tuple[str, str] | None:
    """Where ``optimizer`` is not the one of ``record``: what was expected and what is given; None: nowhere. ``names``:
    of the model's Parameters, by id."""
    expected, given = record.kind if record else "no optimizer", kind_of(optimizer) if optimizer else "none"
    if record is None or optimizer is None or expected != given:
        return None if record is None and optimizer is None else (expected, given)
    groups = [tuple(names.get(id(p), "a tensor of another model") for p in g["params"]) for g in optimizer.param_groups]
    if len(groups) != len(record.params):
        return f"{len(record.params)} parameter groups", str(len(groups))
    for index, (theirs, ours) in enumerate(zip(record.params, groups, strict=True)):
        for expected_name, given_name in zip_longest(theirs, ours, fillvalue="nothing more"):
            if expected_name != given_name:
                return f"{expected_name!r} in the optimizer's group {index}", repr(given_name)
    return None


def other_options(expected: Options, given: Options) -> tuple[str, str, str] | None:
    """The first option that differs: which, what was expected and what is given; None: none does."""
    for index, (theirs, ours) in enumerate(zip(expected, given, strict=True)):
        for key, value in theirs.items():
            if ours.get(key) != value:
                return f"{key} of the optimizer's group {index}", value, ours.get(key, "nothing")
    return None
