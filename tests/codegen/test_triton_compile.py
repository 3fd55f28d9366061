"""Kernels compile for GPUs that are not there, without registers spilled; files are whole and named by content."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphshard
from graphshard.codegen.triton import write_kernel
from graphshard.codegen.triton_compile import compile_for, load_kernel
from graphshard.passes.fuse import Fuse
from graphshard.runtime import segments
from marks import has_triton
from templates import TEMPLATES

QUICK = {
    ("90", name)
    for name in (
        *("layer_norm_backward", "cross_entropy", "adamw", "gelu_backward", "softmax", "packing"),
        *("activations", "activations_backward"),
    )
}
QUICK |= {(name, "adamw") for name in ("80", "100", "gfx942")}
"""What the whole suite compiles of the matrix of GPUs and templates; the rest is ``full``."""


def target(name: str) -> Any:
    """The GPU that a test compiles for."""
    compiler = pytest.importorskip("triton.backends.compiler")
    return compiler.GPUTarget("hip", name, 64) if name.startswith("gfx") else compiler.GPUTarget("cuda", int(name), 32)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, marks=() if (name, make) in QUICK else pytest.mark.full)
        for name in ("80", "90", "100", "gfx942")
        for make in TEMPLATES
    ],
)
def test_compiles_without_spills(tmp_path: Path, name: str, make: str) -> None:
    region, in_place = TEMPLATES[make]()
    kernel = write_kernel(region, make, in_place)
    launches = compile_for(kernel, region, target(name), tmp_path)
    assert launches
    for launch in launches:
        # Powers that two numbers take, for which older compilers call a function, once in a step.
        call_bytes = 8 if (name, make) == ("80", "adamw") and not has_triton("3.9") else 0
        assert launch.spills is not None and launch.spills <= call_bytes, f"{launch}\n{kernel.source}"
        assert launch.registers and launch.binary, f"{launch}\n{kernel.source}"


def test_files_are_named_by_what_they_hold(tmp_path: Path) -> None:
    region, _ = TEMPLATES["softmax"]()
    kernel = write_kernel(region, "same")
    first = load_kernel(kernel, tmp_path)
    written = list(tmp_path.glob("same_*.py"))
    assert [path.read_text() for path in written] == [kernel.source]
    stamp = written[0].stat().st_mtime_ns
    assert load_kernel(kernel, tmp_path).__name__ == first.__name__ == "same"
    assert written[0].stat().st_mtime_ns == stamp
    load_kernel(write_kernel(region, "same", autotune=True), tmp_path)
    assert len(list(tmp_path.glob("same_*.py"))) == 2


@pytest.mark.parametrize("autotune", [True, False])
def test_tuning_is_asked_of_the_pass_and_explained(autotune: bool) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24))
    compiled = graphshard.compile(
        model,
        loss_fn=F.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        executor="none",
        device="cuda",
        passes=[Fuse(autotune=autotune)],
        example_inputs=(torch.empty(8, 16, device="meta"), torch.empty(8, 24, device="meta")),
    )
    (line,) = [line for line in compiled.explain().splitlines() if "x fused_gelu_native_layer_norm" in line]
    assert ("autotuned" in line) is autotune
    assert ("4 rows, 32 a program" in line) is not autotune


def test_what_searching_found_is_explained_and_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself needs a GPU: here it has been."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(segments, "KERNELS", tmp_path / "kernels")
    compiled = graphshard.compile(
        nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.LayerNorm(24)),
        loss_fn=F.mse_loss,
        executor="none",
        device="cuda",
        passes=[Fuse(autotune=True)],
        example_inputs=(torch.zeros(8, 16), torch.zeros(8, 24)),
    )
    plan = compiled.execution_plan
    functions = segments.compile_segments(plan.stages[0].segments, plan.kernels)
    assert " found " not in compiled.explain()
    (name,) = [name for name in plan.kernels if name.startswith("fused_gelu_native_layer_norm")]
    segment: Any = next(iter(functions.values()))
    kernel = getattr(segment.__globals__["kernels"], name)
    search = kernel.__globals__[f"{name}_kernel"]
    config = triton.Config({"ROWS": 2}, num_warps=8)
    search.cache[(*range(len(search.keys)), "torch.float32")] = config
    found = f"{name}_kernel found ROWS=2, 8 warps for {search.keys[0]}=0"
    assert found in compiled.explain()
    compiled.dump(tmp_path / "dump")
    assert found in (tmp_path / "dump" / "kernels.py").read_text()


def test_a_directory_is_made_where_it_can_be(tmp_path: Path) -> None:
    kernel = write_kernel(TEMPLATES["softmax"]()[0], "somewhere")
    assert callable(load_kernel(kernel, tmp_path / "missing"))
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError, match="file"):
        load_kernel(kernel, tmp_path / "file" / "below")
