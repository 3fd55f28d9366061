"""The JSON of a diff: its schema, and that it says what the diff says."""

from __future__ import annotations

import json

from diffed import BODY, compare, program
from graphshard.diff.json import to_json

RELU = "%z : f32[2,8] = aten.relu.default(%y)"
AFTER = BODY.replace(RELU, "%n = aten.neg.default(%y) {made_by=mine}\n  %z = aten.relu.default(%n)")


def test_the_schema() -> None:
    data = json.loads(json.dumps(to_json(compare(program(), program(AFTER, header="level staged")))))
    assert list(data) == ["version", "costs", "steps", "header", "counts", "changes"]
    assert data["version"] == 1 and data["steps"] == []
    assert data["header"] == ["- level captured", "+ level staged"]
    assert {"quantity": "flops", "of": "forward", "before": 144, "after": 160} in data["costs"]
    assert {cost["quantity"] for cost in data["costs"]} == {"flops", "stored_bytes", "peak_bytes"}
    assert data["counts"] == {
        "added": 1, "removed": 0, "duplicated": 0, "moved": 0, "restaged": 0, "changed": 1, "placed": 0,
        "reordered": 0, "same": 4,
    }  # fmt: skip
    added = next(one for one in data["changes"] if one["kind"] == "added")
    assert added == {
        "kind": "added",
        "by": ["mine"],
        "what": [],
        "before": None,
        "after": {
            "graph": "body",
            "name": "n",
            "text": "%n : f32[2,8] = aten.neg.default(%y) {made_by=mine}",
            "index": 3,
            "output": None,
            "module": "",
            "attributes": {"type": "f32[2,8]", "phase": "forward", "made_by": "mine"},
        },
    }


def test_changes_have_both_sides_and_outputs_their_slot() -> None:
    data = to_json(compare(program(), program(BODY.replace("output 0 %z", "output 0 %y"))))
    (change,) = data["changes"]
    assert change["what"] == ["value: %z -> %y"]
    assert [change[side]["output"] for side in ("before", "after")] == ["output 0", "output 0"]
    assert change["before"]["name"] == "z" and change["after"]["name"] == "y"
