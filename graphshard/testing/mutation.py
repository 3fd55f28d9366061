"""Mutation: break what a pass makes, and see whether the tests of the pass notice (DeMillo, Lipton and Sayward 1978,
"Hints on Test Data Selection").

Only what the pass made or changed is broken, in every way of breaks.py, one at a time. A mutant that breaks a rule of
its level is no mutant. Nor is one that computes the same as before, unless its kind is one that costs memory or time
and never changes results. One that breaks a postcondition, such as a gradient that is not reduced, is noticed by the
driver: no test need say it again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from graphshard import fake
from graphshard.check import check
from graphshard.errors import IllegalProgram, NothingToMutate, UnknownBreak
from graphshard.pipeline import Context, Pass
from graphshard.postconditions import require
from graphshard.program import Program, Section
from graphshard.rewrite import copied
from graphshard.testing.breaks import BREAKS, Break
from graphshard.testing.meaning import apply
from graphshard.text import node_text
from graphshard.text.spelling import spell_slot
from graphshard.verify import check_rules


@dataclass(frozen=True)
class Mutant:
    """A program with one mistake in it. ``description`` says which and where."""

    kind: Break
    description: str
    program: Program

    def __str__(self) -> str:
        return f"{self.kind.name}: {self.description}"


@dataclass(frozen=True)
class Outcome:
    """What tests made of the mutants of one program."""

    noticed: tuple[Mutant, ...]
    survived: tuple[Mutant, ...]

    @property
    def total(self) -> int:
        return len(self.noticed) + len(self.survived)


class MutantsSurvived(AssertionError):
    """Tests that do not notice what is broken; lists what."""

    def __init__(self, outcome: Outcome) -> None:
        listed = "".join(f"\n  {mutant}" for mutant in outcome.survived)
        super().__init__(f"{len(outcome.survived)} of {outcome.total} mutants went unnoticed:{listed}")


def mutants(program: Program, before: Program | None = None, kinds: Collection[str] = ()) -> Iterator[Mutant]:
    """Copies of ``program``, each with one mistake, legal by :func:`graphshard.verify.check_rules`.

    Args:
        before: what a pass made ``program`` of: only what differs is broken; None: everything.
        kinds: names of BREAKS; empty: all.

    Raises:
        UnknownBreak: a name that is none of BREAKS.
    """
    known = {item.name: item for item in BREAKS}
    for name in kinds:
        if name not in known:
            raise UnknownBreak(name, known)
    sites = _sites(program, before)
    fresh = copied(program)
    for item in (known[name] for name in kinds) if kinds else BREAKS:
        for graph, index in sites:
            section = fresh.sections()[graph]
            try:
                with fake.quiet():
                    said = item.apply(fresh, section, list(section.graph.nodes)[index])
            except (RuntimeError, ValueError, TypeError):  # what operators raise for arguments that do not fit
                fresh = copied(program)
                continue
            if said is None:
                continue
            broken, fresh = fresh, copied(program)
            if _is_legal(broken):
                yield Mutant(item, f"{said} (graph {graph})", broken)


def outcome(
    before: Program | None, program: Program, test: Callable[[Program], object], kinds: Collection[str] = ()
) -> Outcome:
    """For which mutants of ``program`` the driver or the ``test`` raises. Those that mean the same as it count for
    nothing."""
    noticed, survived = [], []
    for mutant in mutants(program, before, kinds):
        if _raises(require, mutant.program) or _raises(test, mutant.program):
            noticed.append(mutant)
        elif mutant.kind.same_meaning or not _means_the_same(program, mutant.program):
            survived.append(mutant)
    return Outcome(tuple(noticed), tuple(survived))


def check_mutations(
    passes: str | Sequence[Pass],
    program: Program,
    test: Callable[[Program], object],
    *,
    ctx: Context | None = None,
    kinds: Collection[str] = (),
) -> Outcome:
    """Run ``passes`` on a copy of ``program``, break the result in every way, and run ``test`` on each mutant.

    Args:
        test: the assertions on the passes' result; it must pass on the result itself, and raise for what is wrong.
        kinds: names of :data:`BREAKS`; empty: all.

    Raises:
        MutantsSurvived: ``test`` did not raise for some; each is listed.
        NothingToMutate: the passes made nothing that could be broken.
    """
    result = apply(passes, program, ctx)
    test(copied(result))
    found = outcome(program, result, test, kinds)
    if not found.total:
        raise NothingToMutate([item.name for item in BREAKS])
    if found.survived:
        raise MutantsSurvived(found)
    return found


def _raises(test: Callable[[Program], object], mutant: Program) -> bool:
    try:
        test(mutant)
    except Exception:  # a test notices by whatever it raises
        return True
    return False


def _is_legal(program: Program) -> bool:
    try:
        check_rules(program)
    except IllegalProgram:
        return False
    return True


def _means_the_same(program: Program, mutant: Program) -> bool:
    return not _raises(lambda other: check(program, other), mutant)


def _sites(program: Program, before: Program | None) -> list[tuple[str, int]]:
    """Graph and position of the nodes that ``before`` does not have, or has elsewhere, and of what they return."""
    sections = {} if before is None else before.sections()
    result = []
    for name, section in program.sections().items():
        old = [_line(node, name, sections[name]) for node in sections[name].graph.nodes] if name in sections else []
        listed = list(section.graph.nodes)
        new = [_line(node, name, section) for node in listed]
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        found = {i for tag, _, _, begin, end in matcher.get_opcodes() if tag != "equal" for i in range(begin, end)}
        if len(listed) - 1 in found:
            found |= {listed.index(value) for value in section.outputs.values()}
        result += [(name, index) for index in sorted(found)]
    return result


def _line(node: fx.Node, name: str, section: Section) -> str:
    if node.op == "output":
        return ", ".join(f"{spell_slot(slot)} %{value.name}" for slot, value in section.outputs.items())
    return node_text(node, name, section)
