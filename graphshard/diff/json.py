"""A diff as data that json can write. The schema is stable: keys may be added, and ``version`` counts other changes.

::

    {"version": 1,
     "costs": [{"quantity": "sent_bytes" | "flops" | "stored_bytes" | "peak_bytes",
                "of": mesh axis | phase | "stage <k>", "before": int | null, "after": int | null}],
     "steps": [{"pass": name, "costs": [as above, from the pass before]}],      # where several passes lie between
     "header": ["- <line>" | "+ <line>"],
     "counts": {kind: int},                                                    # kinds of difference.Kind, "same" too
     "changes": [{"kind": kind, "by": [pass], "what": [line],
                  "before": node | null, "after": node | null}]}               # "same" ones left out

    node: {"graph", "name", "text", "index", "output": slot | null, "module", "attributes": {name: str}}
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphshard.diff.cost_change import CostChange, cost_changes
from graphshard.diff.difference import Diff, Entry, Kind

VERSION = 1


def to_json(diff: Diff) -> dict[str, Any]:
    """``diff`` in the schema above."""
    counts = Counter(entry.kind for entry in diff.entries)
    before = [diff.before, *(costs for _, costs in diff.steps)]
    return {
        "version": VERSION,
        "costs": [_cost(change) for change in cost_changes(diff.before, diff.after)],
        "steps": [
            {"pass": name, "costs": [_cost(change) for change in cost_changes(last, costs)]}
            for last, (name, costs) in zip(before, diff.steps, strict=False)
        ],
        "header": list(diff.header),
        "counts": {str(kind): counts[kind] for kind in Kind},
        "changes": [
            {
                "kind": str(entry.kind),
                "by": list(entry.by),
                "what": list(entry.what),
                "before": _node(entry.before),
                "after": _node(entry.after),
            }
            for entry in diff.entries
            if entry.kind is not Kind.SAME
        ],
    }


def _cost(change: CostChange) -> dict[str, Any]:
    return {"quantity": change.quantity, "of": change.of, "before": change.before, "after": change.after}


def _node(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        "graph": entry.section,
        "name": entry.name,
        "text": entry.text,
        "index": entry.index,
        "output": entry.slot or None,
        "module": entry.module,
        "attributes": dict(entry.attributes),
    }
