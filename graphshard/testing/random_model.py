"""Random models as data: what strategies.py draws, and the torch module that a drawing stands for.

Values are matrices. Every layer reads earlier values and gives a new one; what no layer reads goes into the loss, so
that nothing is dead. Layers with parameters are modules ``h.0``, ``h.1``, …, so that passes see blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer of a random model.

    ``reads`` are indices of values: those of the batch, then one per layer. ``width``: columns of a linear layer's
    result. ``tied``: index of the layer whose parameters it shares.
    """

    kind: str
    reads: tuple[int, ...]
    width: int = 1
    tied: int | None = None
    frozen: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A random model: shapes of the batch's tensors, and layers."""

    batch: tuple[Shape, ...]
    layers: tuple[Layer, ...]

    def shapes(self) -> list[Shape]:
        """Shapes of all values."""
        result = list(self.batch)
        for layer in self.layers:
            result.append(result_shape(layer, [result[i] for i in layer.reads]))
        return result


UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "softmax": lambda x: functional.softmax(x, -1),
    "centre": lambda x: x - x.mean(0, keepdim=True),
    "transpose": lambda x: x.t(),
    "reshape": lambda x: x.reshape(x.shape[1], x.shape[0]),
    "half": lambda x: x[:, x.shape[1] // 2 :],
}
BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "cat": lambda x, y: torch.cat([x, y], 1),
    "scores": lambda x, y: x @ y.t(),
}
WITH_PARAMETERS = ("linear", "affine", "product", "scale", "gain")


def result_shape(layer: Layer, reads: Sequence[Shape]) -> Shape:
    """The shape of what ``layer`` gives for values of shapes ``reads``."""
    rows, columns = reads[0]
    match layer.kind:
        case "linear" | "affine" | "product":
            return rows, layer.width
        case "transpose" | "reshape":
            return columns, rows
        case "half":
            return rows, columns - columns // 2
        case "cat":
            return rows, columns + reads[1][1]
        case "scores":
            return rows, reads[1][0]
    return rows, columns


def accepts(kind: str, first: Shape, second: Shape) -> bool:
    """Whether the binary layer ``kind`` takes values of these shapes."""
    return {"add": first == second, "mul": first == second, "cat": first[0] == second[0]}.get(
        kind, first[1] == second[1]
    )


def parameter_shapes(layer: Layer, columns: int) -> dict[str, tuple[int, ...]]:
    """Name to shape of a layer's own parameters; ``columns`` are those of what it reads."""
    match layer.kind:
        case "linear" | "product":
            return {"weight": (layer.width, columns)}
        case "affine":
            return {"weight": (layer.width, columns), "bias": (layer.width,)}
        case "scale":
            return {"weight": (columns,)}
        case "gain":
            return {"weight": ()}
    return {}


class RandomModel(nn.Module):
    """The model of a spec, on the meta device; ``forward`` gives the loss."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        shapes = spec.shapes()
        self.spec = spec
        self.h = nn.ModuleList(_Module(layer, shapes[layer.reads[0]][1]) for layer in spec.layers)
        for module, layer in zip(self.h, spec.layers, strict=True):
            if layer.tied is not None:
                for name, parameter in self.h[layer.tied].named_parameters():
                    setattr(module, name, parameter)

    def forward(self, *batch: Tensor) -> Tensor:
        values, unread = list(batch), set[int]()
        for layer, module in zip(self.spec.layers, self.h, strict=True):
            unread -= set(layer.reads)
            unread.add(len(values))
            values.append(module(*(values[i] for i in layer.reads)))
        return functools.reduce(torch.add, (values[i].square().mean() for i in sorted(unread)))


class _Module(nn.Module):
    def __init__(self, layer: Layer, columns: int) -> None:
        super().__init__()
        self.layer = layer
        for name, shape in parameter_shapes(layer, columns).items():
            value = torch.empty(shape, device="meta")
            self.register_parameter(name, nn.Parameter(value, requires_grad=not layer.frozen))

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        kind = self.layer.kind
        if kind in UNARY:
            return UNARY[kind](x)
        if kind in BINARY:
            return BINARY[kind](x, *rest)
        weight: Tensor = self.weight  # type: ignore[assignment]
        if kind in ("scale", "gain"):
            return x * weight
        if kind == "product":
            return x @ weight.T  # a permutation, where a linear layer has a transposition
        return functional.linear(x, weight, getattr(self, "bias", None))
