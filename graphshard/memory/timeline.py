"""What a rank holds over a step, for reports and pictures: bytes by category at the instructions where they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graphshard.execution import CATEGORIES, ExecutionPlan, Instruction
from graphshard.memory.simulate import simulated

MOST_POINTS = 512
"""A longer timeline is thinned: of neighbouring instructions the fullest stands for all."""

Row = dict[str, int]
"""Bytes by category while an instruction runs, when the rank holds most."""


@dataclass(frozen=True)
class Timeline:
    """Row i holds from instruction ``positions[i]`` up to the next one; ``length`` instructions in all. ``most``: the
    most of each category, whenever that is, those of rows that were left out included."""

    length: int
    positions: tuple[int, ...]
    actions: tuple[str, ...]  # the schedule's, of each position
    rows: tuple[Row, ...]
    most: Row

    @property
    def peak_bytes(self) -> int:
        """The most that is held."""
        return max((sum(row.values()) for row in self.rows), default=0)

    @property
    def categories(self) -> list[str]:
        """Those that take any memory, in the order of execution.CATEGORIES."""
        found = set(self.most)
        return [name for name in CATEGORIES if name in found] + sorted(found - set(CATEGORIES))

    def to_json(self) -> dict[str, Any]:
        """A column per category, ``{"positions": […], "actions": […], "bytes": {category: […]}}``, and its largest."""
        columns = {name: [row.get(name, 0) for row in self.rows] for name in self.categories}
        return {
            "instructions": self.length,
            "positions": list(self.positions),
            "actions": list(self.actions),
            "bytes": columns,
            "most": {name: self.most[name] for name in self.categories},
        }


def simulated_timeline(plan: ExecutionPlan, stage: int, first: bool = False) -> Timeline:
    """Of a rank of ``stage``, by the plan."""
    return timeline(plan.stages[stage].step(first), simulated(plan, stage, first))


def timeline(instructions: Sequence[Instruction], rows: Iterable[Row], points: int = MOST_POINTS) -> Timeline:
    """``rows`` of all ``instructions``, with only those kept where something changes, and ``points`` at most."""
    kept: list[tuple[int, Row]] = []
    most: Row = {}
    for position, row in enumerate(rows):
        row = {name: size for name, size in row.items() if size}
        most |= {name: size for name, size in row.items() if size > most.get(name, 0)}
        if not kept or row != kept[-1][1]:
            kept.append((position, row))
    if len(kept) > points:
        # Neighbours in one of equal groups; the last group may be shorter.
        size = -(-len(kept) // points)
        groups = [kept[begin : begin + size] for begin in range(0, len(kept), size)]
        kept = [max(group, key=lambda item: sum(item[1].values())) for group in groups]
    return Timeline(
        len(instructions),
        tuple(position for position, _ in kept),
        tuple(instructions[position].action for position, _ in kept),
        tuple(row for _, row in kept),
        most,
    )
