"""What the lower precision of a program's values does to its losses, beside the same losses in float64.

The reference computes in float64, where casts change nothing: it finds what is wrong with a pass, and cannot see what
rounding does. So a program with values in bf16 or fp16 is also run in its own dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

import torch

from graphshard.program import Program, tensors, val
from graphshard.reference import Results

LOWER = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def lower_precision(program: Program) -> torch.dtype | None:
    """The coarsest of bf16 and fp16 that a value of ``program`` has; None if none has either."""
    found = {value.dtype for section in program.sections().values() for n in _values(section.graph) for value in n}
    return next((dtype for dtype in LOWER if dtype in found), None)


def _values(graph: torch.fx.Graph) -> Iterator[list[torch.Tensor]]:
    return (tensors(val(node)) for node in graph.nodes if node.op != "output")


def tolerance(dtype: torch.dtype) -> float:
    """Relative: sixteen times what one rounding may be off by. What is wrong, or overflows, is off by far more."""
    return 16 * torch.finfo(dtype).eps


def losses(results: Results) -> list[float]:
    """The loss of every step, up to the first step that loss scaling skips, if any: what comes after it is another
    training than float64's, which skips none."""
    found = [copies[0].item() for what, copies in results.values.items() if what.startswith("loss of step")]
    return found if results.skipped is None else found[: results.skipped + 1]


def wrong(found: Sequence[float], expected: Sequence[float], tolerance: float) -> str:
    """The first of ``found`` that is not what it should be, relative to ``tolerance``; "" if there is none."""
    for step, (loss, right) in enumerate(zip(found, expected, strict=False)):
        told = f"the loss of step {step} is {loss:.9g}"
        if not isfinite(loss) or not isfinite(right):
            if repr(loss) != repr(right):
                return f"{told} instead of {right:.9g}"
        elif abs(loss - right) > tolerance * max(abs(right), 1.0):
            return f"{told} instead of {right:.9g}"
    return ""
