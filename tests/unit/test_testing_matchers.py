"""Selections find what they say, and a failed count shows the lines it was about."""

from __future__ import annotations

import pytest

from graphshard import text
from graphshard.program import Program
from graphshard.testing import apply, assert_same_meaning, nodes, run_on_ranks, trainable
from graphshard.testing.plugin import pytest_assertrepr_compare
from two_layers import two_layers


@pytest.fixture(scope="module")
def program() -> Program:
    return apply("normalize;pipeline-cut;zero:stage=3", text.parse(two_layers()))


def test_operators_are_found_by_whole_words(program: Program) -> None:
    body = nodes(program).in_graph("body")
    assert body.op("mm").count == 5
    assert body.op("aten.mm").count == body.op("aten.mm.default").count == body.op("*.mm.*").count == 5
    assert body.op("m").count == body.op("scatter_ten").count == 0
    assert body.op("all_gather").count == body.op("all_gather_into_tensor").count == 3


def test_a_derivative_is_another_operator() -> None:
    program = trainable(lambda p, x: (x * p["w"]).tanh().sum(), [2], params={"w": [2]})
    assert nodes(program).op("tanh").count == nodes(program).op("tanh_backward").count == 1


def test_every_selection_narrows(program: Program) -> None:
    body = nodes(program).in_graph("body")
    gathers = body.op("all_gather")
    assert gathers.axis("dp").count == gathers.made_by("zero").count == 3
    assert gathers.axis("pp").count == gathers.made_by("").count == 0
    assert [gathers.phase(phase).count for phase in ("forward", "backward")] == [2, 1]
    assert [body.op("mm").stage(stage).count for stage in (0, 1)] == [2, 3]
    assert body.axis("pp").made_by("pipeline-cut").op("transfer").count == body.op("transfer").count == 2
    assert body.op("mm").module("b").count == 3
    assert body.op("mm").module("").count == 0


def test_reads_sees_through_waits_and_views(program: Program) -> None:
    gathers = nodes(program).op("all_gather")
    assert nodes(program).op("mm").reads(gathers).count == 3
    assert nodes(program).op("mean").reads(gathers).count == 0


def test_follows_is_by_place_in_the_same_graph(program: Program) -> None:
    body = nodes(program).in_graph("body")
    forward = body.op("mm").phase("forward")
    assert body.op("mm").follows(forward).names == ["gb", "gh", "ga"]
    assert nodes(program).in_graph("epilogue").follows(forward).count == 0


def test_one_says_what_else_there_is(program: Program) -> None:
    assert nodes(program).op("mean").one().name == "l"
    assert str(nodes(program).op("mean")).startswith("graph body\n  %l : f32[] = aten.mean.default(")
    with pytest.raises(AssertionError, match=r"expected one node, found 5: nodes\(program\).op\('mm'\)[^>]*> %h"):
        nodes(program).op("mm").one()


def test_a_failed_count_shows_the_lines(program: Program) -> None:
    count = nodes(program).op("mm").phase("forward").count
    lines = pytest_assertrepr_compare("==", count, 7)
    assert lines is not None
    assert lines[:2] == ["nodes(program).op('mm').phase('forward').count == 7", "found 2"]
    assert [line.split()[1] for line in lines if line.startswith("  >")] == ["%h", "%y"]
    assert any("%gh" in line and not line.startswith("  >") for line in lines)  # left out by the last selection
    assert pytest_assertrepr_compare("==", 2, 7) is None


def test_results_come_by_rank(program: Program) -> None:
    results = run_on_ranks(program)
    assert len(results) == 4
    assert ["param a.w" in result for result in results] == [True, True, False, False]
    assert all(result["loss of step 0"].equal(results[0]["loss of step 0"]) for result in results[1:])


def test_another_meaning_is_shown_as_a_difference_of_graphs(program: Program) -> None:
    assert_same_meaning(text.parse(two_layers()), program)
    other = text.parse(two_layers().replace("0.125", "0.25"))
    with pytest.raises(AssertionError, match=r"differs by(.|\n)*first at %gy(.|\n)*\[\[2, 4\], 0.125\]|0.125 -> 0.25"):
        assert_same_meaning(text.parse(two_layers()), other)
