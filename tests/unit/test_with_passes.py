"""Where passes that a user gives go among those of a plan."""

from __future__ import annotations

from typing import ClassVar

import pytest

from graphshard.errors import UnknownPass
from graphshard.passes import default_passes, with_passes
from graphshard.pipeline import Context, Pass
from graphshard.plan import Plan
from graphshard.program import Program


def given(called: str, behind: str = "") -> Pass:
    """A pass of that name, whose ``after``, if any, is ``behind``."""

    class Given:
        name: ClassVar[str] = called
        exact: ClassVar[bool] = True

        def run(self, program: Program, ctx: Context) -> Program:
            return program

    class GivenPlace(Given):
        after: ClassVar[str] = behind

    return GivenPlace() if behind else Given()


def order(*passes: Pass) -> list[str]:
    return [item.name for item in with_passes(default_passes(Plan.parse("zero3")), passes)]


def test_a_pass_goes_behind_the_one_it_names_or_normalize() -> None:
    passes = [given("first", "hoist"), given("early"), given("second", "hoist"), given("last", "overlap")]
    before, after = ["normalize", "early", "pipeline-cut", "zero", "bucket"], ["first", "second", "overlap", "last"]
    assert order(*passes) == [*before, "hoist", *after, "fuse"]


def test_a_pass_of_a_name_that_is_there_takes_its_place() -> None:
    assert order(given("zero", "hoist")) == order()


def test_a_place_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownPass, match="unknown pass 'hoisted'; did you mean 'hoist'"):
        order(given("late", "hoisted"))
