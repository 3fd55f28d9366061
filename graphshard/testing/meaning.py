"""What a program does on its ranks, and that a pass did not change it. All ranks run in this process, in float64."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphshard.check import check
from graphshard.diff import diff
from graphshard.diff.plain_text import unified
from graphshard.errors import NotEquivalent
from graphshard.pipeline import Context, Pass, parse_passes, run_passes
from graphshard.program import Program
from graphshard.reference import run
from graphshard.reference_inputs import Inputs, random_inputs
from graphshard.rewrite import copied
from graphshard.verify import verify


def apply(passes: str | Sequence[Pass], program: Program, ctx: Context | None = None) -> Program:
    """What ``passes`` make of a copy of ``program``: a pass changes the one it is given.

    Args:
        passes: as on the command line (``"zero:stage=3;bucket"``), or as objects.

    Raises:
        GraphshardError: a pass refuses the program, or what it made of it is not legal.
    """
    return run_passes(copied(program), parse_passes(passes) if isinstance(passes, str) else passes, ctx)


def run_on_ranks(
    program: Program, inputs: Inputs | None = None, *, steps: int = 1, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Run training steps on all ranks of the program's mesh, one graph node after the other.

    Args:
        inputs: parameters, buffers and batches; None: random ones of the right shapes, for ``steps``, from ``seed``.

    Returns:
        By rank, what it holds in the end: ``"loss of step 0"``, ``"param lin.weight"``, ``"state lin.weight exp_avg"``,
        ``"buffer bn.mean @0"`` (of data-parallel rank 0), ``"output 0 of step 0, micro-batch 0 @0"``. Parameters and
        state are whole, however they are sharded. A rank has what its stage has.
    """
    verify(program)
    results = run(program, inputs if inputs is not None else random_inputs(program, steps, seed))
    by_rank: list[dict[str, Tensor]] = [{} for _ in range(program.mesh.world_size)]
    for name, copies in results.values.items():
        for rank, value in zip(results.ranks[name], copies, strict=True):
            by_rank[rank][name] = value
    return by_rank


def assert_same_meaning(before: Program, after: Program, *, exact: bool = False, inputs: Inputs | None = None) -> None:
    """Both programs compute the same: losses, outputs, parameters, optimizer state and buffers of two steps.

    Args:
        exact: to the bit; else up to the order of sums.
        inputs: what to run on; None: random values of the right shapes.

    Raises:
        AssertionError: what differs and the first node that does, and the graphs' difference.
        IllegalProgram: ``after`` breaks a rule of its level.
    """
    verify(after)
    try:
        check(before, after, exact=exact, inputs=inputs)
    except NotEquivalent as error:
        raise AssertionError(f"{error}\n{unified(diff(before, after))}") from None
