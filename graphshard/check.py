"""Translation validation: what a pass made of a program means what the program meant before.

Both are run on the same random inputs (Pnueli, Siegel and Singerman 1998, "Translation Validation": prove the run of a
compiler, not the compiler; here by testing, as the programs are numeric). A sum over ranks may associate differently;
a pass that declares ``exact`` may not change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from graphshard import rounding
from graphshard.diff.alignment import Alignment
from graphshard.errors import NodeFailed, NotEquivalent, NotFinite, RoundsTooMuch, TooLargeToCheck
from graphshard.pipeline import Context, Pass, run_passes
from graphshard.program import Level, Program, Role, Slot, info, tensors, val
from graphshard.reference import Results, run
from graphshard.reference_inputs import Inputs, random_inputs
from graphshard.rewrite import copied, set_outputs

aten = torch.ops.aten

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
    _compare(before, after, run(before, given), _run_after(after, given, pass_name), exact, pass_name)


def check_rounding(program: Program) -> str:
    """Run ``program`` in its own dtypes, too, where those are lower than float32, and compare losses; a line about it.

    Raises:
        RoundsTooMuch: a loss is not finite, or another than in float64 by more than the dtype's tolerance.
        NotFinite: in float64 it is NaN or infinite.
    """
    dtype = rounding.lower_precision(program)
    if dtype is None:
        return ""
    name, tolerance = rounding.LOWER[dtype], rounding.tolerance(dtype)
    given, expected = _first_run(program, None)
    try:
        found = run(program, given, wide=False)
        if not all(map(isfinite, rounding.losses(found))):  # in a deep model random weights may be too large for fp16
            given = replace(given, params={key: value * 0.1 for key, value in given.params.items()})
            expected, found = run(program, given), run(program, given, wide=False)
    except NodeFailed as failed:  # not every operator of a GPU is there for CPUs
        return f"not run in {name}: {failed.what}"
    if wrong := rounding.wrong(rounding.losses(found), rounding.losses(expected), tolerance):
        raise RoundsTooMuch(name, tolerance, wrong)
    return f"losses in {name} within {tolerance:.2g} of those in float64"


def require_fits(program: Program, limit_gb: float) -> None:
    """Whether all ranks of ``program`` fit into this process, in float64, with every value of a micro-batch kept.

    Raises:
        TooLargeToCheck: they take more than ``limit_gb`` times 10^9 bytes.
    """
    stored = 4 * sum(p.numel for p in program.params.values()) * program.mesh.world_size  # with gradients and state
    values = [t.numel() for node in program.body.graph.nodes if node.op != "output" for t in tensors(val(node))]
    held = 8e-9 * (stored + sum(values) * program.mesh.dp_size)
    if held > limit_gb:
        raise TooLargeToCheck(held, limit_gb)


def check_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    inputs: Inputs | None = None,
    observe: Callable[[Program], object] | None = None,
) -> Iterator[Pass]:
    """Run ``passes`` one after the other, and give each that was found to keep the program's meaning.

    Gradients are compared by themselves: clipping, and updates by sign, hide their scale from the parameters.

    Args:
        inputs: None: random values; positive ones if others have no finite loss.
        observe: is given the program after each pass.

    Raises:
        NotEquivalent: naming the first pass that does not.
        NotFinite: on ``inputs`` the loss is NaN or infinite.
    """
    program = _with_gradients(program)
    given, expected = _first_run(program, inputs)
    for item in passes:
        after = run_passes(copied(program), [item], ctx)
        found = _run_after(after, given, item.name)
        _compare(program, after, expected, found, item.exact, item.name)
        program, expected = after, found
        if observe is not None:
            observe(after)
        yield item


def _first_run(program: Program, inputs: Inputs | None) -> tuple[Inputs, Results]:
    """``inputs``, or random ones on which the loss is finite, and what ``program`` makes of them."""
    choices = [inputs] if inputs is not None else [random_inputs(program), random_inputs(program, positive=True)]
    for given in choices:
        results = run(program, given)
        losses = [copies[0] for what, copies in results.values.items() if what.startswith("loss of step")]
        if all(loss.isfinite() for loss in losses):
            return given, results
    raise NotFinite(next(loss.item() for loss in losses if not loss.isfinite()))


def _with_gradients(program: Program) -> Program:
    """``program``, a captured one, that also returns every gradient that it accumulates."""
    if program.level is not Level.CAPTURED:
        return program
    program = copied(program)
    for section in program.updates():
        outputs = section.outputs
        for node, slot in section.inputs.items():
            if slot.role is Role.CARRY and slot.name.startswith("grad:"):
                outputs.setdefault(Slot(Role.OUTPUT, slot.name), node)
        set_outputs(section, outputs)
    return program


def _run_after(program: Program, inputs: Inputs, pass_name: str) -> Results:
    """As :func:`run`, for a program whose predecessor ran: if it does not, the pass is at fault."""
    try:
        return run(program, inputs)
    except NodeFailed as failed:
        raise NotEquivalent(pass_name, f"it cannot be run: {failed.what}", "") from failed


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
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    if exact:  # of zeros the sign, too; one NaN is as good as another
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(
            a.nan_to_num(0.0).view(torch.int64), b.nan_to_num(0.0).view(torch.int64)
        )
    largest = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
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
