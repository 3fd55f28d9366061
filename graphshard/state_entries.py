"""The entries of a model's state dict: what they are with other values, which of them are parameters and buffers, and
whether given ones fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphshard.errors import NoValue, StateMismatch, UnexpectedTensor
from graphshard.program import Param
from graphshard.trace import describe_params

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

    def fit(self, state: Mapping[str, Any], strict: bool = True) -> Given:
        """``state`` as it may be loaded, after the model's load_state_dict_pre_hooks. Of names that are tied one is
        enough; what hooks on state dicts add is left out.

        Args:
            strict: False: what is missing or unexpected is listed alone.

        Raises:
            StateMismatch: something is missing, is no tensor with values or has another shape.
            UnexpectedTensor: a name is none of the model's.
        """
        if not isinstance(state, Mapping):
            raise StateMismatch("the state dict", _kind(state), "a dict of tensors, such as model.state_dict() gives")
        state = _after_load_hooks(self.model, state, getattr(state, "_metadata", {}), "")
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
    held = _stored_names(model)
    stored = {name: held[id(buffer)] for name, buffer in model.named_buffers(remove_duplicate=False)}
    stored |= _canonical(params)
    empty = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_meta)
    zeros = {id(tensor): _like(tensor, _zeros(tensor)) for tensor in empty}  # hooks may look at values
    with _holding(model, zeros):
        saved = model.state_dict(keep_vars=True)
    held |= {id(zero): held[key] for key, zero in zeros.items()}
    renamed = {name: held[id(value)] for name, value in saved.items() if id(value) in held}
    return Entries(model, params, saved, renamed | stored)


def saved_with(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's own ``state_dict()`` with ``values``, by the names they are stored under, as its parameters and
    buffers: its hooks see these. What is neither, such as extra state, is the module's own.

    Raises:
        NoValue: a parameter or buffer is none of ``values``, and the model has no value of it.
    """
    names, tensors = _stored_names(model), (*model.parameters(), *model.buffers())
    given = {id(tensor): _like(tensor, values[names[id(tensor)]]) for tensor in tensors if names[id(tensor)] in values}
    with _holding(model, given):
        saved: dict[str, Any] = model.state_dict()
    for name, value in saved.items():
        if isinstance(value, Tensor) and value.is_meta and name.rpartition(".")[2] != _EXTRA:
            raise NoValue(repr(name))
    return saved


def check_same_parameters(model: nn.Module, params: Mapping[str, Param]) -> None:
    """Whether ``model`` still has the parameters ``params``, tied alike, after ``init``.

    Raises:
        StateMismatch: it has not.
    """
    before, now = _canonical(params), _canonical(describe_params(model))
    for name in before | now:
        if before.get(name) != now.get(name):
            expected = f"{_parameter(name, before.get(name))}, as the model had it before init"
            raise StateMismatch(f"{name} after init", _parameter(name, now.get(name)), expected)


@contextmanager
def _holding(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """The modules of ``model`` hold ``values`` meanwhile, each by the id of the parameter or buffer it stands for."""
    found: list[tuple[dict[str, Any], str, Tensor]] = [
        (where, key, tensor)
        for module in model.modules()
        for where in (module._parameters, module._buffers)
        for key, tensor in where.items()
        if tensor is not None and id(tensor) in values
    ]
    try:
        for where, key, tensor in found:
            where[key] = values[id(tensor)]
        yield
    finally:
        for where, key, tensor in found:
            where[key] = tensor


def _after_load_hooks(
    module: nn.Module, state: Mapping[str, Any], metadata: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """``state``, whose names begin with ``prefix``, after the load_state_dict_pre_hooks of ``module`` and of those in
    it, which see what is theirs, as with torch."""
    changed = dict(state)
    for hook in module._load_state_dict_pre_hooks.values():
        hook(changed, prefix, metadata.get(prefix[:-1], {}), True, [], [], [])
    for name, child in module.named_children():
        if any(inner._load_state_dict_pre_hooks for inner in child.modules()):
            path = f"{prefix}{name}."
            own = {key: value for key, value in changed.items() if key.startswith(path)}
            others = {key: value for key, value in changed.items() if key not in own}
            changed = others | _after_load_hooks(child, own, metadata, path)
    return changed


def _canonical(params: Mapping[str, Param]) -> dict[str, str]:
    """Each name of a parameter to the canonical one."""
    return {alias: param.name for param in params.values() for alias in (param.name, *param.aliases)}


def _stored_names(model: nn.Module) -> dict[int, str]:
    """The id of each parameter and buffer to the name that its value is stored under."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """``value`` as a parameter if ``tensor`` is one."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros of its shape that take no memory."""
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _parameter(name: str, canonical: str | None) -> str:
    return "no parameter" if canonical is None else "one of its own" if canonical == name else f"that of {canonical!r}"


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
