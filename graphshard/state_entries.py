"""The entries of a model's state dict: which of them are parameters and buffers, and whether given ones fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphshard.errors import StateMismatch, UnexpectedTensor
from graphshard.program import Param

_EXTRA = "_extra_state"  # the last part of the name under which torch keeps what get_extra_state gives


class IncompatibleKeys(NamedTuple):
    """What a state dict lacks and has too much, as torch.nn.Module.load_state_dict returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Given(NamedTuple):
    """A state dict to load."""

    values: dict[str, Tensor]  # by the name that they are stored under
    extra: dict[str, Any]  # what set_extra_state is given, by entry
    keys: IncompatibleKeys


@dataclass(frozen=True)
class Entries:
    """What the state dict of ``model`` holds now."""

    model: nn.Module
    params: Mapping[str, Param]
    saved: Mapping[str, Any]  # the model's own state_dict(), with its parameters and buffers as they are
    stored: Mapping[str, str]  # each name of a parameter or buffer to the one that its value is stored under

    def filled(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model's state dict with ``values``, by the names they are stored under. What is neither parameter nor
        buffer is the module's own."""
        return {
            name: values[self.stored[name]] if name in self.stored else own.detach() if isinstance(own, Tensor) else own
            for name, own in self.saved.items()
        }

    def fit(self, state: Mapping[str, Any], strict: bool = True) -> Given:
        """``state`` as it may be loaded. Of names that are tied one is enough; what hooks add is left out.

        Args:
            strict: False: what is missing or unexpected is listed alone.

        Raises:
            StateMismatch: something is missing, is no tensor with values or has another shape.
            UnexpectedTensor: a name is none of the model's.
        """
        if not isinstance(state, Mapping):
            raise StateMismatch("the state dict", _kind(state), "a dict of tensors, such as model.state_dict() gives")
        tensors = dict(self.model.named_buffers()) | dict(self.model.named_parameters())
        given = Given({}, {}, IncompatibleKeys([], []))
        for name, value in state.items():
            stored = self.stored.get(name)
            if stored is not None and (name in self.saved or stored in self.params):
                _check(name, value, tensors[stored])
                given.values[stored] = value
            elif name in self.saved and self._takes_extra(name):
                given.extra[name] = value
            elif name not in self.saved:
                given.keys.unexpected_keys.append(name)
        for name in dict.fromkeys([*self.saved, *self.params]):
            if self.stored[name] not in given.values if name in self.stored else self._takes_extra(name, given.extra):
                given.keys.missing_keys.append(name)
        if strict and given.keys.unexpected_keys:
            raise UnexpectedTensor(given.keys.unexpected_keys[0], self.saved)
        if strict and given.keys.missing_keys:
            name = given.keys.missing_keys[0]
            shape = f"a tensor of shape {list(tensors[self.stored[name]].shape)}" if name in self.stored else "a value"
            raise StateMismatch(name, "nothing", shape)
        return given

    def load_extra(self, extra: Mapping[str, Any]) -> None:
        """Hand extra state to the modules that it is of."""
        for name, value in extra.items():
            self._module(name).set_extra_state(value)

    def _takes_extra(self, name: str, but: Mapping[str, Any] | None = None) -> bool:
        """Whether ``name`` is extra state that its module takes; not of the names in ``but``."""
        if name.rpartition(".")[2] != _EXTRA or name in (but or ()):
            return False
        return type(self._module(name)).set_extra_state is not nn.Module.set_extra_state

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


def entries_of(model: nn.Module, params: Mapping[str, Param]) -> Entries:
    """The entries of ``model``, whose parameters are ``params``. One that a hook of the model has renamed is known by
    its identity."""
    first: dict[int, str] = {}
    buffers = model.named_buffers(remove_duplicate=False)
    stored = {name: first.setdefault(id(buffer), name) for name, buffer in buffers}
    stored |= {alias: param.name for param in params.values() for alias in (param.name, *param.aliases)}
    held = first | {id(param): name for name, param in model.named_parameters()}
    saved = model.state_dict(keep_vars=True)
    renamed = {name: held[id(value)] for name, value in saved.items() if id(value) in held}
    return Entries(model, params, saved, renamed | stored)


def _check(name: str, value: object, like: Tensor) -> None:
    expected = f"a tensor of shape {list(like.shape)}"
    if not isinstance(value, Tensor):
        raise StateMismatch(name, _kind(value), expected)
    if value.is_meta:
        raise StateMismatch(name, "a tensor on the meta device", f"{expected} that has values")
    if value.layout is not torch.strided:
        raise StateMismatch(name, f"a tensor of layout {value.layout}", f"{expected} of layout {torch.strided}")
    if value.is_complex() and not like.is_complex():
        raise StateMismatch(name, f"values of {value.dtype}", f"values of {like.dtype}, or such as become that")
    if value.shape != like.shape:
        raise StateMismatch(name, f"shape {list(value.shape)}", f"shape {list(like.shape)}")


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
