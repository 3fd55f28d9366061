"""Pipeline schedules as data: for every stage, the order of its forward, backward and weight actions.

A schedule prints one line per stage and parses back::

    F0.0 F0.1 B0.0 B0.1
    F1.0 B1.0 F1.1 B1.1

``F0.3`` is the forward of micro-batch 3 on stage 0, ``B0.3`` its backward, ``W1.3`` (on stage 1) the part of it that no
earlier stage waits for: gradients of weights. A stage without W actions computes those in its B, behind what it sends.
Stage 0 never has any: nobody waits for what its B makes, so there is nothing to put off.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from graphshard.errors import InvalidSchedule

_ACTION = re.compile(r"([FBW])([0-9]+)\.([0-9]+)")
KINDS = "FBW"


@dataclass(frozen=True, order=True)
class Action:
    """One run of a stage's forward (F), backward (B) or weight (W) graph on one micro-batch."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Inverse of ``str``.

        Raises:
            InvalidSchedule: ``text`` is no action.
        """
        match = _ACTION.fullmatch(text)
        if match is None:
            raise InvalidSchedule(f"{text!r} is not an action such as F0.3: F, B or W, stage, dot, micro-batch")
        return cls(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """What every stage does, in order."""

    stages: tuple[tuple[Action, ...], ...]

    @property
    def microbatches(self) -> int:
        """Number of micro-batches."""
        return sum(action.kind == "F" for action in self.stages[0])

    def splits_backward(self, stage: int) -> bool:
        """Whether ``stage`` runs its weight gradients as actions of their own."""
        return any(action.kind == "W" for action in self.stages[stage])

    def in_flight(self, stage: int) -> int:
        """Most micro-batches at a time of which ``stage`` has run the forward and not yet all of the backward."""
        last = "W" if self.splits_backward(stage) else "B"
        held = accumulate((a.kind == "F") - (a.kind == last) for a in self.stages[stage])
        return max(held, default=0)

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, actions)) for actions in self.stages)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Inverse of ``str``; does not :func:`validate`.

        Raises:
            InvalidSchedule: a word is no action, or stands on the line of another stage.
        """
        stages = tuple(tuple(map(Action.parse, line.split())) for line in text.strip().splitlines())
        for stage, actions in enumerate(stages):
            for action in actions:
                if action.stage != stage:
                    raise InvalidSchedule(f"{action} stands on line {stage + 1}, which is stage {stage}'s")
        return cls(stages)


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards: Huang et al. 2019, "GPipe", section 2.3."""
    return _schedule(stages, microbatches, warmup=lambda stage: microbatches)


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """One forward, one backward, after as many forwards as there are later stages: Narayanan et al. 2019, "PipeDream",
    section 3.2. Stage s holds at most ``stages - s`` micro-batches."""
    return _schedule(stages, microbatches, warmup=lambda stage: stages - stage - 1)


def zb_h1(stages: int, microbatches: int) -> Schedule:
    """ZB-H1: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.3, arXiv 2401.10241.

    1F1B with the backward split: stage s puts off its weight gradients by s micro-batches and fills the bubbles at the
    end with them. It then holds at most ``stages - s`` micro-batches for B and s more for W, so that none holds more
    than 1F1B's first.
    """
    return _schedule(stages, microbatches, warmup=lambda stage: stages - stage - 1, put_off=lambda stage: stage)


def zb_h2(stages: int, microbatches: int) -> Schedule:
    """ZB-H2: the same, section 2.3. Forwards fill the bubbles in front of the first backward, for more memory.

    Stage s begins with twice as many forwards as 1F1B's and puts its weight gradients off by ``2 * s`` micro-batches,
    so that every stage holds at most ``2 * stages - 1``.
    """
    return _schedule(
        stages, microbatches, warmup=lambda stage: 2 * (stages - stage - 1), put_off=lambda stage: 2 * stage
    )


def forward_only(stages: int, microbatches: int) -> Schedule:
    """For evaluation: every stage runs its forwards in order."""
    return Schedule(tuple(tuple(Action("F", s, m) for m in range(microbatches)) for s in range(stages)))


BY_NAME: Mapping[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
}
"""The table of training schedules, by the name that a plan's ``schedule=`` gives."""

UNEVEN = ("zb-h2",)
"""Those that are for speed, whatever memory they take: their stages get unequal :func:`shares` of the work. The others
would gain less by that than the memory of the first stage, which is the fullest, grows."""


def make(name: str, stages: int, microbatches: int) -> Schedule:
    """The schedule ``name`` of :data:`BY_NAME` for any positive number of stages and micro-batches."""
    return BY_NAME[name](stages, microbatches)


def _schedule(
    stages: int, microbatches: int, warmup: Callable[[int], int], put_off: Callable[[int], int] | None = None
) -> Schedule:
    """``warmup(stage)`` forwards, then forward and backward in turn, then the remaining backwards. With ``put_off``,
    W follows that many micro-batches after its B."""
    lines = []
    for stage in range(stages):
        ahead = min(warmup(stage), microbatches)
        late = put_off(stage) if put_off is not None and stage else None
        order = [("F", m) for m in range(ahead)]
        for m in range(microbatches):
            order += [("F", ahead + m)] if ahead + m < microbatches else []
            order += [("B", m)]
            order += [("W", m - late)] if late is not None and m >= late else []
        if late is not None:
            order += [("W", m) for m in range(max(microbatches - late, 0), microbatches)]
        lines.append(tuple(Action(kind, stage, m) for kind, m in order))
    return Schedule(tuple(lines))


def validate(schedule: Schedule) -> None:
    """Check that a schedule is complete and can finish: every stage has each of its actions once, B after F, W after B,
    and no stages wait for one another in a circle.

    Raises:
        InvalidSchedule: with the action that is missing, repeated, too early, or waits for ever.
    """
    if not schedule.stages or not schedule.microbatches:
        raise InvalidSchedule("it needs at least one stage and one micro-batch")
    backward = any(action.kind == "B" for action in schedule.stages[0])
    for stage, actions in enumerate(schedule.stages):
        kinds = "F" + ("B" if backward else "") + ("W" if schedule.splits_backward(stage) else "")
        if kinds.endswith("W") and (stage == 0 or not backward):
            raise InvalidSchedule(f"stage {stage} has W actions; they need a B, and stage 0 never has any")
        at = {action: i for i, action in enumerate(actions)}
        for action in actions:
            if actions.count(action) > 1:
                raise InvalidSchedule(f"{action} is there {actions.count(action)} times")
        for m in range(schedule.microbatches):
            wanted = [Action(kind, stage, m) for kind in kinds]
            for action in wanted:
                if action not in at:
                    raise InvalidSchedule(f"{action} is missing")
            for first, second in pairwise(wanted):
                if at[first] > at[second]:
                    raise InvalidSchedule(f"{second} comes before {first}")
        extra = sorted(set(at) - {Action(k, stage, m) for k in kinds for m in range(schedule.microbatches)})
        if extra:
            raise InvalidSchedule(f"{extra[0]} is not among the actions of stage {stage}")
    _dependencies(schedule)


@dataclass(frozen=True)
class Simulation:
    """How long a schedule takes, in the unit of the costs, communication free."""

    makespan: float
    bubble_fraction: float  # of all stages' time, the part in which they wait
    peak_in_flight: tuple[int, ...]  # per stage: most micro-batches whose F has run and whose last action has not


Cost = float | Sequence[float]
"""What one action takes: one number for all stages, or one for each."""


def simulate(schedule: Schedule, cost_f: Cost = 1.0, cost_b: Cost = 1.0, cost_w: Cost = 1.0) -> Simulation:
    """Run ``schedule`` with given costs per action. A stage without W actions pays ``cost_b + cost_w`` for a B; what it
    sends to the stage before is there after ``cost_b``.

    Raises:
        InvalidSchedule: stages wait for one another in a circle.
    """
    count = len(schedule.stages)
    costs = torch.stack([_per_stage(cost, count) for cost in (cost_f, cost_b, cost_w)])
    makespan = _makespans(schedule, costs[:, :, None]).item()
    backward = any(action.kind == "B" for action in schedule.stages[0])
    busy = schedule.microbatches * float(costs.sum() if backward else costs[0].sum())
    bubble = 1 - busy / (count * makespan) if makespan else 0.0
    return Simulation(makespan, max(bubble, 0.0), tuple(_peak(actions) for actions in schedule.stages))


_LEAST_GAIN = 1e-4
"""Part of the makespan below which :func:`shares` does not make stages more uneven."""


@functools.lru_cache
def shares(schedule: Schedule) -> tuple[float, ...]:
    """The part of the work that each stage should have for ``schedule`` to finish first; they add up to 1.

    F, B and W are taken for equal parts of a stage's work, as in Qi et al. 2023, section 2.1. Equal shares are best for
    many micro-batches. Of few, a stage that starts late and stops early should have less, if the schedule keeps the
    stages before it busy meanwhile.

    The makespan is the longest of many paths, each linear in the shares, so it is convex: a pattern search (Hooke and
    Jeeves 1961) that shifts work between stages, ever less of it, comes close to the best shares.
    """
    count = len(schedule.stages)
    best = torch.full((count,), 1 / count, dtype=torch.float64)
    least = _makespans(schedule, best.expand(len(KINDS), 1, count).mT).item()
    shifts = _shifts(count)
    step = 0.2 / count
    while count > 1 and step * count > 0.002:
        tried = torch.cat([best + part * step * shifts for part in (1.0, 0.5, 0.25)])
        tried = tried[(tried > 0).all(1)]
        makespan, which = _makespans(schedule, tried.expand(len(KINDS), *tried.shape).mT).min(0)
        if makespan.item() < least * (1 - _LEAST_GAIN):
            least, best = makespan.item(), tried[int(which)]
        else:
            step /= 2
    return tuple((best / best.sum()).tolist())


def _shifts(stages: int) -> Tensor:
    """Ways to shift work, [ways, stages], each row adding up to 0: from one stage to the next, from one to all others,
    from the stages behind a boundary to those before it; and back."""
    one = torch.eye(stages, dtype=torch.float64)
    pairs = [one[i] - one[i + 1] for i in range(stages - 1)]
    alone = [one[i] - one.mean(0) for i in range(stages)]
    halves = [one[:i].mean(0) - one[i:].mean(0) for i in range(1, stages)]
    ways = torch.stack([*pairs, *alone, *halves])
    return torch.cat([ways, -ways])


def _makespans(schedule: Schedule, costs: Tensor) -> Tensor:
    """When the last stage has finished, for many ``costs`` at once: [F B W, stages, many] to [many]."""
    f, b, w = costs
    split = [schedule.splits_backward(stage) for stage in range(len(schedule.stages))]
    clock = list(torch.zeros_like(f))
    finished: dict[Action, Tensor] = {}
    for action, needed in _dependencies(schedule):
        stage = action.stage
        start = clock[stage] if needed is None else torch.maximum(clock[stage], finished[needed])
        took = {"F": f, "B": b, "W": w}[action.kind][stage]
        clock[stage] = finished[action] = start + took
        if action.kind == "B" and not split[stage]:
            clock[stage] = clock[stage] + w[stage]
    return torch.stack(clock).amax(0)


def _dependencies(schedule: Schedule) -> list[tuple[Action, Action | None]]:
    """The actions in an order in which they can run, each with the action of a neighbouring stage that it waits for.

    Raises:
        InvalidSchedule: stages wait for one another in a circle.
    """
    count = len(schedule.stages)
    done: set[Action] = set()
    order: list[tuple[Action, Action | None]] = []
    position, progress = [0] * count, True
    while progress:
        progress = False
        for stage, actions in enumerate(schedule.stages):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                needed = _needed(action, count)
                if needed is not None and needed not in done:
                    break
                done.add(action)
                order.append((action, needed))
                position[stage] += 1
                progress = True
    waiting = [a[i] for a, i in zip(schedule.stages, position, strict=True) if i < len(a)]
    if waiting:
        raise InvalidSchedule(", ".join(f"{a} waits for {_needed(a, count)}" for a in waiting) + ": it cannot finish")
    return order


def _needed(action: Action, stages: int) -> Action | None:
    """The action of a neighbouring stage that must be finished before ``action`` can start."""
    if action.kind == "F" and action.stage > 0:
        return Action("F", action.stage - 1, action.microbatch)
    if action.kind == "B" and action.stage < stages - 1:
        return Action("B", action.stage + 1, action.microbatch)
    return None


def _peak(actions: Sequence[Action]) -> int:
    last = "W" if any(a.kind == "W" for a in actions) else "B" if any(a.kind == "B" for a in actions) else "F"
    held = peak = 0
    for action in actions:
        held += action.kind == "F"
        peak = max(peak, held)
        held -= action.kind == last
    return peak


def _per_stage(cost: Cost, stages: int) -> Tensor:
    return torch.tensor([cost] * stages if isinstance(cost, int | float) else cost, dtype=torch.float64)
