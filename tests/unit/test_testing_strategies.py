"""Random programs: legal, printed and parsed alike, and every pass of the table keeps what they mean."""

from __future__ import annotations

from hypothesis import HealthCheck, find, given, note, settings
from hypothesis import strategies as st

from graphshard import text
from graphshard.check import check_passes
from graphshard.errors import StageTooSmall, TooManyStages
from graphshard.pipeline import PASSES, Context, parse_passes
from graphshard.program import Level, Program
from graphshard.testing import run_on_ranks
from graphshard.testing.random_model import Layer, ModelSpec
from graphshard.testing.strategies import model_specs, pass_lists, programs
from graphshard.verify import verify

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # no dependence on what ran before
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@SETTINGS
@given(programs(levels=list(Level)))
def test_random_programs_are_legal_run_and_round_trip(program: Program) -> None:
    verify(program)
    assert len(run_on_ranks(program)) == program.mesh.world_size
    printed = text.to_text(program)
    again = text.parse(printed, text.stored_constants(program))
    verify(again)
    assert text.to_text(again) == printed


@SETTINGS
@given(
    programs(meshes=["", "dp=2", "pp=2", "pp=2 dp=2", "dp=2 shard=2", "pp=3 dp=2"]),
    st.lists(pass_lists(fuse=True), min_size=3, max_size=3),
)
def test_every_pass_keeps_the_meaning(program: Program, passes: list[str]) -> None:
    for listed in passes:
        note(listed)
        try:
            list(check_passes(program, parse_passes(listed), Context(program.mesh)))
        except (TooManyStages, StageTooSmall):
            assert program.stages > 1


MANY = settings(SETTINGS, max_examples=5000)  # no model is made


def test_every_pass_of_the_table_is_among_them() -> None:
    found = find(pass_lists(fuse=True), lambda passes: len(parse_passes(passes)) == len(PASSES), settings=MANY)
    assert {item.name for item in parse_passes(found)} == set(PASSES)


def test_an_example_shrinks_to_what_matters() -> None:
    found = find(model_specs(), lambda spec: any(layer.kind == "gelu" for layer in spec.layers), settings=SETTINGS)
    assert found == ModelSpec(((1, 1),), (Layer("linear", (0,)), Layer("gelu", (1,))))
