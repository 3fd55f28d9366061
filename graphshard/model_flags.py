"""What a model is set to that its training step depends on: training flags, which parameters require a gradient, and
hooks on gradients. Every step asks, so that modules and parameters are given as lists, which walk no model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from graphshard.trace import gradient_hooks


@dataclass(frozen=True)
class Flags:
    """Equal if a model is set alike."""

    training: tuple[bool, ...]  # by module, in the order of model.modules(): the model itself is the first
    gradients: tuple[bool, ...]  # by parameter, in the order of model.parameters(): whether it requires one
    hooks: tuple[tuple[int, tuple[Hashable, ...]], ...]  # see trace.gradient_hooks


@dataclass(frozen=True)
class Names:
    """Of what :class:`Flags` lists, in the same order; the model's own is ""."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class NamedFlags:
    """Training flags and parameters as another process can compare them."""

    training: bool  # of the model itself
    otherwise: tuple[str, ...] = ()  # modules whose flag is not the model's
    frozen: tuple[str, ...] = ()  # parameters that require no gradient
    hooked: tuple[str, ...] = ()  # parameters with hooks on their gradients, of which the plan has the operations


def names_of(model: nn.Module) -> Names:
    """Names of the modules and parameters of ``model``."""
    return Names(tuple(name for name, _ in model.named_modules()), tuple(name for name, _ in model.named_parameters()))


def flags_of(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> Flags:
    """How they are set now."""
    return Flags(
        tuple([module.training for module in modules]),
        tuple([parameter.requires_grad for parameter in parameters]),
        gradient_hooks(parameters),
    )


def named(names: Names, flags: Flags) -> NamedFlags:
    """``flags`` by name."""
    modules = zip(names.modules, flags.training, strict=True)
    parameters = zip(names.parameters, flags.gradients, strict=True)
    return NamedFlags(
        flags.training[0],
        tuple(name for name, training in modules if training != flags.training[0]),
        tuple(name for name, required in parameters if not required),
        tuple(names.parameters[at] for at, _ in flags.hooks),
    )


def changed_flags(names: Names, before: Flags, now: Flags) -> list[str]:
    """How ``now`` differs from ``before``, in words; of many modules or parameters the first is named."""
    found = [_listed(_differing(names.modules, before.training, now.training), "model", "training")]
    found.append(_listed(_differing(names.parameters, before.gradients, now.gradients), "", "requires_grad"))
    return [text for text in found if text] + (
        ["other hooks on gradients of parameters now"] if before.hooks != now.hooks else []
    )


def other_flags(expected: NamedFlags, given: NamedFlags) -> tuple[str, object, object] | None:
    """The first flag that differs: which, what was expected and what is given; None: none does."""
    if expected.training != given.training:
        return "model.training", expected.training, given.training
    for name in sorted({*expected.otherwise} ^ {*given.otherwise}):
        return f"{name}.training", *_swapped(expected.training, name in expected.otherwise)
    for name in sorted({*expected.frozen} ^ {*given.frozen}):
        return f"{name}.requires_grad", *_swapped(True, name in expected.frozen)
    for name in sorted({*expected.hooked} ^ {*given.hooked}):
        return f"a hook on the gradient of {name}", *_swapped(False, name in expected.hooked)
    return None


def set_flags(model: nn.Module, flags: NamedFlags) -> None:
    """Set ``model``, whose parameters require gradients as they are to, as the flags say; hooks do nothing."""
    for name, module in model.named_modules():
        module.training = flags.training != (name in flags.otherwise)
    for name in flags.hooked:
        model.get_parameter(name).register_hook(lambda gradient: None)


def _swapped(usual: bool, differs: bool) -> tuple[bool, bool]:
    """What is expected where that ``differs`` from what is usual, and what is given, which is the opposite."""
    return usual != differs, usual == differs


def _differing(names: Sequence[str], before: Sequence[bool], now: Sequence[bool]) -> list[tuple[str, bool]]:
    return [(name, new) for name, old, new in zip(names, before, now, strict=True) if old != new]


def _listed(differing: list[tuple[str, bool]], root: str, flag: str) -> str:
    """``0.weight.requires_grad is False now, and that of 3 others has changed``."""
    if not differing:
        return ""
    (name, value), others = differing[0], len(differing) - 1
    more = f", and that of {others} other{'s' * (others > 1)} has changed" if others else ""
    return f"{name or root}.{flag} is {value} now{more}"
