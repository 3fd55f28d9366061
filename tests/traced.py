"""Regions from Python functions, as a pass would make them from a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphshard import fake
from graphshard.codegen.triton import write_kernel
from graphshard.execution import Kernel
from graphshard.program import NodeInfo
from graphshard.region import Region
from interpreted import Interpreter

TOLERANCE = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (3e-5, 3e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),  # ATen rounds after every operator, a kernel where it stores
}
"""Relative and absolute, by dtype of a result."""


def region_from(function: Callable[..., Any], *arguments: Tensor) -> Region:
    """The region of what ``function`` does to tensors of these shapes, strides and dtypes."""
    mode = fake.new_mode()
    with mode:
        fakes = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype) for a in arguments]
        graph = make_fx(function)(*fakes).graph
    output = graph.output_node()
    result = output.args[0]
    results = result if isinstance(result, tuple | list) else (result,)
    output.args = (tuple(node for node in results if node is not None),)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta["info"] = NodeInfo()
    return Region(graph)


def check(
    interpreter: Interpreter,
    function: Callable[..., Any] | Region,
    *arguments: Tensor,
    in_place: Mapping[int, int] | None = None,
    scale: float = 1.0,
) -> Kernel:
    """Run the region's kernel, and compare with what the region means: values, dtypes, shapes and strides."""
    region = function if isinstance(function, Region) else region_from(function, *arguments)
    kernel = write_kernel(region, "region", in_place)
    meaning = region(*arguments)
    expected = meaning if isinstance(meaning, tuple) else (meaning,)
    inexact = [a.dtype for a in arguments if a.dtype.is_floating_point and a.dim()]
    results, left = interpreter(kernel, arguments)
    for at, (got, want) in enumerate(zip(results, expected, strict=True)):
        label = f"result {at} of\n{region.graph}\n{kernel.source}"
        source = (in_place or {}).get(at)
        assert got.dtype == want.dtype and got.shape == want.shape, label
        if source is not None:
            assert torch.allclose(got, left[source], 0, 0, equal_nan=True), label
        elif want.numel() and not _overlaps(want):
            assert _strides(got) == _strides(region.outputs[at].meta["val"]), label
        exact = not want.dtype.is_floating_point
        rtol, atol = (0.0, 0.0) if exact else max(TOLERANCE[dtype] for dtype in (want.dtype, *inexact))
        torch.testing.assert_close(
            got,
            want,
            rtol=rtol * scale,
            atol=atol * scale,
            equal_nan=True,
            msg=lambda m: f"{m}\n{label}",  # noqa: B023
        )
    for at, (before, after) in enumerate(zip(arguments, left, strict=True)):
        if at not in (in_place or {}).values():
            assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"input {at} was written to\n{kernel.source}"
    return kernel


def _strides(value: Tensor) -> list[int]:
    return [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]


def _overlaps(value: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))
