"""How a diff reads: costs first, both graphs in columns, names never taken for markup."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from diffed import BODY, compare, program
from graphshard.diff import diff
from graphshard.diff.columns import side_by_side
from graphshard.diff.plain_text import summary, unified
from graphshard.passes.precision import Precision
from graphshard.pipeline import Context
from graphshard.rewrite import copied
from graphshard.text import parse

RELU = "%z : f32[2,8] = aten.relu.default(%y)"


def columns(before: str, after: str, width: int = 160) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    side_by_side(compare(before, after), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_costs_come_first_in_columns() -> None:
    after = BODY.replace(RELU, f"{RELU}\n  %n = aten.neg.default(%z)").replace("output 0 %z", "output 0 %n")
    lines = unified(compare(program(), program(after))).splitlines()
    assert lines[:5] == [
        "a step              before     after             change",
        "compute, forward  144 FLOP  160 FLOP  +16 FLOP (+11.1%)",
        "stored, stage 0      128 B     128 B               same",
        "peak, stage 0        288 B     288 B               same",
        "",
    ]


def test_stages_that_only_one_side_has() -> None:
    staged = BODY.replace("{module=lin}", "{module=lin, stage=1}").replace("(%y)", "(%y) {stage=1}")
    after = program(staged.replace('"w"', '"w" @1 {stage=1}'), header="level staged")
    found = compare(program(), after.replace("shard 1", "shard 1\nmesh pp=2", 1))
    peaks = [line.split() for line in summary(found) if line.startswith("peak")]
    assert peaks[0][:2] == ["peak,", "stage"] and peaks[1][2:4] == ["1", "-"]


def test_columns_hold_partners_beside_each_other() -> None:
    after = BODY.replace(RELU, f"%n = aten.neg.default(%y)\n  {RELU.replace('%y', '%n')}")
    lines = columns(program(), program(after))
    assert "graph body: 1 added, 1 changed" in lines
    added = next(line for line in lines if "aten.neg.default" in line)
    assert added.startswith(" " * 70) and " + %n" in added
    changed = next(line for line in lines if line.count("aten.relu.default") == 2)
    assert changed.startswith("%z") and " ~ %z" in changed
    assert "self: %y -> %n" in lines[lines.index(changed) + 1]
    assert "... 2 more" in lines[lines.index("graph body: 1 added, 1 changed") + 1]


def test_one_change_of_many_nodes_is_one_line_above_the_columns() -> None:
    many = "".join(f"  %n_{i} = aten.neg.default(%x) {{ATTRIBUTES}}\n" for i in range(9))
    before = BODY.replace("  return", many.replace("ATTRIBUTES", "") + "  return")
    after = BODY.replace("  return", many.replace("ATTRIBUTES", "stage=1") + "  return").replace(
        RELU, RELU.replace("relu", "neg")
    )
    lines = columns(program(before), program(after))
    heading = lines.index("graph body: 1 changed, 9 placed")
    assert lines[heading + 1] == "~ 9 nodes: stage: None -> 1 (%n_0, %n_1, %n_2, ..., %n_8)"
    assert not any("%n_4" in line for line in lines)


def test_equal_programs_have_no_columns() -> None:
    assert columns(program(), program()) == ["no difference"]


def test_what_looks_like_markup_is_text() -> None:
    after = BODY.replace("{module=lin}", '{module=lin, origin="[bold]y[/red]"}')
    before = BODY.replace("{module=lin}", '{module=other, origin="[bold]y[/red]"}')
    assert any("[bold]y[/red]" in line for line in columns(program(before), program(after), width=400))


def test_where_a_node_went_is_said_where_it_was() -> None:
    before = BODY.replace("  %y :", "  %h = aten.full.default([2], 1.0)\n  %y :")
    prologue = "graph prologue {\n  %h_1 = aten.full.default([2], 1.0) {origin=h}\n  return\n}\n"
    lines = columns(program(before), program(others=prologue))
    at = next(i for i, line in enumerate(lines) if line.startswith("%h :"))
    assert "now at %h_1 in graph prologue" in lines[at + 1]


def test_a_parameter_of_another_type_is_one_line_of_the_header() -> None:
    before = (Path(__file__).parents[1] / "cases/precision/fp16.graph").read_text()
    given = parse(before[before.index("graphshard 1") :])
    after = Precision().run(copied(given), Context(given.mesh))
    lines = unified(diff(given, after)).splitlines()
    assert '~ param "w" : f32[4,2] group=0 -> bf16[4,2] group=0' in lines
    assert not any(line.startswith(("- param", "+ param")) for line in lines)
