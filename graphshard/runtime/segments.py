"""From a segment's source text to a function, so that tracebacks show its lines."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

import graphshard.ops  # noqa: F401  (segments call torch.ops.graphshard)
from graphshard.execution import ExecutionPlan, Kernel, Segment
from graphshard.runtime import products, tuning
from graphshard.source_files import KERNELS, imported

SegmentFunction = Callable[
    [list[torch.Tensor], Mapping[str, int], torch.device, Callable[[int], torch.Tensor]], tuple[torch.Tensor, ...]
]

Watcher = Callable[[str, torch.Tensor], None]
"""Is shown the values of a segment by name, where lowering was asked for that."""


def compile_segments(
    segments: Mapping[str, Segment], kernels: Mapping[str, Kernel], watch: Watcher | None = None
) -> dict[str, SegmentFunction]:
    """All functions of a stage by segment name, which call those of ``kernels``."""
    table = SimpleNamespace(**{name: _kernel(kernel) for name, kernel in kernels.items()})
    known = {"products": products, "kernels": table, "watch": watch}
    return {name: _function(name, segment.source, known) for name, segment in segments.items()}


def _kernel(kernel: Kernel) -> Any:
    if kernel.language == "triton":
        function = getattr(imported(kernel.name, kernel.source, KERNELS), kernel.name)
        tuning.note(kernel, function)
        return function
    return _function(kernel.name, kernel.source, {})


def _function(name: str, source: str, known: Mapping[str, object]) -> Any:
    """The function that ``source`` defines under ``name``."""
    filename = _filename(name, source)
    # No modification time: linecache keeps the lines for good instead of looking for a file.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, object] = {"torch": torch, **known}
    exec(compile(source, filename, "exec"), namespace)
    return namespace[name]


def _filename(name: str, source: str) -> str:
    return f"<{name} {hashlib.sha256(source.encode()).hexdigest()[:8]}>"


def forget_segments(plan: ExecutionPlan, kept: Iterable[ExecutionPlan]) -> None:
    """Let go of the lines of ``plan`` that tracebacks show, but for those that ``kept`` plans have, too."""
    for filename in _filenames(plan).difference(*map(_filenames, kept)):
        linecache.cache.pop(filename, None)


def _filenames(plan: ExecutionPlan) -> set[str]:
    segments = (segment for stage in plan.stages for segment in stage.segments.items())
    functions = [(name, segment.source) for name, segment in segments]
    functions += [(kernel.name, kernel.source) for kernel in plan.kernels.values()]
    return {_filename(name, source) for name, source in functions}
