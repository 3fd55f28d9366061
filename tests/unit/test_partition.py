"""Where to cut a line of work, against trying every cut."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from graphshard.partition import MAX_POSITIONS, SLACK, Line, least_limit, most_stages, search

numbers = st.integers(0, 20)


@st.composite
def lines(draw: st.DrawFn) -> Line:
    count = draw(st.integers(1, 7))
    costs = draw(st.lists(numbers, min_size=count, max_size=count))
    crossing = [0, *draw(st.lists(numbers, min_size=count - 1, max_size=count - 1)), 0]
    allowed = draw(st.lists(st.booleans(), min_size=count + 1, max_size=count + 1))
    readers = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True).map(sorted).map(tuple)
    params = draw(st.lists(st.tuples(numbers, readers), max_size=4))
    return Line(tuple(map(float, costs)), tuple(map(float, crossing)), tuple(allowed), tuple(params))


def every_cut(line: Line, stages: int) -> list[tuple[int, ...]]:
    """All legal cuts into stages that each have work."""
    inner = [p for p in range(1, len(line.costs)) if line.allowed[p]]
    return [
        cut
        for cut in itertools.combinations(inner, stages - 1)
        if all(any(line.costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(line.costs))))
    ]


def slowest(line: Line, cut: tuple[int, ...], byte_cost: float, shares: tuple[float, ...] = ()) -> float:
    """For its share, with all shares adding up to the number of stages."""
    ends = (0, *cut, len(line.costs))
    return max(
        (sum(line.costs[a:b]) + byte_cost * (line.crossing[a] + line.crossing[b])) / share
        for (a, b), share in zip(itertools.pairwise(ends), shares or (1.0,) * (len(cut) + 1), strict=True)
    )


def largest(line: Line, cut: tuple[int, ...]) -> int:
    ends = (0, *cut, len(line.costs))
    return max(
        sum(nbytes for nbytes, readers in line.params if any(a <= r < b for r in readers))
        for a, b in itertools.pairwise(ends)
    )


@settings(max_examples=300, deadline=None)
@given(
    lines(),
    st.lists(st.sampled_from([0.5, 1.0, 1.5]), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.integers(0, 60) | st.just(math.inf),
)
def test_search_finds_the_fastest_cut_that_keeps_the_limit(
    line: Line, weights: list[float], byte_cost: float, limit: float
) -> None:
    stages = len(weights)
    shares = tuple(weight / sum(weights) for weight in weights)
    scaled = tuple(share * stages for share in shares)
    cuts = [cut for cut in every_cut(line, stages) if largest(line, cut) <= limit]
    found = search(line, stages, byte_cost, limit, shares if len(set(weights)) > 1 else ())
    if not cuts:
        assert found is None
        return
    assert found in cuts
    bound = min(slowest(line, cut, byte_cost, scaled) for cut in cuts) * (1 + SLACK)
    assert slowest(line, found, byte_cost, scaled) <= bound + 1e-9
    sent = [sum(line.crossing[p] for p in c) for c in cuts if slowest(line, c, byte_cost, scaled) <= bound * (1 - 1e-9)]
    assert sum(line.crossing[p] for p in found) <= min(sent, default=math.inf)


@settings(deadline=None)
@given(lines(), st.integers(1, 4))
def test_what_errors_name_is_what_there_is(line: Line, stages: int) -> None:
    counts = [n for n in range(1, len(line.costs) + 1) if every_cut(line, n)]
    assert most_stages(line) == max(counts, default=0)
    cuts = every_cut(line, stages)
    assert least_limit(line, stages) == min((largest(line, cut) for cut in cuts), default=math.inf)


def test_a_long_line_is_cut_at_few_bytes_near_the_balance() -> None:
    count = 40 * MAX_POSITIONS
    crossing = [1.0 if p % 10 == 0 else 50.0 for p in range(count + 1)]
    found = search(Line((1.0,) * count, tuple(crossing), (True,) * (count + 1)), 4, 0.001)
    assert found is not None
    assert all(abs(p - count * (i + 1) / 4) <= count / 100 for i, p in enumerate(found))
    assert all(crossing[p] == 1.0 for p in found)
