"""Regions as Triton kernels: source that a person can read, with the region's own graph as its meaning.

What a kernel takes: pointwise operators over any shapes and strides with broadcasting, views and casts; reductions
along the last dims (norms, softmax, cross-entropy, forward and backward); sums over rows and of everything; packing.
:mod:`graphshard.codegen.triton_split` says how a region becomes launches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphshard.codegen.triton_decompose import decomposed
from graphshard.codegen.triton_kernels import Writer
from graphshard.codegen.triton_ops import TYPES, Unsupported
from graphshard.codegen.triton_split import split
from graphshard.execution import Kernel
from graphshard.region import Region


def supports(region: Region) -> str:
    """Why the region cannot become a kernel, naming the operator; ``""`` if it can."""
    try:
        write_kernel(region, "probe")
    except Unsupported as reason:
        return str(reason)
    return ""


def write_kernel(
    region: Region, name: str, in_place: Mapping[int, int] | None = None, *, autotune: bool = False
) -> Kernel:
    """The kernel of a region. ``name`` is a Python identifier; ``how`` of the kernel says what was chosen for a launch:
    blocks, warps, one block a row or a loop.

    ``in_place`` maps the number of an output to that of the input whose memory it overwrites: of its shape and dtype,
    and not used by the caller any more. ``autotune`` searches block sizes and warps at the first call of each shape.

    Raises:
        Unsupported: :func:`supports` gives a reason.
    """
    _check_types(region)
    graph = decomposed(region)
    source, choice = Writer(name, graph, split(graph), in_place or {}, autotune).source()
    return Kernel(name, source, "triton", choice)


def _check_types(region: Region) -> None:
    for node in (*region.inputs, *region.operations):
        for value in _tensors(node):
            if value.dtype not in TYPES:
                raise Unsupported(f"{_named(node)}: a kernel takes no {value.dtype}")
    for node in region.outputs:
        if any(not value.numel() for value in _tensors(node)):
            raise Unsupported(f"{_named(node)}: a result without elements")
    if not any(_tensors(node) for node in region.inputs):
        raise Unsupported("a region without inputs")


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _named(node: fx.Node) -> str:
    return node.name if node.op == "placeholder" else str(node.target)
