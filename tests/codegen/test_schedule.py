"""Schedules: their text, that they can run, how much they hold, how long they wait."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphshard.codegen import schedule as schedules
from graphshard.codegen.schedule import Action, Schedule, forward_only, make, shares, simulate, validate
from graphshard.errors import InvalidSchedule
from graphshard.plan import SCHEDULES

sizes = st.tuples(st.integers(1, 8), st.integers(1, 16))
names = st.sampled_from(SCHEDULES)


def lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


EXPECTED = {
    ("gpipe", 2, 3): """
        F0.0 F0.1 F0.2 B0.0 B0.1 B0.2
        F1.0 F1.1 F1.2 B1.0 B1.1 B1.2
    """,
    ("1f1b", 2, 3): """
        F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
        F1.0 B1.0 F1.1 B1.1 F1.2 B1.2
    """,
    ("1f1b", 3, 1): """
        F0.0 B0.0
        F1.0 B1.0
        F2.0 B2.0
    """,
    ("zb-h1", 1, 2): "F0.0 B0.0 F0.1 B0.1",
    ("zb-h1", 2, 3): """
        F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
        F1.0 B1.0 F1.1 B1.1 W1.0 F1.2 B1.2 W1.1 W1.2
    """,
    ("zb-h1", 3, 2): """
        F0.0 F0.1 B0.0 B0.1
        F1.0 F1.1 B1.0 B1.1 W1.0 W1.1
        F2.0 B2.0 F2.1 B2.1 W2.0 W2.1
    """,
    ("zb-h2", 2, 4): """
        F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3
        F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 W1.0 F1.3 B1.3 W1.1 W1.2 W1.3
    """,
}


@pytest.mark.parametrize(("name", "stages", "microbatches"), EXPECTED)
def test_order(name: str, stages: int, microbatches: int) -> None:
    assert str(make(name, stages, microbatches)) == lines(EXPECTED[name, stages, microbatches])


def test_the_table_has_the_names_of_the_plan() -> None:
    assert tuple(schedules.BY_NAME) == SCHEDULES


@given(names, sizes)
def test_every_schedule_is_valid_and_its_text_parses_back(name: str, size: tuple[int, int]) -> None:
    schedule = make(name, *size)
    validate(schedule)
    assert Schedule.parse(str(schedule)) == schedule
    assert (len(schedule.stages), schedule.microbatches) == size


@given(sizes)
def test_forward_only_is_valid(size: tuple[int, int]) -> None:
    schedule = forward_only(*size)
    validate(schedule)
    assert {action.kind for actions in schedule.stages for action in actions} == {"F"}


@given(sizes)
def test_1f1b_holds_as_many_microbatches_as_stages_are_left(size: tuple[int, int]) -> None:
    stages, microbatches = size
    held = simulate(make("1f1b", *size)).peak_in_flight
    assert held == tuple(min(stages - stage, microbatches) for stage in range(stages))


@given(sizes)
def test_zb_h1_holds_no_more_than_the_first_stage_of_1f1b(size: tuple[int, int]) -> None:
    assert max(simulate(make("zb-h1", *size)).peak_in_flight) <= simulate(make("1f1b", *size)).peak_in_flight[0]


@given(sizes)
def test_zb_h1_waits_only_until_the_first_forward_reaches_the_last_stage(size: tuple[int, int]) -> None:
    stages, microbatches = size
    took = simulate(make("zb-h1", *size)).makespan
    if microbatches >= stages:
        assert took == (stages - 1) + 3 * microbatches
    # 1F1B's last stage sends what its B makes before it computes gradients of weights.
    assert took <= simulate(make("1f1b", *size)).makespan == 2 * (stages - 1) + 3 * microbatches


@given(sizes)
def test_zb_h2_holds_no_more_on_any_stage_than_on_the_first(size: tuple[int, int]) -> None:
    stages, microbatches = size
    held = simulate(make("zb-h2", *size)).peak_in_flight
    assert max(held) == held[0] == min(2 * stages - 1, microbatches)


def makespan(schedule: Schedule, parts: Sequence[float]) -> float:
    return simulate(schedule, parts, parts, parts).makespan


@settings(deadline=None)
@given(names, sizes)
def test_shares_are_parts_of_the_work_and_never_slower_than_equal_ones(name: str, size: tuple[int, int]) -> None:
    schedule, stages = make(name, *size), size[0]
    parts = shares(schedule)
    assert sum(parts) == pytest.approx(1) and min(parts) > 0
    assert makespan(schedule, parts) <= makespan(schedule, [1 / stages] * stages) * (1 + 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_shares_are_the_best_of_a_fine_grid(name: str) -> None:
    schedule = make(name, 2, 4)
    best = min(makespan(schedule, [part / 1000, 1 - part / 1000]) for part in range(300, 700))
    assert makespan(schedule, shares(schedule)) <= best * 1.001


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_more_memory_makes_a_schedule_faster(stages: int, microbatches: int) -> None:
    """Qi et al. 2023, figure 3: less waiting from 1F1B to ZB-H1 to ZB-H2."""
    order = [make(name, stages, microbatches) for name in ("1f1b", "zb-h1", "zb-h2")]
    slow, middle, fast = (makespan(schedule, shares(schedule)) for schedule in order)
    assert slow > middle > fast > 3 * microbatches / stages


def test_gpipe_gains_nothing_by_unequal_shares() -> None:
    assert shares(make("gpipe", 3, 4)) == pytest.approx([1 / 3] * 3)


def test_costs_per_stage() -> None:
    result = simulate(make("gpipe", 2, 1), cost_f=[1, 2], cost_b=[4, 8], cost_w=[16, 32])
    assert result.makespan == 1 + 2 + 8 + 32  # stage 0's B and W, 4 + 16, run while stage 1 computes its W
    assert result.bubble_fraction == pytest.approx(1 - (1 + 2 + 4 + 8 + 16 + 32) / (2 * 43))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one stage and one micro-batch"),
        ("F0.0 B0.0 B0.0", "B0.0 is there 2 times"),
        ("B0.0 F0.0", "B0.0 comes before F0.0"),
        ("F0.0 F0.1 B0.1", "B0.0 is missing"),
        ("F0.0 B0.0 W0.0", "stage 0 never has any"),
        ("F0.0 B0.0\nF1.0 W1.0 B1.0", "W1.0 comes before B1.0"),
        ("F0.0 B0.0\nF1.0 F1.1 B1.0 B1.1", "B1.1 is not among the actions of stage 1"),
        ("F0.0 B0.0\nB1.0", "F1.0 is missing"),
        ("F0.0 B0.0 F0.1 B0.1\nF1.0 F1.1 B1.0 B1.1", "B0.0 waits for B1.0, F1.1 waits for F0.1: it cannot finish"),
    ],
)
def test_what_validate_refuses(text: str, says: str) -> None:
    schedule = Schedule.parse(text)
    with pytest.raises(InvalidSchedule) as caught:
        validate(schedule)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"), [("F0.0 X0.1", "'X0.1' is not an action"), ("F1.0", "line 1, which is stage 0's")]
)
def test_what_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(InvalidSchedule) as caught:
        Schedule.parse(text)
    assert says in str(caught.value)


def test_microbatches_may_run_in_any_order_that_can_finish() -> None:
    validate(Schedule.parse("F0.0 F0.1 B0.0 B0.1\nF1.1 B1.1 F1.0 B1.0"))


def test_an_action_prints_short() -> None:
    assert str(Action("F", 0, 3)) == "F0.3"
    assert Action.parse("W12.34") == Action("W", 12, 34)
