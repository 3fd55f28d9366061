"""Which of the ways to save memory a plan uses, under a budget per rank: the cheapest whose simulated peak fits.

Every stage has a ladder of settings (ladders.py), the fastest first, and takes the first rung at which the peak that
simulate.py finds in the whole lowered step, with the micro-batches in flight, fits; first_fit.py says which ones are
tried. What the passes make of a rung is known only by running them: all stages try one at a time, a stage's peak being
its own affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from graphshard.analysis import flops_per_moved_byte
from graphshard.codegen.lower import lower
from graphshard.codegen.schedule import Schedule
from graphshard.errors import BudgetTooSmall
from graphshard.execution import variants
from graphshard.fingerprints import collectives_of
from graphshard.memory.first_fit import first_fit
from graphshard.memory.ladders import Away, Levers, Setting, ladders, marked
from graphshard.memory.simulate import MemoryUse, simulate_memory
from graphshard.passes.hoist import Hoist
from graphshard.passes.memory_policy import MemoryPolicy
from graphshard.passes.offload import Offload
from graphshard.passes.pipeline_cut import PipelineCut
from graphshard.pipeline import Context, Pass, run_passes, try_passes
from graphshard.plan import Plan
from graphshard.program import Program
from graphshard.rewrite import copied
from graphshard.units import human

Measure = Callable[[Program], list[MemoryUse] | None]
"""The simulated memory of each stage, of a program that all passes have been through; None: it must not be chosen."""


class NothingAllowed(Exception):
    """All that was tried must not be chosen, whatever it holds."""


@dataclass(frozen=True)
class Budget:
    """How many bytes a rank may hold, and what may be chosen to keep to that."""

    nbytes: int
    levers: Levers
    untried: tuple[str, ...]  # what else may take less memory, for people


def fit(
    program: Program,
    passes: list[Pass],
    ctx: Context,
    plan: Plan,
    schedule: Schedule,
    *,
    on_gpu: bool = False,
    settled: bool = False,
    collectives: int | None = None,
) -> list[Pass]:
    """``passes`` with what ``plan`` leaves to the planner chosen; as they are if it sets no budget. Stages that do not
    fit as their schedule wants them are equal.

    Args:
        settled: where parameters and optimizer state live is not to be chosen any more.
        collectives: see fingerprints.py; the program must have these. Nothing that is about buckets is chosen then, and
            ``passes`` come back as they are if no choice has them.

    Raises:
        BudgetTooSmall: see :func:`choose`.
    """
    if plan.budget_per_rank_bytes is None:
        return passes

    def measure(program: Program) -> list[MemoryUse] | None:
        lowered = lower(program, schedule, on_gpu=on_gpu)
        if collectives not in (None, collectives_of(lowered)):
            return None
        uses = [[simulate_memory(lowered, s, first) for first in variants(lowered)] for s in range(program.stages)]
        return [max(of_stage, key=_peak) for of_stage in uses]

    levers = levers_of(plan, on_gpu)
    if settled or collectives is not None:
        levers = replace(levers, optimizer=(), params=())
    if collectives is not None:
        levers = replace(levers, reshard=False)
    budget = Budget(plan.budget_per_rank_bytes, levers, _untried(plan))
    is_open = not settled and collectives is None  # which stage has which parameter
    equal = _equal_stages(passes) if is_open else passes
    try:
        return choose(program, passes, ctx, budget, schedule, measure)
    except NothingAllowed:
        return passes
    except BudgetTooSmall as error:
        if equal == passes:
            raise
        try:
            return choose(program, equal, ctx, budget, schedule, measure)
        except BudgetTooSmall as other:
            raise min(error, other, key=lambda refusal: refusal.smallest_bytes) from None


def _equal_stages(passes: list[Pass]) -> list[Pass]:
    """``passes`` with equal stages, whatever the schedule."""
    return [replace(item, schedule="") if isinstance(item, PipelineCut) else item for item in passes]


def levers_of(plan: Plan, on_gpu: bool) -> Levers:
    """What a plan with a budget leaves open: all but what it says itself."""
    said = asdict(plan.offload) if plan.offload is not None else {}
    if plan.memory is None:
        return Levers(activations_leave=said.get("activations") or "")
    homes = _homes(on_gpu, plan.memory.path is not None)
    return Levers(
        recompute=plan.recompute is None or plan.recompute.policy == "auto",
        reshard=plan.zero_stage == 3 and plan.budget_gb is None,
        host_bytes=math.inf if plan.memory.host_gb is None else plan.memory.host_gb * 1e9,
        activations_leave=said.get("activations") or "",
        **{name: () if said.get(name) else homes for name in ("optimizer", "params", "activations")},
    )


def _untried(plan: Plan) -> tuple[str, ...]:
    """What a plan with a budget does not do to take less memory."""
    more = {
        "bf16": plan.precision is None,
        "zero3": plan.zero_stage < 3,
        "memory with a path": plan.memory is None or plan.memory.path is None,
    }
    return ("more ranks", "smaller micro-batches", *(way for way, is_open in more.items() if is_open))


def _homes(on_gpu: bool, files: bool) -> tuple[Away, ...]:
    """Where values may go, the nearest first. Host memory is where the CPU's values are already."""
    near = ("cpu",) if on_gpu else ()
    return tuple(Away(home, flops_per_moved_byte(home, on_gpu)) for home in (*near, *(("nvme",) if files else ())))


def choose(
    program: Program, passes: Sequence[Pass], ctx: Context, budget: Budget, schedule: Schedule, measure: Measure
) -> list[Pass]:
    """``passes`` with the options that fit ``budget``; ``program`` is one before the first pass, which is not changed.

    Raises:
        BudgetTooSmall: no rung fits; the message says what the smallest peak is and what dominates it.
        NothingAllowed: ``measure`` allows none.
    """
    return _Search(program, passes, ctx, budget, schedule, measure).run()


class _Search:
    def __init__(
        self,
        program: Program,
        passes: Sequence[Pass],
        ctx: Context,
        budget: Budget,
        schedule: Schedule,
        measure: Measure,
    ) -> None:
        names = [item.name for item in passes]
        at = names.index(MemoryPolicy.name)
        self.program = run_passes(copied(program), passes[:at], ctx)
        self.before, self.rest = list(passes[:at]), list(passes[at:])
        self.ctx, self.budget, self.measure = ctx, budget, measure
        self.seen: dict[tuple[int, ...], list[MemoryUse] | None] = {}
        levers = budget.levers
        about_buckets = levers.reshard or levers.optimizer or levers.params or levers.host_bytes < math.inf
        sharded = try_passes(self.program, self.rest, ctx) if about_buckets else None
        self.ladders = ladders(self.program, sharded, schedule, levers)

    def run(self) -> list[Pass]:
        while (rungs := tuple(map(self._first_fit, range(len(self.ladders))))) not in self.seen:
            trial = try_passes(self.program, self._with(rungs), self.ctx)
            self.seen[rungs] = self.measure(trial)
        uses = self.seen[rungs]
        if uses is None:
            raise NothingAllowed
        stage = max(range(len(uses)), key=lambda s: uses[s].peak_bytes)
        if uses[stage].peak_bytes > self.budget.nbytes:
            self._refuse(stage, rungs[stage], uses[stage])
        return self.before + self._with(rungs)

    def _first_fit(self, stage: int) -> int:
        ladder = self.ladders[stage]
        peaks: dict[int, float] = {}  # other stages should make no difference; if they do, the larger one counts
        for rungs, uses in self.seen.items():
            peak = math.inf if uses is None else uses[stage].peak_bytes
            peaks[rungs[stage]] = max(peaks.get(rungs[stage], 0), peak)
        return first_fit([step.held_bytes for step in ladder], self.budget.nbytes, peaks, marked(ladder))

    def _refuse(self, stage: int, rung: int, use: MemoryUse) -> NoReturn:
        largest = sorted(use.at_peak.items(), key=lambda item: -item[1])[:3]
        held = ", ".join(f"{name} {human(count)}" for name, count in largest)
        least = max(use.peak_bytes, self.ladders[stage][rung].held_bytes)
        raise BudgetTooSmall(self.budget.nbytes, least, stage, held, self.budget.untried)

    def _with(self, rungs: Sequence[int]) -> list[Pass]:
        """The passes from memory-policy on, with each stage on its rung."""
        chosen = [ladder[rung].setting for ladder, rung in zip(self.ladders, rungs, strict=True)]
        return [with_settings(item, chosen, self.budget.levers) for item in self.rest]


def with_settings(item: Pass, chosen: list[Setting], levers: Levers) -> Pass:
    """``item`` with the options that the stages' settings come to."""
    if isinstance(item, MemoryPolicy):
        if levers.recompute:
            levels, blocks = tuple(s.level for s in chosen), tuple(s.blocks for s in chosen)
            instead = tuple(s.policy or "cut" for s in chosen) if any(s.policy for s in chosen) else ()
            item = replace(item, policy="cut", levels=levels, blocks=blocks, instead=instead)
        if levers.activations:
            near = levers.activations[0].home
            leaving = [s.activations.count(near) for s in chosen]
            to_file = [len(s.activations) - n for s, n in zip(chosen, leaving, strict=True)]
            item = replace(item, offload_blocks=tuple(leaving), file_blocks=tuple(to_file) if any(to_file) else ())
        return item
    if isinstance(item, Hoist) and levers.reshard:
        return replace(item, budget_gb=tuple((s.hoist_bytes + 0.5) / 1e9 for s in chosen))
    if isinstance(item, Offload):
        item = _set_buckets(item, "optimizer", [pair for s in chosen for pair in s.optimizer])
        item = _set_buckets(item, "params", [pair for s in chosen for pair in s.params])
        if any(s.activations for s in chosen):
            item = replace(item, activations=levers.activations[0].home)
    return item


def _set_buckets(item: Offload, what: str, placed: Sequence[tuple[str, str]]) -> Offload:
    """With the homes of (bucket, home) pairs; ``what``: "optimizer" or "params"."""
    near, to_file = (tuple(bucket for bucket, home in placed if home == wanted) for wanted in ("cpu", "nvme"))
    changes: dict[str, Any] = {}
    if near:
        changes = {what: "cpu", f"{what}_of": near, f"{what}_in_file": to_file}
    elif to_file:
        changes = {what: "nvme", f"{what}_of": to_file}
    return replace(item, **changes)


def _peak(use: MemoryUse) -> int:
    return use.peak_bytes
