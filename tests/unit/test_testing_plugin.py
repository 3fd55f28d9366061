"""The kit's plugin in a project of somebody else's."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROJECT = {
    "cases/good.graph": "# RUN: theirs:Doubled:times=2\n# CHECK: aten.mul.Tensor(%x, 4){{.*}}made_by=doubled",
    "cases/bad.graph": "# RUN:\n# CHECK: graph body\n# CHECK-NEXT: nothing of the kind",
    "cases/broken.graph": "# RUN:\n# CHEK: is no directive\n# CHECK-NXT: is none either",
    "elsewhere/other.graph": "# RUN:\n# CHECK: nothing of the kind",
}
GRAPH = "graphshard 1\ngraph body {\n  %x : f32[2] = batch 0\n  %y = aten.mul.Tensor(%x, 1)\n  return output 0 %y\n}\n"
PASS = """
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Doubled:
    times: int = 1
    name: ClassVar[str] = "doubled"
    exact: ClassVar[bool] = False

    def run(self, program, ctx):
        for node in program.body.nodes():
            node.args = (node.args[0], 2 ** self.times)
            from graphshard.program import set_info
            set_info(node, made_by=self.name)
        return program
"""
TEST = """
from graphshard import text
from graphshard.testing import nodes

def test_fixture_and_counts(run_on_ranks):
    program = text.read("cases/good.graph")
    assert run_on_ranks(program)[0]
    assert nodes(program).op("mul").count == 3
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest('pytest_plugins = ["graphshard.testing.plugin"]')
    pytester.makeini("[pytest]\ngraphshard_cases = cases\npythonpath = .\naddopts = -p no:cacheprovider\n")
    pytester.makepyfile(theirs=PASS)
    for name, directives in PROJECT.items():
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{directives}\n{GRAPH}")
    return pytester


def test_cases_of_the_folders_named_are_collected(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--continue-on-collection-errors")
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "*bad.graph: line 3: CHECK-NEXT: nothing of the kind",
            "> graph body {",
            "*broken.graph: line 2: CHEK is no directive; did you mean CHECK?",
        ]
    )
    result.stdout.no_fnmatch_line("*other.graph*")


def test_fixture_and_message_of_a_count(project: pytest.Pytester) -> None:
    project.makepyfile(test_theirs=TEST)
    result = project.runpytest_inprocess("test_theirs.py")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*nodes(program).op('mul').count == 3", "E*found 1", "E*> %y : f32?2? = aten.mul.*"])


def test_what_check_lines_do_not_notice_is_reported(project: pytest.Pytester) -> None:
    weak = project.path / "cases" / "weak.graph"
    weak.write_text(f"# RUN: theirs:Doubled:times=2\n# CHECK: aten.mul.Tensor\n{GRAPH}")
    result = project.runpytest_inprocess("--graphshard-mutate", "cases/good.graph", "cases/weak.graph")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert project.runpytest_inprocess("--graphshard-mutate", "cases/good.graph").ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "*mutants that no CHECK line notices*",
            "cases/good.graph:1: theirs:Doubled:times=2: 1 of 1 mutants noticed",
            "cases/weak.graph:1: theirs:Doubled:times=2: 0 of 1 mutants noticed",
            "  not noticed: scale: %y scales by 8 instead of 4 (graph body)",
            "scale: 1 of 2 noticed",
        ]
    )


def test_graphshard_itself_needs_no_test_packages() -> None:
    packages = {"pytest", "hypothesis", "graphshard.testing"}
    code = f"import graphshard, graphshard.cli, sys; print({packages} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
