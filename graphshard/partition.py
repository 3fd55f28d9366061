"""Where to cut a line of work into pipeline stages: the slowest stage, for its share of the work, as fast as possible,
few bytes across the cuts.

Pure numbers, no graph. The search is the linear partition problem by dynamic programming over cut positions (as in
Narayanan et al. 2019, "PipeDream", section 3.1), with every pair of positions priced at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

MAX_POSITIONS = 512
"""Cut positions that the search looks at; of more, those with the fewest crossing bytes in equal shares of the work."""

SLACK = 0.02
"""By how much a cut may slow the slowest stage to send fewer bytes."""


@dataclass(frozen=True)
class Line:
    """Work items in the order they run. Position i lies in front of item i.

    ``crossing`` has one entry more than ``costs``: bytes sent if there is a cut at that position. ``allowed`` likewise.
    ``params``: bytes of a parameter and the ascending items that read it, each on whatever stage it ends up.
    """

    costs: tuple[float, ...]
    crossing: tuple[float, ...]
    allowed: tuple[bool, ...]
    params: tuple[tuple[int, tuple[int, ...]], ...] = ()


def most_stages(line: Line) -> int:
    """The largest number of stages such that each has work."""
    stages, work = 0, False
    for allowed, item in zip(line.allowed, line.costs, strict=False):
        if work and allowed:
            stages, work = stages + 1, False
        work = work or item > 0
    return stages + work  # work behind the last cut is a stage; views alone belong to the one before


def search(
    line: Line, stages: int, byte_cost: float, limit_bytes: float = math.inf, shares: Sequence[float] = ()
) -> tuple[int, ...] | None:
    """The ``stages - 1`` cut positions, ascending; None if there are too few or ``limit_bytes`` cannot be kept.

    Minimises the slowest stage, a stage's time being its items' costs and ``byte_cost`` for each byte that crosses its
    two ends; among the cuts within :data:`SLACK` of that, the bytes that cross; then evens the stages out. With
    ``shares``, a part of the work for each stage, a stage is slow or fast for its share.
    """
    found = _Search(line, stages, byte_cost)
    return found.cuts(limit_bytes, shares or (1 / stages,) * stages)


def times(line: Line, cut: Sequence[int], byte_cost: float) -> list[float]:
    """What each stage of a cut takes."""
    ends = (0, *cut, len(line.costs))
    sent = line.crossing
    return [sum(line.costs[a:b]) + byte_cost * (sent[a] + sent[b]) for a, b in pairwise(ends)]


def least_limit(line: Line, stages: int) -> float:
    """The parameter bytes of the largest stage, for the cut that makes it smallest; inf if there is no cut."""
    found = _Search(line, stages, 0.0)
    return _bottleneck([torch.where(found.time.isinf(), math.inf, found.held)] * stages)


def _bottleneck(prices: Sequence[Tensor]) -> float:
    """The smallest possible largest price of a stage; ``prices`` has one matrix [from, to] for each stage."""
    best = prices[0][0]
    for price in prices[1:]:
        best = torch.maximum(best[:, None], price).amin(0)
    return float(best[-1])


class _Search:
    """Prices of every stage from one position to another, as matrices [from, to] over the candidate positions."""

    def __init__(self, line: Line, stages: int, byte_cost: float) -> None:
        self.stages = stages
        self.positions = _candidates(line, max(MAX_POSITIONS, 2 * stages))
        at = torch.tensor(self.positions)
        before = torch.tensor([0.0, *accumulate(line.costs)], dtype=torch.float64)[at]
        worked = torch.tensor([0, *accumulate(int(cost > 0) for cost in line.costs)])[at]
        self.sent = torch.tensor(line.crossing, dtype=torch.float64)[at]
        time = before[None, :] - before[:, None] + byte_cost * (self.sent[None, :] + self.sent[:, None])
        self.time = torch.where(worked[None, :] > worked[:, None], time, math.inf)
        self.held = _held(line, self.positions)

    def cuts(self, limit_bytes: float, shares: Sequence[float]) -> tuple[int, ...] | None:
        time = torch.where(self.held <= limit_bytes, self.time, math.inf)
        scaled = [time / (share * self.stages) for share in shares]
        slowest = _bottleneck(scaled)
        if math.isinf(slowest):
            return None
        # Among equal bytes the most even cut: squares of shares of the slowest, all stages together less than a byte.
        uneven = ((time / max(slowest, 1.0)).square() / (2 * self.stages) for time in scaled)
        fast = (time <= slowest * (1 + SLACK) for time in scaled)
        first, *others = (
            torch.where(ok, self.sent[:, None] + more, math.inf) for ok, more in zip(fast, uneven, strict=True)
        )
        best, back = first[0], []
        for sent in others:
            best, chosen = (best[:, None] + sent).min(0)
            back.append(chosen)
        result, end = [], len(self.positions) - 1
        for chosen in reversed(back):
            end = int(chosen[end])
            result.append(self.positions[end])
        return tuple(reversed(result))


def _candidates(line: Line, most: int) -> list[int]:
    """Positions to consider, the two ends included."""
    count = len(line.costs)
    inner = [p for p in range(1, count) if line.allowed[p]]
    if len(inner) > most - 2:
        total = sum(line.costs) or 1.0
        before = [0.0, *accumulate(line.costs)]
        best: dict[int, int] = {}
        for p in inner:
            share = int((before[p] / total + p / count) / 2 * (most - 2))
            if share not in best or line.crossing[p] < line.crossing[best[share]]:
                best[share] = p
        inner = sorted(best.values())
    return [0, *inner, count]


def _held(line: Line, positions: Sequence[int]) -> Tensor:
    """Bytes of the parameters that a stage from one candidate position to another reads, each counted once."""
    size = len(positions)
    at = torch.tensor(positions)
    steps = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for nbytes, readers in line.params:
        previous = -1
        for item in readers:
            # The item is the first reader in a stage that begins in (previous, item] and ends behind the item.
            low, high = (int(torch.searchsorted(at, p, right=True)) for p in (previous, item))
            end = int(torch.searchsorted(at, item, right=True))
            steps[low, end] += nbytes
            steps[high, end] -= nbytes
            previous = item
    return steps.cumsum(0).cumsum(1)[:size, :size]
