"""From a segment's source text to a function, so that tracebacks show its lines."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Mapping

import torch

import graphshard.ops  # noqa: F401  (segments call torch.ops.graphshard)
from graphshard.execution import Segment
from graphshard.runtime import products

SegmentFunction = Callable[[list[torch.Tensor], Mapping[str, int], torch.device], tuple[torch.Tensor, ...]]


Watcher = Callable[[str, torch.Tensor], None]
"""Is shown the values of a segment by name, where lowering was asked for that."""


def compile_segment(segment: Segment, watch: Watcher | None = None) -> SegmentFunction:
    """The function that ``segment.source`` defines under the segment's name."""
    digest = hashlib.sha256(segment.source.encode()).hexdigest()[:8]
    filename = f"<segment {segment.name} {digest}>"
    # No modification time: linecache keeps the lines for good instead of looking for a file.
    linecache.cache[filename] = (len(segment.source), None, segment.source.splitlines(keepends=True), filename)
    namespace: dict[str, object] = {"torch": torch, "products": products, "watch": watch}
    exec(compile(segment.source, filename, "exec"), namespace)
    function: SegmentFunction = namespace[segment.name]  # type: ignore[assignment]
    return function


def compile_segments(segments: Mapping[str, Segment], watch: Watcher | None = None) -> dict[str, SegmentFunction]:
    """All functions of a stage by segment name."""
    return {name: compile_segment(segment, watch) for name, segment in segments.items()}
