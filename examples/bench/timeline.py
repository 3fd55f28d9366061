"""How much of the time that a GPU copies is hidden behind its computing, from a Chrome trace of torch.profiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Span = tuple[float, float]
"""Begin and end, in microseconds."""

_WAYS = {"out": "dtoh", "in": "htod"}


@dataclass(frozen=True)
class Hidden:
    """Of the copies in one direction: their time and how much of that kernels ran, in seconds; and bytes."""

    copy_s: float
    hidden_s: float
    nbytes: int

    @property
    def fraction(self) -> float:
        """Of the copies' time; 1 without copies."""
        return self.hidden_s / self.copy_s if self.copy_s else 1.0

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.copy_s if self.copy_s else 0.0


def hidden(events: Iterable[Mapping[str, Any]], least_bytes: int = 1 << 20) -> dict[str, Hidden]:
    """By direction, "out" and "in". ``events`` are a trace's; copies of fewer bytes are scalars and batches."""
    spans: dict[str, list[Span]] = {"kernel": [], "out": [], "in": []}
    nbytes = {"out": 0, "in": 0}
    for event in events:
        if event.get("ph") != "X":
            continue
        span = event["ts"], event["ts"] + event["dur"]
        if event.get("cat") == "kernel":
            spans["kernel"].append(span)
        elif event.get("cat") == "gpu_memcpy" and (size := event["args"].get("bytes", 0)) >= least_bytes:
            name = event["name"].lower()
            for way in (way for way, word in _WAYS.items() if word in name):
                spans[way].append(span)
                nbytes[way] += size
    computing = union(spans["kernel"])
    result = {}
    for way in _WAYS:
        copying = union(spans[way])
        result[way] = Hidden(_length(copying) / 1e6, _length(overlap(copying, computing)) / 1e6, nbytes[way])
    return result


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that are apart, in order."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    assert all(first[1] < second[0] for first, second in pairwise(result))
    return result


def overlap(left: list[Span], right: list[Span]) -> list[Span]:
    """What two unions have in common."""
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            result.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return result


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)
