"""What one part of the speed benchmark has measured so far: rows of contenders' times, kept in a file as they come, so
that a part that dies leaves what it had."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from graphshard.files import write_atomic

OURS, ALONE, GRAPHS = "graphshard", "graphshard, one region", "graphshard, cudagraphs"
EAGER, INDUCTOR, LIGER, FUSED, COPY = "eager", "torch.compile", "Liger", "AdamW(fused=True)", "copy"

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Where a part runs. ``scale``: "full"; "quick": a minute on a GPU; "tiny": under Triton's interpreter."""

    device: torch.device
    scale: str


@dataclass
class Row:
    """One thing that several contenders do. ``failed``: what those said that did not."""

    title: str
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def ratio(self, contender: str, base: str = OURS) -> float | None:
        """How many times as long as ``base`` it takes: above 1, ``base`` is faster. None: one of them has no time."""
        if contender not in self.seconds or base not in self.seconds:
            return None
        return self.seconds[contender] / self.seconds[base]


class Record:
    """The rows of a part. ``seconds``: what it may take; a row is not begun after that."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self._path, self._end = path, time.monotonic() + seconds
        self.save()

    def has_time(self, title: str) -> bool:
        """Whether to begin ``title``; if not, that is noted."""
        if time.monotonic() < self._end:
            return True
        self.skipped.append(title)
        self.save()
        return False

    def row(self, title: str) -> Row:
        """A new row."""
        self.rows.append(Row(title))
        return self.rows[-1]

    def attempt(self, row: Row, contender: str, work: Callable[[], T]) -> T | None:
        """What ``work``, a contender's, gives. What it raises is that contender's failure: None."""
        result = None
        try:
            result = work()
        except Exception as error:
            row.failed[contender] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.save()
        return result

    def save(self) -> None:
        """Write all so far."""
        found = {"rows": [dataclasses.asdict(row) for row in self.rows], "skipped": self.skipped}
        write_atomic(self._path, json.dumps(found, indent=2) + "\n")


def forget(device: torch.device) -> None:
    """Give back what an earlier row left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
