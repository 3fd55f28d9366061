"""Which pass did what, over several graphs of a dump."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffed import BODY, program
from graphshard.diff.difference import Diff, Kind
from graphshard.diff.files import diff_files, dumped
from graphshard.errors import MissingFile, UnknownDump

RELU = "%z : f32[2,8] = aten.relu.default(%y)"
DROPPED = BODY.replace(RELU, "%n : f32[2,8] = aten.neg.default(%y)\n  %z : f32[2,8] = aten.relu.default(%n)")
GRAPHS = {
    "00-capture": DROPPED,
    "01-normalize": BODY,
    # What it adds it does not sign.
    "02-scale": BODY.replace(RELU, "%s : f32[2,8] = aten.mul.Tensor(%y, 2.0)\n  %z : f32[2,8] = aten.relu.default(%s)"),
    "03-place": BODY.replace("{module=lin}", "{module=lin, stage=1}").replace(
        RELU,
        "%k : f32[2,8] = aten.mm.default(%x, %w) {module=lin, origin=y, made_by=recompute}\n"
        "  %s : f32[2,8] = aten.mul.Tensor(%y, 3.0)\n  %z : f32[2,8] = aten.relu.default(%s)",
    ),
}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A folder with the graphs above."""
    for name, body in GRAPHS.items():
        (tmp_path / f"{name}.graph").write_text(program(body))
    (tmp_path / "plan.txt").write_text("")
    return tmp_path


def by(found: Diff, kind: Kind) -> dict[str, tuple[str, ...]]:
    return {one.entry.name: one.by for one in found.of(kind)}


def test_every_entry_names_its_passes(dump: Path) -> None:
    found = diff_files(dumped(dump))
    assert by(found, Kind.REMOVED) == {"n": ("normalize",)}
    assert by(found, Kind.ADDED) == {"s": ("scale",)}
    assert by(found, Kind.DUPLICATED) == {"k": ("recompute",)}
    assert by(found, Kind.PLACED) == {"y": ("place",)}
    assert by(found, Kind.CHANGED) == {"z": ("normalize", "scale")}
    assert all(not one.by for one in found.of(Kind.SAME))
    assert [name for name, _ in found.steps] == ["normalize", "scale", "place"]
    assert found.steps[-1][1] == found.after


def test_what_is_gone_is_followed_through_new_names(dump: Path) -> None:
    names = {"00-capture": "n", "01-normalize": "n_7", "02-scale": "n"}
    for graph, name in names.items():
        (dump / f"{graph}.graph").write_text(
            program(
                DROPPED.replace("%n", f"%{name}").replace("aten.neg.default(%y)", "aten.neg.default(%y) {origin=n}")
            )
        )
    assert by(diff_files(dumped(dump)), Kind.REMOVED) == {"n": ("place",)}


def test_a_pass_that_changed_something_else_of_a_node_is_not_blamed(dump: Path) -> None:
    path = dump / "02-scale.graph"
    path.write_text(path.read_text().replace("relu.default(%s)", "relu.default(%s) {tag=save}"))
    found = diff_files(dumped(dump, "normalize..place"))
    assert by(found, Kind.CHANGED) == {"z": ("scale",)}, "its tag came and went"
    assert by(found, Kind.ADDED) == {"s": ("scale",)}


def test_the_only_pass_between_two_graphs_is_responsible_for_all(dump: Path) -> None:
    found = diff_files(dumped(dump, "scale"))
    assert by(found, Kind.ADDED) == {"s": ("scale",)} and by(found, Kind.CHANGED) == {"z": ("scale",)}
    assert not found.steps
    unknown = diff_files([dump / "00-capture.graph", dump / "02-scale.graph"])
    assert by(unknown, Kind.ADDED) == {"s": ()}


@pytest.mark.parametrize(
    ("span", "first", "last", "count"),
    [
        ("", "capture", "place", 4),
        ("scale", "normalize", "scale", 2),
        ("02-scale", "normalize", "scale", 2),
        ("normalize..place", "normalize", "place", 3),
        ("..normalize", "capture", "normalize", 2),
        ("scale..", "scale", "place", 2),
    ],
)
def test_spans_of_a_dump(dump: Path, span: str, first: str, last: str, count: int) -> None:
    paths = dumped(dump, span)
    assert (paths[0].stem[3:], paths[-1].stem[3:], len(paths)) == (first, last, count)


@pytest.mark.parametrize("span", ["capture", "scal", "scale..normalize", "scale..scale", "a..b"])
def test_spans_that_are_none(dump: Path, span: str) -> None:
    with pytest.raises(UnknownDump, match=r"it holds (capture, )?normalize, scale, place"):
        dumped(dump, span)


def test_a_folder_without_graphs_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownDump, match="expected a directory that `graphshard dump` wrote"):
        dumped(tmp_path)
    with pytest.raises(MissingFile, match=r"there is no file '.*a\.graph'"):
        diff_files([tmp_path / "a.graph", tmp_path / "b.graph"])
