"""What a plan needs of a model: the names, shapes and types of its parameters and buffers; and a module that has just
these, for those who run a plan without the model's code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphshard.execution import TensorType, type_of


@dataclass(frozen=True)
class NamedTensor:
    """One name of a parameter or buffer."""

    name: str
    type: TensorType
    same_as: str = ""  # of a tied one: the first name
    requires_grad: bool = False
    saved: bool = True  # in the model's state_dict()

    def __str__(self) -> str:
        words = [str(self.type)]
        words += [f"tied to {self.same_as!r}"] if self.same_as else []
        words += ["with a gradient" if self.requires_grad else "without a gradient"]
        return ", ".join(words)


@dataclass(frozen=True)
class ModelRecord:
    """Names are in the order of ``model.named_modules()``, ``named_parameters()`` and ``named_buffers()``."""

    kind: str  # the name of its class, for people
    modules: tuple[str, ...]
    parameters: tuple[NamedTensor, ...]
    buffers: tuple[NamedTensor, ...]


def describe(model: nn.Module) -> ModelRecord:
    """The record of ``model``, on whatever device."""
    saved = model.state_dict(keep_vars=True)
    return ModelRecord(
        type(model).__name__,
        tuple(name for name, _ in model.named_modules(remove_duplicate=False)),
        tuple(_named(model.named_parameters(remove_duplicate=False), saved)),
        tuple(_named(model.named_buffers(remove_duplicate=False), saved)),
    )


def _named(pairs: Iterator[tuple[str, Tensor]], saved: dict[str, Tensor]) -> Iterator[NamedTensor]:
    first: dict[int, str] = {}
    for name, tensor in pairs:
        one = first.setdefault(id(tensor), name)
        same_as = "" if one == name else one
        yield NamedTensor(name, type_of(tensor), same_as, tensor.requires_grad, name in saved)


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that ``model.state_dict()`` leaves out, of those that have values."""
    saved = model.state_dict(keep_vars=True)
    return {name: value for name, value in model.named_buffers() if name not in saved and not value.is_meta}


def difference(given: ModelRecord, expected: ModelRecord) -> str | None:
    """The first parameter or buffer that is not as ``expected`` has it, in words; None: all are."""
    for what, ours, theirs in (
        ("parameter", given.parameters, expected.parameters),
        ("buffer", given.buffers, expected.buffers),
    ):
        have, want = {item.name: str(item) for item in ours}, {item.name: str(item) for item in theirs}
        for name in [*want, *have]:
            if have.get(name) != want.get(name):
                return f"its {what} {name!r} is {have.get(name, 'absent')}, the plan's is {want.get(name, 'absent')}"
    return None


def skeleton(record: ModelRecord) -> nn.Module:
    """A module on the meta device with the parameters and buffers of ``record``, which computes nothing."""
    modules: dict[str, nn.Module] = {}
    for path in record.modules:
        modules[path] = nn.Module()
        if path:
            parent, _, key = path.rpartition(".")
            modules[parent]._modules[key] = modules[path]
    made: dict[str, Tensor] = {}
    for item in record.parameters:
        made[item.name] = made[item.same_as] if item.same_as else nn.Parameter(_meta(item), item.requires_grad)
        path, _, key = item.name.rpartition(".")
        modules[path].register_parameter(key, made[item.name])  # type: ignore[arg-type]
    for item in record.buffers:
        made[item.name] = made[item.same_as] if item.same_as else _meta(item)
        path, _, key = item.name.rpartition(".")
        modules[path].register_buffer(key, made[item.name], persistent=item.saved)
    return modules[""]


def _meta(item: NamedTensor) -> Tensor:
    return torch.empty_strided(item.type.shape, item.type.stride, dtype=item.type.dtype, device="meta")
