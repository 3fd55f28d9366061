"""What a change costs or saves, one quantity after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphshard.costs import Costs
from graphshard.mesh import AXES
from graphshard.units import human


@dataclass(frozen=True)
class CostChange:
    """One quantity of a step before and after; None where there is no such stage."""

    quantity: str  # "sent_bytes", "flops", "stored_bytes" or "peak_bytes"
    of: str  # mesh axis, phase, or "stage 0"
    before: int | None
    after: int | None

    @property
    def unit(self) -> str:
        return "FLOP" if self.quantity == "flops" else "B"

    @property
    def title(self) -> str:
        """What a person calls it."""
        words = {"sent_bytes": "sent over", "flops": "compute,", "stored_bytes": "stored,", "peak_bytes": "peak,"}
        return f"{words[self.quantity]} {self.of}"

    def spelled(self) -> tuple[str, str, str]:
        """Before, after and the change, to be read."""
        old, new = ("-" if n is None else human(n, self.unit) for n in (self.before, self.after))
        return old, new, self._change()

    def _change(self) -> str:
        if self.before is None or self.after is None:
            return ""
        delta = self.after - self.before
        if not delta:
            return "same"
        sign = "+" if delta > 0 else "-"
        relative = f" ({delta / self.before:+.1%})" if self.before else ""
        return f"{sign}{human(abs(delta), self.unit)}{relative}"


def cost_changes(before: Costs, after: Costs) -> list[CostChange]:
    """Bytes sent by axis and FLOPs by phase, summed over one rank of every stage; stored and peak bytes of each."""
    result = list(_by_name("sent_bytes", before.sent_bytes, after.sent_bytes))
    result += _by_name("flops", before.flops, after.flops)
    for quantity in ("stored_bytes", "peak_bytes"):
        for stage in range(max(len(before.stages), len(after.stages))):
            old, new = (
                getattr(costs.stages[stage], quantity) if stage < len(costs.stages) else None
                for costs in (before, after)
            )
            result.append(CostChange(quantity, f"stage {stage}", old, new))
    return result


def _by_name(quantity: str, before: dict[str, int], after: dict[str, int]) -> Iterable[CostChange]:
    for name in [*before, *(name for name in after if name not in before)]:
        yield CostChange(quantity, name, before.get(name, 0), after.get(name, 0))


def by_pass(before: Costs, steps: Sequence[tuple[str, Costs]]) -> list[tuple[str, list[CostChange]]]:
    """What each pass did to the bytes sent, the FLOPs of all phases and the peak of the fullest stage; the same
    quantities for each, and passes that changed none left out.

    ``steps``: the costs after each pass, in order.
    """
    programs = [before, *(costs for _, costs in steps)]
    axes = [axis for axis in AXES if any(axis in costs.sent_bytes for costs in programs)]
    result = []
    for (name, new), old in zip(steps, programs, strict=False):
        sent = ((axis, old.sent_bytes.get(axis, 0), new.sent_bytes.get(axis, 0)) for axis in axes)
        changes = [CostChange("sent_bytes", *item) for item in sent]
        changes.append(CostChange("flops", "all phases", sum(old.flops.values()), sum(new.flops.values())))
        changes.append(CostChange("peak_bytes", "fullest stage", old.peak_bytes, new.peak_bytes))
        if any(change.before != change.after for change in changes):
            result.append((name, changes))
    return result
