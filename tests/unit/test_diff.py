"""The structural diff: a node is itself under another name, in another place and in another graph."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from diffed import BODY, compare, program
from graphshard.diff.alignment import increasing
from graphshard.diff.difference import Diff, Kind
from graphshard.diff.files import diff_files
from graphshard.diff.plain_text import unified


def names(found: Diff) -> dict[str, list[str]]:
    """Names of the nodes after (of removed ones before), for what is not empty."""
    found_names = {str(kind): [one.entry.name for one in found.of(kind)] for kind in Kind if kind is not Kind.SAME}
    return {kind: found for kind, found in found_names.items() if found}


def shown(found: Diff, color: bool = False) -> str:
    """The unified text without the table of costs."""
    return unified(found, color).partition("\n\n")[2]


def test_equal_programs_do_not_differ() -> None:
    found = compare(program(), program())
    assert not found
    assert unified(found) == "no difference"


def test_a_new_name_and_a_new_place_are_no_difference() -> None:
    renamed = BODY.replace("%y", "%mm_7").replace("{module=lin}", "{module=lin, origin=y}")
    assert not compare(program(), program(renamed))
    swapped = """
  %x : f32[2,4] = batch 0
  %w : f32[4,8] = param "w"
  %y : f32[2,8] = aten.mm.default(%x, %w) {module=lin}
  %z : f32[2,8] = aten.relu.default(%y)
  return output 0 %z
"""
    assert not compare(program(), program(swapped))


def test_a_node_put_between_two_others_is_added_and_its_reader_changed() -> None:
    after = BODY.replace(
        "%z : f32[2,8] = aten.relu.default(%y)", "%n = aten.neg.default(%y)\n  %z = aten.relu.default(%n)"
    )
    found = compare(program(), program(after))
    assert names(found) == {"added": ["n"], "changed": ["z"]}
    assert found.of(Kind.CHANGED)[0].what == ("self: %y -> %n",)
    assert shown(found) == (
        "graph body: 1 added, 1 changed\n"
        "  + %n : f32[2,8] = aten.neg.default(%y)\n"
        "  ~ %z : f32[2,8] = aten.relu.default(%n)\n"
        "      self: %y -> %n"
    )


def test_what_is_removed_is_shown_where_it_was() -> None:
    before = BODY.replace("  %z :", "  %n = aten.neg.default(%y) {stage=1}\n  %z :")
    lines = shown(compare(program(before), program(BODY + ""))).splitlines()
    assert lines == ["graph body: 1 removed", "  - %n : f32[2,8] = aten.neg.default(%y) {stage=1}"]

    first = BODY.replace("  %y :", "  %n = aten.neg.default(%x)\n  %y :")
    added_later = BODY.replace("  return", "  %e = aten.exp.default(%z)\n  return")
    lines = shown(compare(program(first), program(added_later))).splitlines()
    assert [line.strip()[:4] for line in lines[1:]] == ["- %n", "+ %e"]


def test_another_operator_that_took_over_the_origin_is_a_change() -> None:
    after = BODY.replace("%z : f32[2,8] = aten.relu.default(%y)", "%g = aten.gelu.default(%y) {origin=z, made_by=swap}")
    found = compare(program(), program(after.replace("output 0 %z", "output 0 %g")))
    assert names(found) == {"changed": ["g"]}
    assert found.of(Kind.CHANGED)[0].what == ("operator: aten.relu.default -> aten.gelu.default",)


def test_types_constants_and_attributes_that_changed_are_named() -> None:
    before = BODY.replace("aten.relu.default(%y)", "aten.sum.dim_IntList(%y, [1], True)").replace("%z : f32[2,8]", "%z")
    after = BODY.replace("aten.relu.default(%y)", "aten.sum.dim_IntList(%y, [0], dtype=f64) {stage=1, tag=save}")
    found = compare(program(before), program(after.replace("%z : f32[2,8]", "%z")))
    assert found.of(Kind.CHANGED)[0].what == (
        "dim: [1] -> [0]",
        "keepdim: True -> default",
        "dtype: default -> f64",
        "type: f32[2,1] -> f64[8]",
        "stage: None -> 1",
        "tag: None -> save",
    )


def test_a_recomputed_node_is_a_copy_and_not_an_addition() -> None:
    after = BODY.replace(
        "  return",
        "  %y_1 = aten.mm.default(%x, %w) {phase=backward, module=lin, origin=y, made_by=recompute}\n  return",
    )
    found = compare(program(), program(after))
    assert names(found) == {"duplicated": ["y_1"]}
    (copy,) = found.of(Kind.DUPLICATED)
    assert copy.before and copy.before.name == "y"
    assert "copy of %y" in shown(found)


def test_of_two_copies_the_one_in_the_phase_it_was_is_the_original() -> None:
    after = BODY.replace(
        "  %y : f32[2,8] = aten.mm.default(%x, %w) {module=lin}",
        "  %a = aten.mm.default(%x, %w) {phase=backward, module=lin, origin=y}\n"
        "  %b = aten.mm.default(%x, %w) {module=lin, origin=y}",
    ).replace("(%y)", "(%b)")
    assert names(compare(program(), program(after))) == {"duplicated": ["a"]}


def test_a_node_in_another_graph_has_moved() -> None:
    before = BODY.replace("  %y :", "  %h = aten.full.default([2], 1.0)\n  %y :")
    prologue = "graph prologue {\n  %h_1 = aten.full.default([2], 1.0) {origin=h}\n  return\n}\n"
    found = compare(program(before), program(others=prologue))
    assert names(found) == {"moved": ["h_1"]}
    (move,) = found.of(Kind.MOVED)
    assert move.before and (move.before.section, move.entry.section) == ("body", "prologue")
    assert shown(found) == (
        "graph prologue: 1 moved here\n"
        "  ~ %h_1 : f32[2] = aten.full.default([2], 1.0) {origin=h}\n"
        "      graph: body -> prologue\n"
        "      phase: forward -> update"
    )


def test_a_gather_hoisted_out_of_the_body_has_moved() -> None:
    gather = """  %g : f32[4,4] = _c10d_functional.all_gather_into_tensor.default(%x, 2, "dp") {module=h, made_by=NAME}
  %v : f32[4,4] = _c10d_functional.wait_tensor.default(%g) {module=h, made_by=NAME}
"""
    before = BODY.replace("  %y :", gather.replace("NAME", "zero") + "  %y :")
    prologue = 'graph prologue {\n  %x : f32[2,4] = shard "h"\n' + gather.replace("NAME", "hoist") + "  return\n}\n"
    found = compare(program(before), program(others=prologue))
    assert names(found) == {"added": ["x"], "moved": ["g", "v"]}
    again = before.replace(
        "  return", gather.replace("NAME", "zero").replace("%g", "%g2").replace("%v", "%v2") + "  return"
    )
    assert names(compare(program(again), program(others=prologue))) == {
        "added": ["x"], "moved": ["g", "v"], "removed": ["g2", "v2"],
    }  # fmt: skip


def test_inputs_and_outputs_are_aligned_by_slot() -> None:
    after = BODY.replace('param "w"', 'param "v"').replace("return output 0 %z", "return output 0 %y, output 1 %z")
    found = compare(program(), program(after, header='param "v" : f32[4,8]'))
    assert names(found) == {"added": ["w", "z"], "removed": ["w"], "changed": ["y", "y"]}
    assert [c.what for c in found.of(Kind.CHANGED)] == [("mat2: %w -> %w",), ("value: %z -> %y",)]
    assert "  + return output 1 %z" in shown(found).splitlines()


def test_what_only_went_to_another_stage_is_not_replaced() -> None:
    after = BODY.replace('param "w"', 'param "w" @1 {stage=1}').replace("output 0 %z", "output 0 @1 %z")
    found = compare(program(), program(after))
    assert [(c.entry.name, c.what) for c in found.of(Kind.PLACED)] == [
        ("w", ('slot: param "w" -> param "w" @1', "stage: None -> 1")),
        ("z", ("slot: output 0 -> output 0 @1",)),
    ]
    assert names(found).keys() == {"placed"}


def test_the_header_is_compared_line_by_line_without_the_history() -> None:
    after = program(header='level staged\nmesh dp=2\nhistory "normalize" nodes=2')
    assert compare(program(), after).header == ("- level captured", "+ mesh dp=2", "+ level staged")


def test_one_change_of_many_nodes_is_one_line() -> None:
    many = "".join(f"  %n_{i} = aten.neg.default(%x) {{ATTRIBUTES}}\n" for i in range(9))
    before = BODY.replace("  return", many.replace("ATTRIBUTES", "") + "  return")
    after = BODY.replace("  return", many.replace("ATTRIBUTES", "stage=1") + "  return")
    found = compare(program(before), program(after))
    assert len(found.of(Kind.PLACED)) == 9
    assert shown(found) == "graph body: 9 placed\n  ~ 9 nodes: stage: None -> 1 (%n_0, %n_1, %n_2, ..., %n_8)"


def test_colour_only_adds_escapes() -> None:
    import re

    after = BODY.replace("aten.relu.default(%y)", "aten.relu.default(%y) {stage=1}").replace(
        "  return", "  %n = aten.neg.default(%z)\n  return"
    )
    found = compare(program(), program(after))
    colored = shown(found, color=True)
    assert re.sub(r"\x1b\[\d+m", "", colored) == shown(found)
    assert "\x1b[32m  + %n" in colored
    assert "\x1b[33m  ~ %z" in colored


def test_two_files_are_compared(tmp_path: Path) -> None:
    (tmp_path / "a.graph").write_text(program())
    (tmp_path / "b.graph").write_text(program(BODY.replace("relu", "neg")))
    found = diff_files([tmp_path / "a.graph", tmp_path / "b.graph"])
    assert found.of(Kind.CHANGED)[0].what == ("operator: aten.relu.default -> aten.neg.default",)


STAGED = "level staged\nmesh pp=2"


def staged(body: str) -> str:
    return program(body).replace("graphshard 1", f"graphshard 1\n{STAGED}", 1)


def test_another_stage_is_not_just_a_change() -> None:
    before = BODY.replace("{module=lin}", "{module=lin, stage=0}").replace("(%y)", "(%y) {stage=0}")
    after = before.replace("(%y) {stage=0}", "(%t) {stage=1}").replace(
        "  %z", "  %t : f32[2,8] = graphshard.transfer.default(%y, 0, 1) {stage=1}\n  %z"
    )
    found = compare(staged(before), staged(after.replace("output 0", "output 0 @1")))
    assert names(found) == {"added": ["t"], "restaged": ["z", "z"]}
    assert [one.what for one in found.of(Kind.RESTAGED)] == [
        ("self: %y -> %t", "stage: 0 -> 1"),
        ("slot: output 0 -> output 0 @1",),
    ]


def test_the_first_stage_a_node_is_given_is_no_new_home() -> None:
    after = BODY.replace("{module=lin}", "{module=lin, stage=1}")
    assert names(compare(program(), program(after))) == {"placed": ["y"]}
    wider = after.replace("aten.relu.default(%y)", "aten.relu.default(%y) {stage=1, tag=save}")
    assert names(compare(program(), program(wider))) == {"placed": ["y"], "changed": ["z"]}


GATHER = """
  %w : f32[4,8] = param "w"
  %x : f32[2,4] = batch 0
  %g : f32[4,4] = _c10d_functional.all_gather_into_tensor.default(%x, 2, "dp")
  %v : f32[4,4] = _c10d_functional.wait_tensor.default(%g)
  %a : f32[2,4] = aten.exp.default(%x)
  %b : f32[2,4] = aten.neg.default(%a)
  %y : f32[2,8] = aten.mm.default(%b, %w)
  %z : f32[4,8] = aten.mm.default(%v, %w)
  return output 0 %z, output 1 %y
"""
WAIT = "  %v : f32[4,4] = _c10d_functional.wait_tensor.default(%g)\n"


def test_a_wait_that_comes_later_is_reordered() -> None:
    after = GATHER.replace(WAIT, "").replace("  %z", f"{WAIT}  %z")
    found = compare(program(GATHER), program(after))
    assert names(found) == {"reordered": ["v"]}
    assert found.of(Kind.REORDERED)[0].what == ("place: first -> behind %y",)
    assert "1 reordered" in shown(found)


def test_the_order_of_computations_is_no_difference() -> None:
    after = GATHER.replace("  %y : f32[2,8] = aten.mm.default(%b, %w)\n", "").replace(
        "  return", "  %y : f32[2,8] = aten.mm.default(%b, %w)\n  return"
    )
    assert not compare(program(GATHER), program(after))


@given(st.permutations(list(range(9))))
def test_the_longest_increasing_subsequence(values: list[int]) -> None:
    found = [values[position] for position in increasing(values)]
    assert found == sorted(found)
    longest = max(size for size in range(10) for chosen in combinations(values, size) if list(chosen) == sorted(chosen))
    assert len(found) == longest
