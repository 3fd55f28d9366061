"""What stages send to one another never makes them wait in a circle, whichever values cross which boundaries."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from graphshard.codegen.order import order
from graphshard.codegen.schedule import Schedule, make
from graphshard.codegen.sends import Transfers, sent_ahead
from graphshard.execution import Instruction, match_waits
from graphshard.plan import SCHEDULES
from graphshard.prove.channels import between_stages, check_progress, check_transfers, of_stages
from handmade import kind, recv, run, send, wait

X = kind(4)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Schedule, Transfers]:
    """A schedule, and values that go from stage to stage and some further, forward and backward."""
    stages = draw(st.integers(2, 6))
    pairs = [(i, j) for i in range(stages) for j in range(i + 1, stages)]
    further = draw(st.lists(st.tuples(st.sampled_from(pairs), st.integers(1, 2)), max_size=4))
    values = {(i, i + 1): draw(st.integers(1, 2)) for i in range(stages - 1)} | dict(further)
    backward = {("B", j, i): count for (i, j), count in values.items()}
    schedule = make(draw(st.sampled_from(SCHEDULES)), stages, draw(st.integers(1, 12)))
    return schedule, {("F", i, j): count for (i, j), count in values.items()} | backward


def body(schedule: Schedule, transfers: Transfers, stage: int) -> list[Instruction]:
    """Of one stage: every action receives, computes and sends."""
    result = []
    for action in schedule.stages[stage]:
        label = str(action)
        names = [
            (f"{a}{source}to{target}n{n}.{action.microbatch}", source, target)
            for (a, source, target), count in transfers.items()
            for n in range(count)
            if a == action.kind
        ]
        arriving = [(name, source) for name, source, target in names if target == stage]
        leaving = [(name, target) for name, source, target in names if source == stage]
        result += [recv(name, source, X, label) for name, source in arriving]
        result += [wait(name, label) for name, _ in arriving]
        result.append(run("f", " ".join(name for name, _ in arriving), " ".join(name for name, _ in leaving), label))
        result += [send(name, target, X, label) for name, target in leaving]
    return result


def ordered(schedule: Schedule, transfers: Transfers, ahead: Mapping[tuple[str, int], int]) -> list[list[Instruction]]:
    stages = range(len(schedule.stages))
    return [order([], body(schedule, transfers, stage), [], None, ahead=ahead)[1] for stage in stages]


@settings(deadline=None)
@given(pipelines())
def test_no_stages_wait_in_a_circle(pipeline: tuple[Schedule, Transfers]) -> None:
    schedule, transfers = pipeline
    lists = [tuple(part) for part in ordered(schedule, transfers, sent_ahead(schedule, transfers))]
    check_transfers(of_stages(lists))
    check_progress(of_stages(lists), [match_waits(part) for part in lists], between_stages(len(lists)))


def test_a_channel_carries_one_message_at_a_time_where_that_suffices() -> None:
    for name in SCHEDULES:
        schedule = make(name, 4, 8)
        transfers = {("F", i, i + 1): 1 for i in range(3)} | {("B", i + 1, i): 1 for i in range(3)}
        assert ordered(schedule, transfers, sent_ahead(schedule, transfers)) == ordered(schedule, transfers, {})


def test_as_many_messages_more_as_it_takes() -> None:
    """Stage 0 sends two values in the forward that comes ahead of its second backward, stage 1 in the one before."""
    schedule = make("zb-h2", 2, 4)
    ahead = sent_ahead(schedule, {("F", 0, 1): 2, ("B", 1, 0): 2})
    assert {at: count for at, count in ahead.items() if count} == {("F0.3", 1): 1}
