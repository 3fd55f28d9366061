"""Timelines and the picture of them: whole, small, and safe to open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from graphshard import dump
from graphshard.execution import Instruction, Op
from graphshard.memory.picture import StageMemory, to_svg
from graphshard.memory.simulate import simulate_memory
from graphshard.memory.timeline import timeline
from unit.test_report import compiled

SVG = "{http://www.w3.org/2000/svg}"


def steps(count: int) -> list[Instruction]:
    return [Instruction(Op.FREE, action=f"F0.{index}") for index in range(count)]


def test_only_changes_are_kept() -> None:
    rows = [{"batch": 1}, {"batch": 1, "workspace": 0}, {"batch": 1, "workspace": 2}, {"batch": 1}, {"batch": 1}]
    found = timeline(steps(5), rows)
    assert found.positions == (0, 2, 3) and found.actions == ("F0.0", "F0.2", "F0.3")
    assert found.to_json()["bytes"] == {"workspace": [0, 2, 0], "batch": [1, 1, 1]}
    assert (found.length, found.peak_bytes, found.most) == (5, 3, {"batch": 1, "workspace": 2})


def test_a_long_one_is_thinned_and_keeps_its_peak() -> None:
    rows = [{"workspace": index % 7 + (100 if index == 501 else 0)} for index in range(1000)]
    found = timeline(steps(1000), rows, points=64)
    assert len(found.positions) <= 64 and found.peak_bytes == 501 % 7 + 100
    assert 501 in found.positions and list(found.positions) == sorted(found.positions)


def test_the_picture_draws_every_stage_and_escapes_what_it_is_told() -> None:
    rows = [{"parameters": 5}, {"parameters": 5, "<odd>": 20}, {"parameters": 5}]
    measured = timeline(steps(4), [{"parameters": 5}, {"parameters": 6, "workspace": 20}, {"workspace": 6}, {}])
    stage = StageMemory(0, timeline(steps(3), rows), ("F0.0", "F0.0", "<b>"), measured, first_step=True)
    root = ElementTree.fromstring(to_svg([stage, stage], "a < b"))
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "a < b" in words and words.count("stage 0: peak 25 B, measured 26 B in the first step") == 2
    assert {"parameters", "<odd>", "measured", "F0.0"} <= set(words)
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert "<b>: instructions 2 to 2" in titles
    assert len(list(root.iter(f"{SVG}polygon"))) == 4
    for outline, area in zip(root.iter(f"{SVG}polyline"), list(root.iter(f"{SVG}polygon"))[1::2], strict=True):
        assert outline.get("class") == "measured"
        (x, y), (filled_x, filled_y) = (
            zip(*(map(float, point.split(",")) for point in (shape.get("points") or "").split()), strict=True)
            for shape in (outline, area)
        )
        assert len(x) == 8, "two ends of every level"
        assert min(y) < min(filled_y), "26 bytes are higher than 25"
        assert max(x) > max(filled_x), "the fourth instruction is to the right of the third"


def test_a_dump_has_both(tmp_path: Path) -> None:
    made, (args, kwargs) = compiled("mlp", "zero3+pp2", rows=16, measure_memory=True)
    made.step(*args, **kwargs)
    made.dump(tmp_path)
    stages: list[dict[str, Any]] = json.loads((tmp_path / "memory.json").read_text())["stages"]
    for stage in stages:
        columns = stage["timeline"]["bytes"].values()
        assert max(map(sum, zip(*columns, strict=True))) == stage["peak_bytes"]
        assert stage["peak_bytes"] == simulate_memory(made.execution_plan, stage["stage"]).peak_bytes
        rank = next(r for r in made.report()["ranks"] if r["stage"] == stage["stage"])
        assert stage["measured_timeline"] == rank["measured_timeline"]
        assert stage["measured_peak_bytes"] == rank["measured_peak_bytes"] and stage["measured_first_step"]
    page = (tmp_path / "memory.svg").read_text()
    ElementTree.fromstring(page)
    assert "MLP, plan zero3+pp2" in page and page.count('<polyline class="measured"') == 2
    dump.write_memory(tmp_path / "again", made.execution_plan, "no step yet")
    assert "polyline" not in (tmp_path / "again" / "memory.svg").read_text()
    assert '"measured_timeline": null' in (tmp_path / "again" / "memory.json").read_text()
