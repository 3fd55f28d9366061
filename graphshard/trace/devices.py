"""Devices are symbolic in a graph: a model is captured on the CPU wherever it is, and runs where its executor is.

The model's own code need not know: a device that it names, and a constant that it keeps on one, count as the CPU's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

from graphshard.errors import ParameterOutsideModel, UncapturableOperator
from graphshard.trace.errors import calling_line, describe
from graphshard.trace.model import Held

_CPU = torch.device("cpu")
_HERE = ("cpu", "meta")  # a tensor on the meta device has no value, which is refused elsewhere
_ACCELERATOR = "cuda"
_autocast_enabled = torch.is_autocast_enabled  # torch's own, which the model may be told otherwise of meanwhile


class Devices:
    """Turns the calls of torch functions that a model makes into such on the CPU.

    Args:
        held: the model's parameters and buffers, which fake tensors stand for meanwhile.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        self._held = {item.tensor.untyped_storage()._cdata: item for item in held if item.tensor.numel()}
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, and its copy here

    def replaced(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The call to make instead.

        Raises:
            ParameterOutsideModel: a tensor of the model itself is used, not what stands for it.
            UncapturableOperator: the model switches on autocast of an accelerator.
        """
        if _autocast_enabled(_ACCELERATOR):
            instead = "the plan says what is computed in which precision: bf16 or fp16"
            raise UncapturableOperator(f"torch.autocast({_ACCELERATOR!r})", describe(calling_line()), instead)
        if func is Tensor.cuda:
            func, args, kwargs = Tensor.to, (args[0], _CPU), {}
        elif func is Tensor.to and len(args) > 1 and isinstance(args[1], (str, int)):
            args = (args[0], _named(args[1]), *args[2:])
        if isinstance(kwargs.get("device"), (str, int)):
            kwargs = {**kwargs, "device": _named(kwargs["device"])}
        moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(self._here, (args, dict(kwargs)))
        return func, *moved

    def _here(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return value if value.type == "meta" else _CPU
        if isinstance(value, Tensor) and value.device.type not in _HERE:
            return self._constant(value)
        return value

    def _constant(self, value: Tensor) -> Tensor:
        if (held := self._held.get(value.untyped_storage()._cdata)) is not None:
            raise ParameterOutsideModel(held.name, describe(calling_line()))
        if id(value) not in self._constants:
            with no_dispatch():  # a copy now, not one in the graph
                self._constants[id(value)] = value, value.detach().cpu()
        return self._constants[id(value)][1]


def _named(device: str | int) -> torch.device:
    """A number is that of an accelerator."""
    return torch.device(_ACCELERATOR, device) if isinstance(device, int) else torch.device(device)
