"""Which mutants of what a ``.graph`` test prints its CHECK lines notice: ``pytest --graphshard-mutate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphshard import text
from graphshard.program import Program
from graphshard.testing.cases import Case, check, output, same_meaning
from graphshard.testing.mutation import Outcome, outcome


def case_outcome(path: Path, case: Case, printed: str) -> Outcome:
    """Break what the last pass of ``case`` made of the file at ``path``, in every way; ``printed`` is the result."""
    given = text.read(path)
    constants = text.stored_constants(given)
    earlier = case.passes.rpartition(";")[0]
    command = earlier + case.command.removeprefix(case.passes)
    before = text.parse(output(path, replace(case, command=command)), constants)
    program = text.parse(printed, constants)

    def test(mutant: Program) -> None:
        check(text.to_text(mutant), case.checks)
        if case.meaning is not None:
            same_meaning(case, given, mutant)

    return outcome(before, program, test)


def as_data(found: Outcome) -> dict[str, Any]:
    """What the report says, as values that a worker process can hand over: counts by kind, and survivors."""
    return {
        "noticed": dict(Counter(mutant.kind.name for mutant in found.noticed)),
        "survived": dict(Counter(mutant.kind.name for mutant in found.survived)),
        "survivors": [str(mutant) for mutant in found.survived],
    }


def report(found: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Lines for the terminal, from tests and their data: what survived in each, then how many of each kind did not."""
    found = list(found)
    lines: list[str] = []
    for name, data in found:
        noticed, total = _sums([data])
        if total:
            lines.append(f"{name}: {noticed.total()} of {total.total()} mutants noticed")
            lines += [f"  not noticed: {survivor}" for survivor in data["survivors"]]
    noticed, total = _sums(data for _, data in found)
    return [*lines, *(f"{kind}: {noticed[kind]} of {total[kind]} noticed" for kind in sorted(total))]


def _sums(found: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    noticed, total = Counter[str](), Counter[str]()
    for data in found:
        noticed.update(data["noticed"])
        total.update(data["noticed"])
        total.update(data["survived"])
    return noticed, total
