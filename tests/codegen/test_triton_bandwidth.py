"""What the benchmark of a GPU launches, at its own shapes, compiled for a GPU that is not there: elements are moved 16
bytes at a time, nothing is spilled, and no matrix goes through memory that the operands or the result is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from generated import Written, function_code, update_code
from graphshard.codegen import kernels as kernels_module
from graphshard.codegen.triton import write_kernel
from graphshard.codegen.triton_compile import Compiled, compile_for
from graphshard.execution import Kernel
from graphshard.region import Region
from kernel_rows import CASES, DTYPES
from marks import has_triton
from update_rows import PARAMETERS, PLANS

LONG = 65536
"""Elements from which on a tensor takes time: those of rows or columns are fewer."""

QUICK = {("layer norm", "bf16", 0), ("RMS norm", "bf16", 1), ("SwiGLU", "bf16", 0), ("softmax", "fp32", 2)}
QUICK |= {("cross-entropy", dtype, 2) for dtype in DTYPES}

Regions = Mapping[str, tuple[Kernel, Region]]


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> Regions:
    """The kernels that are written meanwhile, by name, and what each computes."""
    found: dict[str, tuple[Kernel, Region]] = {}

    def noted(region: Region, name: str, *args: Any, **kwargs: Any) -> Kernel:
        kernel = write_kernel(region, name, *args, **kwargs)
        found[name] = kernel, region
        return kernel

    monkeypatch.setattr(kernels_module, "write_kernel", noted)
    return found


def code_of(name: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Written]:
    case = CASES[name]
    other = torch.zeros(shape[0], dtype=torch.int64) if case.loss else torch.empty(shape, dtype=dtype, device="meta")
    return function_code(case.function, case.operands(shape), dtype, other)


def launches(written: Written, regions: Regions, tmp_path: Path) -> list[Compiled]:
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    made = [compile_for(*regions[name], target, tmp_path) for name in written.kernels]
    return [launch for kernel in made for launch in kernel]


def tensors(launch: Compiled) -> list[torch.Tensor]:
    return [argument for argument in launch.arguments if isinstance(argument, torch.Tensor)]


def narrow(launch: Compiled) -> list[str]:
    """Accesses to global memory of less than 16 bytes."""
    found = re.findall(r"\b(?:ld|st)\.global\S*", launch.assembly)
    return [access for access in found if not access.endswith((".v4.b32", ".v2.b64"))]


def moves_wide(launch: Compiled) -> bool:
    """Whether it reads and writes all that is long 16 bytes at a time: a thread that did not would have several
    accesses for one. What there is one of for a row takes one each, and so does what is picked from a row; before
    triton 3.9 a thread has one for each of its elements of what there is one of for a column."""
    few = [tensor for tensor in tensors(launch) if tensor.numel() < LONG]
    return len(narrow(launch)) <= (2 if has_triton("3.9") else 16) * len(few) + 1


@pytest.mark.parametrize(
    ("name", "dtype", "at"),
    [
        pytest.param(name, dtype, at, marks=() if (name, dtype, at) in QUICK else pytest.mark.full)
        for name in CASES
        for dtype in DTYPES
        for at in range(3)
    ],
)
def test_kernels_move_no_more_than_they_must(name: str, dtype: str, at: int, regions: Regions, tmp_path: Path) -> None:
    case = CASES[name]
    shape = case.shapes["full"][at]
    written = code_of(name, shape, DTYPES[dtype])
    for phase in ("forward", "backward"):
        made = launches(written[phase], regions, tmp_path)
        assert made, f"{phase} is torch's own operators"
        for launch in made:
            assert launch.spills == 0
            assert moves_wide(launch), f"{launch.name}: {narrow(launch)}"
        moved = {id(t): t.nbytes for launch in made for t in tensors(launch) if t.numel() >= prod(shape)}
        # Over an operand that nobody reads any more the result is written: it is one tensor then.
        assert sum(moved.values()) <= case.nbytes(shape, phase, DTYPES[dtype].itemsize)
        assert len([launch for launch in made if any(t.numel() >= prod(shape) for t in tensors(launch))]) == 1


def test_rows_that_no_block_divides_move_narrowly(regions: Regions, tmp_path: Path) -> None:
    """So that the test above can fail."""
    written = code_of("SwiGLU", (8191, 5631), torch.bfloat16)
    assert not any(moves_wide(launch) for launch in launches(written["forward"], regions, tmp_path))


@pytest.mark.parametrize("plan", PLANS.values())
def test_an_update_is_a_launch_for_each_parameter(plan: str, regions: Regions, tmp_path: Path) -> None:
    shapes = PARAMETERS["full"]
    written = update_code(shapes, plan, partial(torch.optim.AdamW, lr=1e-3))
    source = written.segment.source
    assert source.count("torch.ops.aten") <= 2, source  # the mean of losses
    assert source.count("kernels.") <= len(shapes) + 2, source
    for launch in launches(written, regions, tmp_path):
        assert launch.spills == 0
        scalars = all(tensor.dim() == 0 for tensor in tensors(launch))
        assert scalars or moves_wide(launch), f"{launch.name}: {narrow(launch)}"
