"""What each stage of a pipeline may do to hold less, from the fastest setting to the smallest one.

Every rung gives up one more thing, in the order of what a byte less costs, in FLOPs per step:

- the reduction and the gather of a sharded bucket happen per micro-batch instead of once (reshard);
- values of a block are computed again in the backward, by a minimum cut at a higher price (saving.py);
- optimizer state of a bucket, what a block keeps for the backward, and parameters of a bucket leave the device. A block
  whose values leave computes nothing again.

What is recomputed or moved for every micro-batch saves memory for each one in flight: its price counts that often.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from graphshard.analysis import FLOPS_PER_SENT_BYTE, nbytes
from graphshard.blocks import stages_of
from graphshard.codegen.schedule import Schedule
from graphshard.passes.hoist import hoistable_bytes
from graphshard.program import Program, Role, val
from graphshard.saving import PRICES, Ladder, Rung, saved_bytes


@dataclass(frozen=True)
class Away:
    """Where values may go, and what a byte that goes or comes costs, in FLOPs."""

    home: str  # "cpu" or "nvme"
    flops_per_byte: float


@dataclass(frozen=True)
class Levers:
    """What may be chosen; the rest stays as the plan has it."""

    recompute: bool = True
    reshard: bool = False
    optimizer: Away | None = None
    params: Away | None = None
    activations: Away | None = None


@dataclass(frozen=True)
class Setting:
    """What one stage does to save memory."""

    level: int = 0  # of saving.Rung
    blocks: int = 0
    hoist_bytes: int = 0
    activations: int = 0  # blocks, from the first one on, whose kept values leave the device
    optimizer: tuple[str, ...] = ()  # buckets whose state leaves it
    params: tuple[str, ...] = ()  # buckets that leave it


@dataclass(frozen=True)
class Step:
    """A setting, and an estimate of what it holds beside what all settings hold."""

    setting: Setting
    held_bytes: int


def ladders(program: Program, sharded: Program | None, schedule: Schedule, levers: Levers) -> list[list[Step]]:
    """One for each stage.

    Args:
        program: before memory-policy.
        sharded: the same one after all passes, nothing being saved; None: nothing about buckets is to be chosen.
    """
    return [
        _Stage(program, sharded, schedule, levers, position, stage).ladder()
        for position, stage in enumerate(stages_of(program))
    ]


Change = tuple[float, Callable[[Setting], Setting]]
"""What a byte less costs, and a setting with one thing more given up. Those about one thing are in order."""


class _Stage:
    def __init__(
        self,
        program: Program,
        sharded: Program | None,
        schedule: Schedule,
        levers: Levers,
        position: int,
        stage: int | None,
    ) -> None:
        self.sharded, self.levers, self.position = sharded, levers, position
        self.is_last = stage == stages_of(program)[-1]
        self.microbatches, self.in_flight = schedule.microbatches, schedule.in_flight(position)
        self.cuts = Ladder(program, stage)
        self.state: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        if sharded is not None:
            self.state = _bytes_by_bucket(sharded, position, (Role.STATE, Role.MASTER))
            self.stored = _bytes_by_bucket(sharded, position, (Role.SHARD, Role.FLAT))

    def ladder(self) -> list[Step]:
        gathers: list[int] = []
        reductions: list[int] = []
        if self.levers.reshard and self.sharded is not None:
            gathers, reductions = hoistable_bytes(self.sharded, self.position)
        setting = Setting(hoist_bytes=sum(gathers + reductions))
        changes = [*self._recompute(), *self._reshard(gathers, reductions), *self._offload()]
        steps = [setting]
        for _, give_up in sorted(changes, key=lambda change: change[0]):
            steps.append(give_up(steps[-1]))
        kept: dict[Rung, list[int]] = {}
        for step in steps:
            rung = Rung(step.level, step.blocks)
            if rung not in kept:
                kept[rung] = saved_bytes(self.cuts, self.cuts.recomputed(rung))
        return [Step(step, self._held(step, kept[Rung(step.level, step.blocks)])) for step in steps]

    def _held(self, setting: Setting, kept: list[int]) -> int:
        there = sum(kept[setting.activations :]) * self.in_flight + setting.hoist_bytes
        there += sum(size for name, size in self.state.items() if name not in setting.optimizer)
        return there + sum(size for name, size in self.stored.items() if name not in setting.params)

    def _recompute(self) -> list[Change]:
        away = self.levers.activations
        # What costs more to compute again than to move is moved.
        dearest = PRICES[-1] if away is None else 2 * away.flops_per_byte
        repeats = self.microbatches / self.in_flight
        rungs = self.cuts.rungs[1:] if self.levers.recompute else []
        cheap = [rung for rung in rungs if PRICES[rung.level - 1] <= dearest]
        return [(PRICES[r.level - 1] * repeats, partial(replace, level=r.level, blocks=r.blocks)) for r in cheap]

    def _reshard(self, gathers: list[int], reductions: list[int]) -> list[Change]:
        """As hoist does it: gathers come first, so that reductions, which cost less, go first."""
        held = [0, *accumulate(gathers + reductions)]
        changes: list[Change] = []
        for count in range(len(held) - 2, -1, -1):
            saved = (2 if count < len(gathers) else 1) * self.microbatches - 1
            changes.append((saved * FLOPS_PER_SENT_BYTE, partial(replace, hoist_bytes=held[count])))
        return changes

    def _offload(self) -> list[Change]:
        changes: list[Change] = []
        if (away := self.levers.optimizer) is not None:
            price = 2 * away.flops_per_byte
            changes += [(price, partial(replace, optimizer=names)) for names in _prefixes(list(self.state))]
        if (away := self.levers.activations) is not None:
            price = 2 * away.flops_per_byte * self.microbatches / self.in_flight
            # The last block of all is differentiated at once.
            count = max(self.cuts.block_of.values(), default=-1) + (not self.is_last)
            changes += [(price, partial(replace, activations=n)) for n in range(1, count + 1)]
        if (away := self.levers.params) is not None:
            # Each forward and each backward reads them, and the update, which writes them too.
            price = (2 * self.microbatches + 2) * away.flops_per_byte
            changes += [(price, partial(replace, params=names)) for names in _prefixes(list(self.stored))]
        return changes


def _prefixes(names: list[str]) -> list[tuple[str, ...]]:
    return [tuple(names[:count]) for count in range(1, len(names) + 1)]


def _bytes_by_bucket(program: Program, stage: int, roles: tuple[Role, ...]) -> dict[str, int]:
    """What a rank of ``stage`` stores for each bucket between steps, in the order of the buckets."""
    found: dict[str, int] = defaultdict(int)
    for slot, node in program.epilogue.outputs.items():
        if slot.role in roles and slot.stage == stage:
            found[slot.name] += nbytes(val(node))
    return {name: found[name] for name in program.buckets if found[name]}
