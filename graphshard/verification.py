"""Checks a compiled program from its first pass to its plan: what ``Compiled.verify`` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from graphshard import postconditions
from graphshard.check import RTOL, check_passes, check_rounding, require_fits
from graphshard.errors import TooLargeToCheck
from graphshard.execution import ExecutionPlan
from graphshard.pipeline import COMMUNICATION, Context, Pass, placement_of
from graphshard.program import PassRecord, Program
from graphshard.prove import prove
from graphshard.rounding import lower_precision
from graphshard.shrink import shrunk

logger = logging.getLogger("graphshard")

CHECK_GB = 4.0
"""What all ranks in one process may take for a check, in 10^9 bytes, unless the caller says otherwise."""


@dataclass(frozen=True)
class Subject:
    """What is checked: a training program and one of evaluation before the passes, and what became of the first."""

    before: Program
    evaluation: Program
    passes: list[Pass]
    ctx: Context
    after: Program
    plan: ExecutionPlan


def verify_all(subject: Subject, full_size: bool, limit_gb: float, report: Callable[[str], object]) -> None:
    """Check every pass, the postconditions and the plan; ``Compiled.verify`` says what is raised."""
    seen: list[Program] = []
    program, ctx = sized(subject.before, subject.ctx, subject.after, full_size, limit_gb)
    for item in check_passes(program, subject.passes, ctx, observe=seen.append):
        aside = ", in float64: rounding aside" if lower_precision(seen[-1]) else ""
        report(f"{item.name:<16} {'the same to the bit' if item.exact else f'the same within {RTOL:g}'}{aside}")
    if line := check_rounding(seen[-1]) if seen else "":
        report(f"{'rounding':<16} {line}")
    for ours, checked in zip(subject.after.history, seen, strict=True):
        _warn_if_other(ours, checked.history[-1])
    placed = Context(subject.ctx.mesh, placement_of(subject.after))
    evaluation, placed = sized(subject.evaluation, placed, subject.after, full_size, limit_gb)
    if list(check_passes(evaluation, subject.passes, placed)):
        report(f"{'evaluation':<16} the same after every pass")
    for condition in postconditions.of(subject.after):
        report(f"{'graphs':<16} {condition.what}")
    prove(subject.plan)
    instructions = sum(len(stage.step()) for stage in subject.plan.stages)
    report(f"{'plan':<16} proved: {instructions} instructions on {subject.after.mesh}")


def sized(program: Program, ctx: Context, after: Program, full_size: bool, limit_gb: float) -> tuple[Program, Context]:
    """What to check: ``program`` as it is if it fits, else smaller, with parameters where ``after`` has them.

    Raises:
        TooLargeToCheck: it takes more than ``limit_gb``, and ``full_size`` forbids smaller ones.
    """
    try:
        require_fits(program, limit_gb)
    except TooLargeToCheck:
        if full_size:
            raise
        program = shrunk(program, limit_gb)
        ctx = Context(program.mesh, replace(placement_of(after), buckets={}))  # of other sizes
    return program, ctx


def _warn_if_other(ours: PassRecord, checked: PassRecord) -> None:
    for what in COMMUNICATION:
        mine, theirs = ours.changes.get(what, 0), checked.changes.get(what, 0)
        if mine != theirs:
            logger.warning(
                "graphshard: pass %r was checked at a smaller size, where it made %+d %s, and not %+d as in the "
                "program that runs: verify(full_size=True) checks that",
                ours.name, theirs, what, mine,
            )  # fmt: skip
            return
