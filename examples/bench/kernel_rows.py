"""Norms, softmax, SwiGLU and cross-entropy, forward and backward, on shapes of models that people train."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from generated import Function, Written, function_code
from llama import rms_norm
from speed_rows import ALONE, COPY, EAGER, INDUCTOR, LIGER, OURS, Record, Row, Setting, forget
from timing import Run, Timer, timer_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 0.06, torch.float32: 1e-3}
"""Of the largest element: what a kernel may be off from torch's operators one by one, by the coarsest dtype there."""

Shape = tuple[int, int]
PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """A function of ``matrices`` of one shape, [rows, cols], and of ``vectors`` of [cols]; a loss also takes a class
    for each row, and gives a scalar."""

    function: Function
    shapes: Mapping[str, Sequence[Shape]]  # by scale
    matrices: int = 1
    vectors: int = 0
    loss: bool = False
    liger: Callable[[Any], Function] | None = None  # from the module of its functions

    def operands(self, shape: Shape) -> list[tuple[int, ...]]:
        return [shape] * self.matrices + [shape[1:]] * self.vectors

    def nbytes(self, shape: Shape, phase: str, itemsize: int) -> int:
        """The least that has to be moved: every operand read, every result written, once."""
        inputs = sum(torch.Size(one).numel() for one in self.operands(shape))
        result = 1 if self.loss else shape[0] * shape[1]
        return (inputs + result + (inputs if phase == "backward" else 0)) * itemsize


_NORM = {"full": [(8192, 1024), (8192, 4096), (4096, 8192)], "quick": [(2048, 2048)], "tiny": [(4, 64)]}

CASES: Mapping[str, Case] = {
    "layer norm": Case(
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        _NORM,
        vectors=2,
        liger=lambda module: lambda x, weight, bias: module.liger_layer_norm(x, weight, bias, 1e-5),
    ),
    "RMS norm": Case(
        rms_norm,
        _NORM,
        vectors=1,
        liger=lambda module: lambda x, weight: module.liger_rms_norm(x, weight, 1e-5, in_place=False),
    ),
    "SwiGLU": Case(
        lambda gate, up: F.silu(gate) * up,
        {"full": [(8192, 5632), (8192, 8192), (4096, 14336)], "quick": [(2048, 4096)], "tiny": [(4, 64)]},
        matrices=2,
        liger=lambda module: module.liger_swiglu,
    ),
    "softmax": Case(
        lambda x: torch.softmax(x, -1),
        {"full": [(32768, 1024), (16384, 4096), (2048, 32768)], "quick": [(4096, 1024)], "tiny": [(4, 64)]},
        liger=lambda module: module.liger_softmax,
    ),
    "cross-entropy": Case(
        lambda logits, classes: F.cross_entropy(logits.float(), classes),
        {"full": [(1024, 128256), (4096, 128256), (8192, 128256)], "quick": [(256, 128256)], "tiny": [(4, 64)]},
        loss=True,
        liger=lambda module: module.liger_cross_entropy,
    ),
}


def kernel_rows(name: str, setting: Setting, record: Record) -> None:
    """A row for forward and one for backward of every shape and dtype."""
    timer = timer_of(setting.device)
    for dtype in DTYPES:
        for shape in CASES[name].shapes[setting.scale]:
            title = f"{dtype} {list(shape)}"
            if record.has_time(title):
                _measure(CASES[name], shape, DTYPES[dtype], title, timer, setting, record)
                forget(setting.device)


def _measure(
    case: Case, shape: Shape, dtype: torch.dtype, title: str, timer: Timer, setting: Setting, record: Record
) -> None:
    device = setting.device
    rows = {phase: record.row(f"{title} {phase}") for phase in PHASES}
    runs: dict[str, dict[str, Run]] = {phase: {} for phase in PHASES}
    written = record.attempt(rows["forward"], OURS, partial(_written, case, shape, dtype)) or {}
    for part, code in written.items():
        phase, _, alone = part.partition(" ")
        contender = ALONE if alone else OURS
        rows[phase].facts[contender] = code.told
        run = record.attempt(rows[phase], contender, partial(checked, code, device))
        if run is not None:
            runs[phase][contender] = run
    for contender, function in _peers(case, setting).items():
        made = record.attempt(rows["forward"], contender, partial(_peer, case, shape, dtype, function, device))
        if made is not None:
            runs["forward"][contender], runs["backward"][contender] = made
    for phase, row in rows.items():
        row.facts["bytes"] = case.nbytes(shape, phase, dtype.itemsize)
        runs[phase][COPY] = copying(row.facts["bytes"], device)
        compare(timer, runs[phase], row, record)


def _written(case: Case, shape: Shape, dtype: torch.dtype) -> dict[str, Written]:
    other = torch.zeros(shape[0], dtype=torch.int64) if case.loss else torch.empty(shape, dtype=dtype, device="meta")
    return function_code(case.function, case.operands(shape), dtype, other)


def _peers(case: Case, setting: Setting) -> dict[str, Function]:
    torch._dynamo.reset()
    backend = "inductor" if setting.device.type == "cuda" else "eager"  # a CPU has nothing to compare here
    peers = {EAGER: case.function, INDUCTOR: torch.compile(case.function, dynamic=False, backend=backend)}
    if case.liger is not None and setting.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        peers[LIGER] = case.liger(importlib.import_module("liger_kernel.transformers.functional"))
    return peers


def _peer(case: Case, shape: Shape, dtype: torch.dtype, function: Function, device: torch.device) -> tuple[Run, Run]:
    """Forward, as training runs it, and backward, each by itself."""
    operands = [torch.rand(one, dtype=dtype, device=device).requires_grad_() for one in case.operands(shape)]
    others = [torch.randint(64, shape[:1], device=device)] if case.loss else []
    forward = partial(function, *operands, *others)
    with torch._functorch.config.patch(donated_buffer=False):  # the backward runs again on what was saved
        out = forward()
        grad = torch.rand_like(out)
        backward = partial(torch.autograd.grad, out, operands, grad, retain_graph=True)
        backward()
    return forward, backward


def copying(nbytes: int, device: torch.device) -> Run:
    """Move ``nbytes``, half of them read."""
    source = torch.zeros(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    target: Tensor = torch.empty_like(source)
    return partial(target.copy_, source)


def compare(timer: Timer, runs: Mapping[str, Run], row: Row, record: Record) -> None:
    """Put the times of those that run at all into ``row``."""
    for name, run in runs.items():
        record.attempt(row, name, run)
    able = {name: run for name, run in runs.items() if name not in row.failed}
    row.seconds |= record.attempt(row, COPY, partial(timer.compare, able)) or {}
    record.save()


def checked(written: Written, device: torch.device) -> Run:
    """A run of the code on arguments of its own.

    Raises:
        AssertionError: it does not give what its operations give one by one.
    """
    arguments = written.arguments(device)
    run = written.runner(device)
    expected = written.expected([argument.clone() for argument in arguments], device)
    results = run([argument.clone() for argument in arguments])
    rounded = [argument.dtype for argument in arguments]
    for node, have, want in zip(written.outputs, results, expected, strict=True):
        tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in (want.dtype, *rounded))
        off, most = (have.double() - want.double()).abs().max().item(), want.double().abs().max().item()
        assert off <= tolerance * max(most, 1e-6), f"{node.name} is off by {off:.2e} where values reach {most:.2e}"
    return partial(run, arguments)
