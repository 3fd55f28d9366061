"""What each stage of a pipeline may do to hold less, from the fastest setting to the smallest one.

Every rung gives up one more thing, in the order of what a byte less costs, in FLOPs per step:

- the reduction and the gather of a sharded bucket happen per micro-batch instead of once (reshard);
- values of a block are computed again in the backward, by a minimum cut at a higher price (saving.py); beside the cuts,
  where they stand by what they cost, are policies with a name, whose peaks fall between those of the cuts or below;
- optimizer state of a bucket, what a block keeps for the backward, and parameters of a bucket leave the device, each
  for the nearest home that has room. A block whose values leave computes nothing again.

What is recomputed or moved for every micro-batch saves memory for each one in flight: its price counts that often.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from graphshard.analysis import FLOPS_PER_SENT_BYTE, cost, nbytes
from graphshard.blocks import stages_of
from graphshard.codegen.schedule import Schedule
from graphshard.homes import homes
from graphshard.memory.first_fit import marks
from graphshard.memory.footprint import STORED
from graphshard.passes.hoist import hoistable_bytes
from graphshard.program import Program, Role, Slot, val
from graphshard.saving import POLICIES, PRICES, Ladder, Rung, saved_bytes


@dataclass(frozen=True)
class Away:
    """A home that values may go to, and what a byte that goes or comes costs, in FLOPs."""

    home: str  # "cpu" or "nvme"
    flops_per_byte: float


@dataclass(frozen=True)
class Levers:
    """What may be chosen; the rest stays as the plan has it. Homes: the nearest first; (): nothing to choose."""

    recompute: bool = True
    reshard: bool = False
    optimizer: tuple[Away, ...] = ()
    params: tuple[Away, ...] = ()
    activations: tuple[Away, ...] = ()
    host_bytes: float = math.inf  # what may be in home "cpu", with what is there whatever is chosen
    activations_leave: str = ""  # the home they go to whatever is chosen; "": that is to be chosen, or they stay


@dataclass(frozen=True)
class Setting:
    """What one stage does to save memory."""

    level: int = 0  # of saving.Rung
    blocks: int = 0
    policy: str = ""  # of saving.POLICIES, in place of the cut
    hoist_bytes: int = 0
    activations: tuple[str, ...] = ()  # homes of what blocks keep, from the first one on; the others' stays
    optimizer: tuple[tuple[str, str], ...] = ()  # (bucket, home) of state that leaves the device
    params: tuple[tuple[str, str], ...] = ()  # (bucket, home) of parameters that do


@dataclass(frozen=True)
class Step:
    """A setting, and an estimate of what it holds beside what all settings hold. ``is_mark``: it stands out of the row
    of those that give up one thing more each, and is tried for itself."""

    setting: Setting
    held_bytes: int
    is_mark: bool = False


def marked(steps: list[Step]) -> set[int]:
    """The positions of those that are tried for themselves."""
    return {at for at, step in enumerate(steps) if step.is_mark}


def ladders(program: Program, sharded: Program | None, schedule: Schedule, levers: Levers) -> list[list[Step]]:
    """One for each stage.

    Args:
        program: before memory-policy.
        sharded: the same one after all passes, nothing being saved; None: nothing about buckets is to be chosen, nor
            does host memory have a limit.
    """
    return [
        _Stage(program, sharded, schedule, levers, position, stage).ladder()
        for position, stage in enumerate(stages_of(program))
    ]


Change = tuple[float, Callable[[Setting], Setting]]
"""What a byte less costs, and a setting with one thing more given up; the same one where that cannot be. Those about
one thing are in order."""


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
        self._kept: dict[tuple[Rung, str], list[int]] = {}
        self._all_kept = saved_bytes(self.cuts, set())
        self.state: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        self.there = 0  # bytes in host memory whatever is chosen
        if levers.activations_leave == "cpu":
            self.there = sum(map(self._leaving_bytes, range(self._count())))
        if sharded is not None:
            self.there += _host_bytes(sharded, position)
            self.state = _bytes_by_bucket(sharded, position, (Role.STATE, Role.MASTER))
            self.stored = _bytes_by_bucket(sharded, position, (Role.SHARD, Role.FLAT))

    def ladder(self) -> list[Step]:
        gathers: list[int] = []
        reductions: list[int] = []
        if self.levers.reshard and self.sharded is not None:
            gathers, reductions = hoistable_bytes(self.sharded, self.position)
        recompute, others = self._recompute(), [*self._reshard(gathers, reductions), *self._offload()]
        all_hoisted = Setting(hoist_bytes=sum(gathers + reductions))
        steps, setting = self._row(all_hoisted, [*recompute, *others])
        if others:
            # What is computed again is held for a while: with all else given up the peak may be smallest with a cheaper
            # cut than the last, as it may be where nothing else can be given up.
            alone, _ = self._row(Setting(), recompute)
            chosen = [alone[at].setting for at in marks([s.held_bytes for s in alone], marked(alone))]
            cuts = [(cut.level, cut.blocks, cut.policy) for cut in chosen]
            settings = [replace(setting, level=n, blocks=b, policy=policy) for n, b, policy in cuts]
            steps += [replace(self._step(new), is_mark=True) for new in settings if new != setting]
        return steps

    def _row(self, setting: Setting, changes: list[Change]) -> tuple[list[Step], Setting]:
        """From ``setting`` on each step gives up one thing more; and with all given up."""
        steps = [self._step(setting)]
        least = steps[0].held_bytes
        for _, give_up in sorted(changes, key=lambda change: change[0]):
            step = self._step(give_up(setting))
            if step.setting.policy:  # in place of the cut, from which the others go on
                steps.append(replace(step, is_mark=True))
                continue
            setting = step.setting
            if step.held_bytes < least:  # else it costs something and holds no less
                least = step.held_bytes
                steps.append(step)
        return steps, setting

    def _step(self, setting: Setting) -> Step:
        key = rung, policy = Rung(setting.level, setting.blocks), setting.policy
        if key not in self._kept:
            again = self.cuts.named(policy) if policy else self.cuts.recomputed(rung)
            self._kept[key] = saved_bytes(self.cuts, again)
        stays = self._count() if self.levers.activations_leave else len(setting.activations)
        held = sum(self._kept[key][stays:]) * self.in_flight + setting.hoist_bytes
        held += sum(size for name, size in self.state.items() if name not in dict(setting.optimizer))
        held += sum(size for name, size in self.stored.items() if name not in dict(setting.params))
        return Step(setting, held)

    def _recompute(self) -> list[Change]:
        homes = self.levers.activations
        # What costs more to compute again than to move is moved.
        dearest = 2 * homes[-1].flops_per_byte if homes else PRICES[-1]
        repeats = self.microbatches / self.in_flight
        rungs = self.cuts.rungs[1:] if self.levers.recompute else []
        changes: list[Change] = []
        policies = self._policies(rungs)
        for place in range(len(rungs) + 1):
            if place:
                rung = rungs[place - 1]
                changes.append((PRICES[rung.level - 1], partial(replace, level=rung.level, blocks=rung.blocks)))
            price = PRICES[-1] if place == len(rungs) else changes[-1][0] if changes else 0
            changes += [(price, partial(replace, level=0, blocks=0, policy=policy)) for policy in policies[place]]
        return [(price * repeats, change) for price, change in changes if price <= dearest]

    def _policies(self, rungs: list[Rung]) -> dict[int, list[str]]:
        """The policies that differ from the cuts, each by how many of ``rungs`` take no more time than it does."""
        found: dict[int, list[str]] = defaultdict(list)
        for policy in POLICIES if rungs else ():
            again = self.cuts.named(policy)
            place = bisect_right(rungs, self.cuts.spent(again), key=lambda r: self.cuts.spent(self.cuts.recomputed(r)))
            before = self.cuts.recomputed(rungs[place - 1]) if place else set()
            if any(cost(node) for node in self.cuts.repeated(again) ^ self.cuts.repeated(before)):
                found[place].append(policy)
        return found

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
        for away in self.levers.optimizer:
            changes += [(2 * away.flops_per_byte, partial(self._state_to, away.home, name)) for name in self.state]
        for away in self.levers.activations:
            price = 2 * away.flops_per_byte * self.microbatches / self.in_flight
            changes += [(price, partial(self._activations_to, away.home, block)) for block in range(self._count())]
        for away in self.levers.params:
            # Each forward and each backward reads them, and the update, which writes them too.
            price = (2 * self.microbatches + 2) * away.flops_per_byte
            changes += [(price, partial(self._params_to, away.home, name)) for name in self.stored]
        return changes

    def _count(self) -> int:
        """Blocks whose values may leave: the last one of all is differentiated at once."""
        return max(self.cuts.block_of.values(), default=-1) + (not self.is_last)

    def _state_to(self, home: str, bucket: str, setting: Setting) -> Setting:
        if bucket in dict(setting.optimizer) or not self._has_room(home, self.state[bucket], setting):
            return setting
        return replace(setting, optimizer=(*setting.optimizer, (bucket, home)))

    def _params_to(self, home: str, bucket: str, setting: Setting) -> Setting:
        if bucket in dict(setting.params) or not self._has_room(home, self.stored[bucket], setting):
            return setting
        return replace(setting, params=(*setting.params, (bucket, home)))

    def _activations_to(self, home: str, block: int, setting: Setting) -> Setting:
        if block != len(setting.activations) or not self._has_room(home, self._leaving_bytes(block), setting):
            return setting
        return replace(setting, activations=(*setting.activations, home))

    def _leaving_bytes(self, block: int) -> int:
        """What leaves of a block, which computes nothing again."""
        return self._all_kept[block] * self.in_flight

    def _has_room(self, home: str, nbytes: int, setting: Setting) -> bool:
        if home != "cpu":
            return True
        there = self.there + sum(self.state[bucket] for bucket, where in setting.optimizer if where == home)
        there += sum(self.stored[bucket] for bucket, where in setting.params if where == home)
        there += sum(self._leaving_bytes(block) for block, where in enumerate(setting.activations) if where == home)
        return there + nbytes <= self.levers.host_bytes


def _bytes_by_bucket(program: Program, stage: int, roles: tuple[Role, ...]) -> dict[str, int]:
    """What a rank of ``stage`` stores for each bucket between steps, in the order of the buckets."""
    found: dict[str, int] = defaultdict(int)
    for slot, node in program.epilogue.outputs.items():
        if slot.role in roles and slot.stage == stage:
            found[slot.name] += nbytes(val(node))
    return {name: found[name] for name in program.buckets if found[name]}


def _host_bytes(program: Program, stage: int) -> int:
    """What a rank of ``stage`` stores in host memory between steps, be it updated or only read."""
    away = homes(program)
    sizes: dict[Slot, int] = {}
    for section in program.sections().values():
        for slot, node in (section.input_slots | section.outputs).items():
            if slot.role in STORED and slot.stage == stage and away.get(slot) == "cpu":
                sizes[slot] = nbytes(val(node))
    return sum(sizes.values())
