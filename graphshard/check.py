"""Translation validation: what a pass made of a program means what the program meant before.

Both are run on the same random inputs (Pnueli, Siegel and Singerman 1998, "Translation Validation": prove the run of a
compiler, not the compiler; here by testing, as the programs are numeric). A sum over ranks may associate differently;
a pass that declares ``exact`` may not change a bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphshard.alignment import Alignment
from graphshard.errors import NotEquivalent
from graphshard.pipeline import Context, Pass, run_passes
from graphshard.program import Program, info
from graphshard.reference import Results, run
from graphshard.reference_inputs import Inputs, random_inputs
from graphshard.rewrite import copied

RTOL, ATOL = 1e-9, 1e-10
"""Of float64, relative to the largest element: sums associate differently, what is wrong is off by far more."""


def check(
    before: Program, after: Program, *, exact: bool = False, inputs: Inputs | None = None, pass_name: str = ""
) -> None:
    """Run both programs for two steps on all ranks and compare losses, outputs, parameters, state and buffers.

    Args:
        exact: every bit must be the same.
        inputs: what to run on; None: random values of the right shapes.
        pass_name: the pass between them, for messages.

    Raises:
        NotEquivalent: what differs, by how much, and the first node that does.
    """
    given = inputs if inputs is not None else random_inputs(before)
    _compare(before, after, run(before, given), run(after, given), exact, pass_name)


def check_passes(program: Program, passes: list[Pass], ctx: Context, inputs: Inputs | None = None) -> Iterator[Pass]:
    """Run ``passes`` one after the other, and give each that was found to keep the program's meaning.

    Raises:
        NotEquivalent: naming the first pass that does not.
    """
    given = inputs if inputs is not None else random_inputs(program)
    expected = run(program, given)
    for item in passes:
        after = run_passes(copied(program), [item], ctx)
        found = run(after, given)
        _compare(program, after, expected, found, item.exact, item.name)
        program, expected = after, found
        yield item


def _compare(before: Program, after: Program, expected: Results, found: Results, exact: bool, pass_name: str) -> None:
    missing = [name for name in expected.values if name not in found.values]
    left_over = [name for name in found.values if name not in expected.values]
    for names, problem in ((missing, "is gone"), (left_over, "was not there before")):
        if names:
            raise NotEquivalent(pass_name, f"{names[0]} {problem}", "")
    for name, copies in found.values.items():
        reference = expected.values[name][0]
        for copy in copies:
            if not _same(reference, copy, exact):
                what = f"{name} differs {_by(reference, copy)}"
                raise NotEquivalent(pass_name, what, _first_difference(before, after, expected, found, exact))


def _same(a: Tensor, b: Tensor, exact: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if exact or not a.dtype.is_floating_point:
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    largest = a.abs().max().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=RTOL * largest + ATOL, equal_nan=True)


def _by(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"in type: {a.dtype} {list(a.shape)} before, {b.dtype} {list(b.shape)} after"
    error = (a.double() - b.double()).abs().max().item()
    return f"by {error:.2e} of {a.abs().max().item():.2e}"


def _first_difference(before: Program, after: Program, expected: Results, found: Results, exact: bool) -> str:
    """The first node after whose value is not that of the node it was before; "" if all that can be compared agree."""
    alignment = Alignment(before, after)
    for item in alignment.after:
        partner = alignment.partner.get(item.node)
        if partner is None or item.node not in found.seen or partner.node not in expected.seen:
            continue
        ours, theirs = found.seen[item.node], expected.seen[partner.node]
        comparable = isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape
        if comparable and not _same(theirs, ours, exact):
            module = f" of module {info(item.node).module}" if info(item.node).module else ""
            return f"%{item.node.name} = {item.node.target}{module}, graph {item.section}"
    return ""
