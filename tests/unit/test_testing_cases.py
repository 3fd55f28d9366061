"""The runner of pass tests: its checks fail when they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphshard.errors import BadCase
from graphshard.testing.cases import CaseFailed, cases, check, check_meaning, output

OUTPUT = "one\ntwo   two\nthree = f(1)\ntwo four\n"


def checks(*lines: str) -> None:
    """Check OUTPUT by ``lines``, each what follows ``# CHECK``."""
    (case,) = cases("# RUN:\n" + "".join(f"# CHECK{line}\n" for line in lines))
    check(OUTPUT, case.checks)


@pytest.mark.parametrize(
    "lines",
    [
        (": one", ": two four"),
        (": two two",),  # blanks count as one
        (": one", "-NEXT: two two", "-NEXT: three"),
        (": {{th.*}} = f({{[0-9]}})",),
        ("-COUNT-3: two", ": four"),
        (": one", "-NOT: four", ": three"),
        (": three", "-NOT: three"),
    ],
)
def test_what_holds_passes(lines: tuple[str, ...]) -> None:
    checks(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        (": five",),
        (": two four", ": one"),  # in order
        (": one", "-NEXT: three"),
        (": {{f\\(2\\)}}",),
        (": f(.)",),  # outside {{ }} nothing is a regular expression
        ("-COUNT-4: two",),
        (": one", "-NOT: three", ": four"),
        ("-NOT: one", ": two"),
        (": one", "-NOT: four"),
    ],
)
def test_what_does_not_hold_fails_with_the_line_of_the_check(lines: tuple[str, ...]) -> None:
    with pytest.raises(CaseFailed, match=r"line [234]: CHECK"):
        checks(*lines)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("graphshard 1\n", "line 1: no line says what to run"),
        ("# RUN: zero\n", "line 1: this RUN has no CHECK"),
        ("# RUN: zero\n# CHECK: a\n# RUN: zero\n", "line 3: this RUN has no CHECK"),
        ("# CHECK: a\n", "line 1: a CHECK before the first RUN"),
        ("# RUN: zero\n# CHECK:\n", "line 2: a CHECK without text"),
        ("# RUN: zero\n# CHECK-NXT: a\n", "line 2: CHECK-NXT does not exist"),
        ("# RUN-ERROR: zero\n# CHECK-MEANING:\n", "line 2: CHECK-MEANING after RUN-ERROR"),
        ("# RUN-FAIL: zero\n# CHECK: a\n", "line 1: RUN-FAIL does not exist"),
        ("# RUN: zero\n# CHECK: a\n# CHEKC: b\n", "line 3: CHEKC is no directive; did you mean CHECK?"),
        ("# RUN: zero\n# check-not: a\n", "line 2: check-not is no directive; did you mean CHECK-NOT?"),
    ],
)
def test_a_case_that_checks_nothing_or_is_misspelt_is_refused(source: str, message: str) -> None:
    with pytest.raises(BadCase, match=message):
        cases(source)


GRAPH = "graphshard 1\ngraph body {\n  %x : f32[2] = batch 0\n  return output 0 %x\n}\n"


@pytest.mark.parametrize(
    ("directives", "message"),
    [
        ("# RUN:\n# CHECK: %x : f32[2] = batch 0", None),
        ("# RUN: --world-size 2\n# CHECK: mesh dp=2", None),
        ("# RUN-ERROR: zerro\n# CHECK: did you mean 'zero'", None),
        ("# RUN: zerro\n# CHECK: x", "the command gave 2: graphshard: unknown pass 'zerro'"),
        ("# RUN-ERROR:\n# CHECK: x", "the input should be refused, but the command gave 0"),
    ],
)
def test_passes_run_as_on_the_command_line(tmp_path: Path, directives: str, message: str | None) -> None:
    path = tmp_path / "a.graph"
    path.write_text(f"{directives}\n{GRAPH}")
    (case,) = cases(path.read_text())
    if message is None:
        check(output(path, case), case.checks)
    else:
        with pytest.raises(CaseFailed, match=message):
            check(output(path, case), case.checks)


NEGATED = """
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Negated:
    twice: bool = False
    name: ClassVar[str] = "negated"
    exact: ClassVar[bool] = False

    def run(self, program, ctx):
        for node in program.body.nodes():
            node.target = torch.ops.aten.neg.default
        return program
"""


@pytest.mark.parametrize(
    ("command", "operator", "message"),
    [
        ("", "aten.abs.default", None),
        ("--world-size 2", "aten.abs.default", None),
        ("negated:Negated", "aten.abs.default", r"line 2: CHECK-MEANING: the programs differ: output 0 .* first at %y"),
        ("negated:Negated", "aten.neg.default", None),
    ],
)
def test_the_meaning_is_compared(
    command: str, operator: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "negated.py").write_text(NEGATED)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.graph"
    graph = GRAPH.replace("  return output 0 %x", f"  %y = {operator}(%x)\n  return output 0 %y")
    path.write_text(f"# RUN: {command}\n# CHECK-MEANING:\n{graph}")
    (case,) = cases(path.read_text())
    printed = output(path, case)
    check(printed, case.checks)
    if message is None:
        check_meaning(path, case, printed)
    else:
        with pytest.raises(CaseFailed, match=message):
            check_meaning(path, case, printed)
