"""Which of the ways to save memory a plan uses, under a budget per rank: the cheapest whose simulated peak fits.

Every stage has a ladder of settings. The first is the fastest: everything kept, every parameter gathered once. Each
further rung gives up one more thing, in the order of what a byte that it saves costs, in FLOPs per step: the reduction
and the gather of a bucket leave the prologue and happen per micro-batch (reshard), values of a block are recomputed by
a minimum cut at a higher price (saving.py). A stage takes the lowest rung at which the peak that simulate.py
finds in the whole lowered step, with the micro-batches in flight, fits. What the passes make of a rung is known only by
running them: the rung is found by bisection, all stages at a time, a stage's peak being its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from graphshard.analysis import FLOPS_PER_SENT_BYTE
from graphshard.blocks import stages_of
from graphshard.codegen.schedule import Schedule
from graphshard.errors import BudgetTooSmall
from graphshard.passes.hoist import Hoist, hoistable_bytes
from graphshard.passes.memory_policy import MemoryPolicy
from graphshard.pipeline import Context, Pass, run_passes
from graphshard.program import Program
from graphshard.rewrite import copied
from graphshard.saving import PRICES, Ladder
from graphshard.simulate import MemoryUse
from graphshard.units import human

Measure = Callable[[Program], list[MemoryUse]]
"""The simulated memory of each stage, of a program that all passes have been through."""


@dataclass(frozen=True)
class Setting:
    """What one stage does to save memory."""

    level: int = 0  # of saving.Rung
    blocks: int = 0
    hoist_bytes: int | None = None  # None: as the plan has it


@dataclass(frozen=True)
class Budget:
    """What may be chosen, and under how many bytes per rank."""

    nbytes: int
    reshard: bool  # whether gathers and reductions may move


def choose(
    program: Program, passes: Sequence[Pass], ctx: Context, budget: Budget, schedule: Schedule, measure: Measure
) -> list[Pass]:
    """``passes`` with the options that fit ``budget``; ``program`` is one before the first pass, which is not changed.

    Raises:
        BudgetTooSmall: no rung fits; the message says what the smallest peak is and what dominates it.
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
        self.ladders = self._ladders(schedule)
        self.seen: dict[tuple[int, ...], list[MemoryUse]] = {}

    def run(self) -> list[Pass]:
        lowest, highest = [0] * len(self.ladders), [len(ladder) - 1 for ladder in self.ladders]
        self._require(highest)
        if self._fits(lowest) == [True] * len(lowest):
            highest = list(lowest)
        while any(low < high for low, high in zip(lowest, highest, strict=True)):
            middle = [(low + high) // 2 for low, high in zip(lowest, highest, strict=True)]
            for stage, fits in enumerate(self._fits(middle)):
                if fits:
                    highest[stage] = middle[stage]
                else:
                    lowest[stage] = middle[stage] + 1
        self._require(highest)
        return self.before + self._with(highest)

    def _require(self, rungs: list[int]) -> None:
        if all(self._fits(rungs)):
            return
        best = [
            min((uses[stage] for uses in self.seen.values()), key=lambda use: use.peak_bytes)
            for stage in range(len(rungs))
        ]
        stage = max(range(len(best)), key=lambda s: best[s].peak_bytes)
        largest = sorted(best[stage].at_peak.items(), key=lambda item: -item[1])[:3]
        held = ", ".join(f"{name} {human(count)}" for name, count in largest)
        raise BudgetTooSmall(self.budget.nbytes, best[stage].peak_bytes, stage, held)

    def _fits(self, rungs: list[int]) -> list[bool]:
        key = tuple(rungs)
        if key not in self.seen:
            self.seen[key] = self.measure(run_passes(copied(self.program), self._with(rungs), self.ctx, check=False))
        return [use.peak_bytes <= self.budget.nbytes for use in self.seen[key]]

    def _with(self, rungs: Sequence[int]) -> list[Pass]:
        """The passes from memory-policy on, with each stage on its rung."""
        chosen = [ladder[rung] for ladder, rung in zip(self.ladders, rungs, strict=True)]
        result: list[Pass] = []
        for item in self.rest:
            if isinstance(item, MemoryPolicy):
                levels, blocks = tuple(s.level for s in chosen), tuple(s.blocks for s in chosen)
                item = replace(item, policy="cut", levels=levels, blocks=blocks)
            elif isinstance(item, Hoist) and chosen[0].hoist_bytes is not None:
                item = replace(item, budget_gb=tuple(((s.hoist_bytes or 0) + 0.5) / 1e9 for s in chosen))
            result.append(item)
        return result

    def _ladders(self, schedule: Schedule) -> list[list[Setting]]:
        stages = stages_of(self.program)
        sharded = run_passes(copied(self.program), self.rest, self.ctx) if self.budget.reshard else None
        ladders = []
        for position, stage in enumerate(stages):
            changes = _recomputation(Ladder(self.program, stage), _repeats(schedule, position))
            setting = Setting()
            if sharded is not None:
                costs = hoistable_bytes(sharded, position)
                setting = replace(setting, hoist_bytes=2 * sum(costs))
                changes += _resharding(costs, self.program.microbatches)
            ladder = [setting]
            for _, change in sorted(changes, key=lambda item: item[0]):
                ladder.append(replace(ladder[-1], **change))
            ladders.append(ladder)
        return ladders


Change = tuple[float, dict[str, int]]
"""What a byte less costs, in FLOPs per step, and the fields of a setting that change."""


def _recomputation(ladder: Ladder, repeats: float) -> list[Change]:
    return [
        (PRICES[rung.level - 1] * repeats, {"level": rung.level, "blocks": rung.blocks}) for rung in ladder.rungs[1:]
    ]


def _repeats(schedule: Schedule, stage: int) -> float:
    """How often a step recomputes for each micro-batch whose values it saves at the peak."""
    held = most = 0
    ends = "W" if schedule.splits_backward(stage) else "B"
    for action in schedule.stages[stage]:
        held += (action.kind == "F") - (action.kind == ends)
        most = max(most, held)
    return schedule.microbatches / max(most, 1)


def _resharding(costs: list[int], microbatches: int) -> list[Change]:
    """As hoist does it: gathers come first, so that reductions, which cost less, go first."""
    held = [0, *accumulate(costs + costs)]
    changes: list[Change] = []
    for count in range(len(held) - 2, -1, -1):
        saved = (2 if count < len(costs) else 1) * microbatches - 1
        changes.append((saved * FLOPS_PER_SENT_BYTE, {"hoist_bytes": held[count]}))
    return changes
