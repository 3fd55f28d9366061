"""What one rank sees of the values of a step that runs with ``debug_nan``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphshard.execution import Instruction, Watched


@dataclass(frozen=True)
class Seen:
    """A value: the least and the greatest of its finite elements (None: there is none), and how many are not finite."""

    numel: int
    low: float | None
    high: float | None
    nan: int = 0
    infinite: int = 0

    @property
    def bad(self) -> bool:
        return bool(self.nan or self.infinite)

    def __str__(self) -> str:
        """``of 8 elements 3 NaN, the rest from -1 to 2``; of a finite value ``from -1 to 2``."""
        counts = [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.infinite, "infinite")) if n]
        span = "" if self.low is None else f"from {self.low:g} to {self.high:g}"
        if not counts:
            return span or "empty"
        told = f"of {self.numel} elements {' and '.join(counts)}" if self.numel > 1 else counts[0].removeprefix("1 ")
        return told + (f", the rest {span}" if span else "")


@dataclass(frozen=True)
class Bad:
    """A value with elements that are not finite, and what was seen of the values that it is computed from."""

    name: str
    microbatch: int
    seen: Seen
    reads: dict[str, Seen]


def look(value: Tensor) -> Seen:
    """The account of a floating-point or complex tensor."""
    value = torch.view_as_real(value) if value.is_complex() else value
    if not value.numel():
        return Seen(0, None, None)
    # A NaN anywhere makes both NaN.
    low, high = (float(bound) + 0.0 for bound in torch.aminmax(value))  # not -0
    if math.isfinite(low) and math.isfinite(high):
        return Seen(value.numel(), low, high)
    rest = value[torch.isfinite(value)]
    nan = int(value.isnan().sum())
    ends = [float(bound) for bound in torch.aminmax(rest)] if rest.numel() else [None, None]
    return Seen(value.numel(), ends[0], ends[1], nan, value.numel() - rest.numel() - nan)


class Watch:
    """The function ``watch`` of a rank's segments. ``watched``: what they show to it."""

    def __init__(self, watched: Mapping[str, Watched]) -> None:
        self._watched = watched
        self._seen: dict[tuple[str, int], Seen] = {}
        self._microbatch = 0

    def begin(self, instruction: Instruction) -> None:
        """What comes is of this instruction's micro-batch."""
        _, dot, microbatch = instruction.action.partition(".")
        self._microbatch = int(microbatch) if dot else 0

    def __call__(self, name: str, value: Tensor) -> None:
        key = (name, self._microbatch)
        if key not in self._seen:  # an input that an earlier segment has shown is the same
            self._seen[key] = look(value)

    def take(self) -> list[Bad]:
        """What was bad in this step, in the order it was seen; the next step begins with nothing."""
        found = []
        for (name, microbatch), seen in self._seen.items():
            if seen.bad:
                sources = {source: self._seen.get((source, microbatch)) for _, source in self._watched[name].reads}
                reads = {source: what for source, what in sources.items() if what is not None}
                found.append(Bad(name, microbatch, seen, reads))
        self._seen.clear()
        return found
