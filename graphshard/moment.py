"""What a model and its optimizer were set to when something was compiled, to capture that again later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Moment:
    """Training flags by module, which parameters require a gradient by module and name there, and options by parameter
    group of the optimizer."""

    flags: Sequence[tuple[nn.Module, bool]]
    gradients: Sequence[tuple[nn.Module, str, bool]]  # a distributed run replaces the parameters themselves
    options: Sequence[tuple[dict[str, Any], Mapping[str, Any]]]

    @contextmanager
    def again(self) -> Iterator[None]:
        """All of it as it was then."""
        now = moment_of([module for module, _ in self.flags], [group for group, _ in self.options])
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        for module, training in self.flags:
            module.training = training
        for module, name, required in self.gradients:
            parameter = module._parameters[name]
            if parameter is not None and parameter.requires_grad != required:
                parameter.requires_grad_(required)
        for group, options in self.options:
            group.update(options)


def moment_of(modules: Sequence[nn.Module], groups: Sequence[dict[str, Any]]) -> Moment:
    """How these are set now."""
    options = [(group, {key: value for key, value in group.items() if key != "params"}) for group in groups]
    gradients = [(m, name, p.requires_grad) for m in modules for name, p in m._parameters.items() if p is not None]
    return Moment([(module, module.training) for module in modules], gradients, options)


def now(model: nn.Module, optimizer: Optimizer | None) -> Moment:
    """How ``model`` and ``optimizer`` are set now."""
    return moment_of(list(model.modules()), [] if optimizer is None else optimizer.param_groups)
