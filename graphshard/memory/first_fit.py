"""Which rung of a ladder to take under a budget, where a rung's peak is known only by trying it.

Peaks need not fall with the rungs: what is recomputed is held for a while. Yet a smaller budget must not lead to a
larger peak. So some rungs, the marks, in whatever order, are the same for all budgets, and the first mark that fits is
taken: where a smaller budget takes another one, it is a later one, because the first one's peak is above that budget.
Between a mark and the one before it a rung is taken only if its peak is at least the mark's: a budget below the mark's
never gets to see that rung, and could end with a larger peak than it has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

MARKS = 16
"""Of longer ladders, so many rungs are marks, beside those that always are."""


def first_fit(held: Sequence[int], budget: int, peaks: Mapping[int, float], always: Collection[int] = ()) -> int:
    """The first rung that fits, in the sense above; if none does, the mark of least peak. Or, as long as that cannot be
    said, a rung that is not in ``peaks``, to be tried next.

    Args:
        held: of each rung, the fastest first, bytes that are held at once: its peak is not taken to be less.
        peaks: of the rungs that were tried; infinite where one must not be taken.
        always: rungs that are marks, whatever they hold.
    """
    at = marks(held, always)
    for index, mark in enumerate(at):
        if held[mark] > budget:
            continue
        if mark not in peaks:
            return mark
        if _peak(mark, held, peaks) <= budget:
            return _between(held, budget, peaks, at[max(index - 1, 0)], mark)
    least = min((_peak(mark, held, peaks) for mark in at if mark in peaks), default=None)
    for mark in sorted(at, key=lambda mark: held[mark]):
        if mark not in peaks and (least is None or held[mark] < least):
            return mark
    return next(mark for mark in at if mark in peaks and _peak(mark, held, peaks) == least)


def _between(held: Sequence[int], budget: int, peaks: Mapping[int, float], low: int, high: int) -> int:
    """Bisect between a mark that does not fit and one that does."""
    while high - low > 1:
        middle = (low + high) // 2
        if held[middle] <= budget and middle not in peaks:
            return middle
        if held[middle] <= budget and _peak(high, held, peaks) <= _peak(middle, held, peaks) <= budget:
            high = middle
        else:
            low = middle
    return high


def _peak(rung: int, held: Sequence[int], peaks: Mapping[int, float]) -> float:
    return max(peaks[rung], held[rung])


def marks(held: Sequence[int], always: Collection[int] = ()) -> list[int]:
    """Those in ``always``, and of the others the first, the last and some at about equal distances in what they hold;
    all, if there are few."""
    others = [rung for rung in range(len(held)) if rung not in always]
    if len(others) > MARKS:
        most, least = held[others[0]], min(held[rung] for rung in others)
        limits = [most - (most - least) * step / (MARKS - 2) for step in range(MARKS - 1)]
        firsts = {next(rung for rung in others if held[rung] <= limit) for limit in limits}
        others = [*firsts, others[-1]]
    return sorted({*others, *always})
