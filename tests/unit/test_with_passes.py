"""Where passes that a user gives go among those of a plan, and which options passes refuse."""

from __future__ import annotations

from typing import ClassVar

import pytest

from graphshard.errors import PassOptionError, UnknownPass
from graphshard.passes import default_passes, with_passes
from graphshard.pipeline import Context, Pass, parse_passes
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


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("zero", "stage=9", "1, 2 or 3, or 0 for plain replication"),
        ("zero", "stage=-1", "1, 2 or 3, or 0 for plain replication"),
        ("hoist", "budget_gb=-1.0", "a finite number of at least 0"),
        ("hoist", "budget_gb=nan", "a finite number of at least 0"),
        ("fuse", "most=0", "an integer of at least 1"),
        ("fuse", "function_flops=inf", "a finite number of at least 0"),
        ("pipeline-cut", "stages=", "module paths"),
        ("pipeline-cut", "schedule=zb", "1f1b or gpipe or zb-h1 or zb-h2"),
        ("pipeline-cut", "byte_flops=-1.0", "a finite number of at least 0"),
        ("pipeline-cut", "limit_gb=0.0", "a number above 0"),
        ("memory-policy", "levels=-1", "integers from 0 to 35"),
        ("memory-policy", "levels=36", "integers from 0 to 35"),
        ("memory-policy", "blocks=-1", "integers of at least 0"),
        ("memory-policy", "offload_blocks=-2", "integers of at least 0"),
        ("memory-policy", "file_blocks=-2", "integers of at least 0"),
        ("memory-policy", "ops=", "patterns of names"),
        ("offload", "params_of=", "names of buckets"),
        ("precision", "init_scale=0.0", "a finite number above 0"),
        ("precision", "growth_factor=1.0", "a finite number above 1"),
        ("precision", "backoff_factor=1.0", "a finite number above 0 and below 1"),
        ("precision", "growth_interval=0", "an integer of at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, options: str, expected: str) -> None:
    with pytest.raises(PassOptionError) as caught:
        parse_passes(f"{name}:{options}")
    assert str(caught.value) == f"pass {name!r} does not take {options!r}; expected {expected}"
