"""The search for a rung: peaks that do not fall with the rungs, and how many rungs are tried."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphshard.memory.first_fit import MARKS, first_fit, marks


def search(held: list[int], peaks: list[int], budget: int, always: Collection[int] = ()) -> tuple[int, int]:
    """The rung that is taken, and how many were tried."""
    tried: dict[int, int] = {}
    while (rung := first_fit(held, budget, tried, always)) not in tried:
        tried[rung] = peaks[rung]
    return rung, len(tried)


@pytest.mark.parametrize(("budget", "rung"), [(100, 0), (99, 1), (90, 1), (75, 1), (60, 1), (59, 4), (50, 4)])
def test_the_fastest_rung_that_fits_is_taken_though_a_later_one_holds_more(budget: int, rung: int) -> None:
    assert search([40, 30, 20, 10, 5], [100, 60, 80, 70, 50], budget)[0] == rung


def test_where_none_fits_the_answer_is_the_least() -> None:
    assert search([40, 30, 20, 10, 5], [100, 60, 45, 70, 50], 44)[0] == 2


def test_rungs_that_hold_more_than_the_budget_at_once_are_not_tried() -> None:
    assert search([90, 80, 70, 10, 5], [100, 95, 80, 40, 30], 50) == (3, 1)


@st.composite
def ladders(draw: st.DrawFn) -> tuple[list[int], list[int], set[int]]:
    """What rungs hold, falling, and their peaks, which are more by any amount; and beside them rungs that hold
    anything."""
    falling = sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=70)), reverse=True)
    rungs = [(there, False) for there in falling]
    for there in draw(st.lists(st.integers(0, 300), max_size=4)):
        rungs.insert(draw(st.integers(1, len(rungs))), (there, True))
    held = [there for there, _ in rungs]
    peaks = [there + draw(st.integers(0, 60)) for there in held]
    return held, peaks, {rung for rung, (_, beside) in enumerate(rungs) if beside}


@given(ladders(), st.integers(0, 400), st.integers(0, 400))
def test_a_smaller_budget_never_gives_a_larger_peak(
    given: tuple[list[int], list[int], set[int]], one: int, two: int
) -> None:
    held, peaks, always = given
    (smaller, tries), (larger, _) = (search(held, peaks, budget, always) for budget in sorted((one, two)))
    assert peaks[smaller] <= peaks[larger]
    assert tries <= MARKS + len(always) + len(held).bit_length()
    at = {rung: peaks[rung] for rung in marks(held, always)}
    assert always <= at.keys()
    if min(at.values()) <= min(one, two):
        assert peaks[smaller] <= min(one, two), "a mark fits"
    else:
        assert peaks[smaller] == min(at.values()), "and else the least is what is possible"
