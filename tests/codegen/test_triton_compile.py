"""Kernels compile for GPUs that are not there, without registers spilled; files are whole and named by content."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphshard
from graphshard.codegen.triton import write_kernel
from graphshard.codegen.triton_compile import compile_for, load_kernel
from graphshard.passes.fuse import Fuse
from graphshard.region import Region
from traced import region_from

aten = torch.ops.aten
gs = torch.ops.graphshard
half = torch.bfloat16


def target(name: str) -> Any:
    """The GPU that a test compiles for."""
    compiler = pytest.importorskip("triton.backends.compiler")
    return compiler.GPUTarget("hip", name, 64) if name.startswith("gfx") else compiler.GPUTarget("cuda", int(name), 32)


def layer_norm_backward() -> Region:
    """Of a hidden size of 4096, in bf16, with the sums of weight and bias."""

    def function(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Any:
        return aten.native_layer_norm_backward(grad, x, [4096], mean, rstd, weight, weight, [True] * 3)

    x = torch.empty(2048, 4096, dtype=half, device="meta")
    row = torch.empty(2048, 1, device="meta", dtype=half)
    return region_from(function, x, x, row, row, x[0])


def cross_entropy() -> Region:
    """Of a vocabulary of 128,256, in bf16."""

    def function(logits: Tensor, labels: Tensor) -> Any:
        return aten.nll_loss_forward(torch.log_softmax(logits.float(), -1), labels, None, 1, -100)

    return region_from(
        function,
        torch.empty(8192, 128256, dtype=half, device="meta"),
        torch.empty(8192, dtype=torch.int64, device="meta"),
    )


def update() -> Region:
    """AdamW on a flat shard, with bias corrections computed once, and the cast to bf16."""

    def function(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, lr: Tensor) -> list[Tensor]:
        step = step + 1
        m = torch.lerp(m, g.float(), 0.1)
        v = torch.addcmul(v * 0.999, g.float(), g.float(), value=0.001)
        root = v.sqrt() / (1 - torch.pow(0.999, step)).sqrt() + 1e-8
        p = p * (1 - lr * 0.01) - lr / (1 - torch.pow(0.9, step)) * (m / root)
        return [p, m, v, step, p.to(half)]

    flat = torch.empty(1 << 20, device="meta")
    scalar = torch.empty((), dtype=torch.float64, device="meta")
    return region_from(function, flat, flat.to(half), flat, flat, scalar, scalar)


def gelu_and_its_gradient() -> Region:
    """Both kinds, over a transposed operand."""

    def function(grad: Tensor, x: Tensor) -> list[Tensor]:
        return [aten.gelu_backward(grad, x.T), F.gelu(x.T, approximate="tanh"), F.silu(x.T)]

    x = torch.empty(4096, 1024, dtype=half, device="meta")
    return region_from(function, torch.empty(1024, 4096, dtype=half, device="meta"), x)


def softmax() -> Region:
    """Of rows of 8192 in float32, the largest that a block holds with their gradient."""
    return region_from(lambda x: torch.softmax(x, -1), torch.empty(4096, 8192, device="meta"))


def packing() -> Region:
    """The norm of three parts, and their bf16 copies side by side."""

    def function(*parts: Tensor) -> list[Tensor]:
        return [gs.sq_norm(parts), gs.pack([p.to(half) for p in parts], [0, 5000, 10000], 20000)]

    return region_from(function, *(torch.empty(n, device="meta") for n in (5000, 4096, 10000)))


REGIONS = (layer_norm_backward, cross_entropy, update, gelu_and_its_gradient, softmax, packing)
FIRST = {("90", region) for region in REGIONS} | {(name, update) for name in ("80", "100", "gfx942")}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, marks=() if (name, make) in FIRST else pytest.mark.full)
        for name in ("80", "90", "100", "gfx942")
        for make in REGIONS
    ],
)
def test_compiles_without_spills(tmp_path: Path, name: str, make: Callable[[], Region]) -> None:
    region = make()
    kernel = write_kernel(region, make.__name__)
    launches = compile_for(kernel, region, target(name), tmp_path)
    assert launches
    for launch in launches:
        assert launch.spills == 0 and launch.registers and launch.binary, f"{launch.name}: {launch}\n{kernel.source}"


def test_files_are_named_by_what_they_hold(tmp_path: Path) -> None:
    region = softmax()
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


def test_a_directory_is_made_where_it_can_be(tmp_path: Path) -> None:
    kernel = write_kernel(softmax(), "somewhere")
    assert callable(load_kernel(kernel, tmp_path / "missing"))
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError, match="file"):
        load_kernel(kernel, tmp_path / "file" / "below")
