"""The pytest plugin: collects ``.graph`` files as tests.

In the top ``conftest.py``, and in pytest's configuration the folders whose ``.graph`` files are tests::

    pytest_plugins = ["graphshard.testing.plugin"]

    [tool.pytest.ini_options]
    graphshard_cases = ["tests/cases"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from graphshard.errors import BadCase
from graphshard.testing import meaning
from graphshard.testing.case_mutation import as_data, case_outcome, report
from graphshard.testing.cases import Case, CaseFailed, cases, check, check_meaning, output
from graphshard.testing.matchers import Count

_FOLDERS = "graphshard_cases"
_MUTANTS = "graphshard mutants"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(_FOLDERS, "folders whose .graph files are tests, with RUN and CHECK lines", type="paths", default=[])
    parser.addoption(
        "--graphshard-mutate",
        action="store_true",
        help="break what the last pass of each .graph test made, in every way; what no CHECK line notices is a failure",
    )


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """A failed assertion on how many nodes there are shows the lines of the graph."""
    for count in (left, right):
        if isinstance(count, Count):
            sides = (f"{count.selection!r}.count" if side is count else repr(side) for side in (left, right))
            return [f" {op} ".join(sides), f"found {int(count)}", *count.selection.lines()]
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Mutants that survive are a failure, as a test that cannot fail is one."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    survived = reporter is not None and any(data["survivors"] for _, data in _outcomes(reporter))
    if survived and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if found := _outcomes(terminalreporter):
        terminalreporter.section("mutants that no CHECK line notices")
        for line in report(found):
            terminalreporter.line(line)


def _outcomes(reporter: pytest.TerminalReporter) -> list[tuple[str, dict[str, Any]]]:
    passed = reporter.getreports("passed")
    return [(_place(item), data) for item in passed for name, data in item.user_properties if name == _MUTANTS]


def _place(item: pytest.TestReport) -> str:
    path, line, name = item.location
    return f"{path}:{(line or 0) + 1}: {name}"


@pytest.fixture
def run_on_ranks() -> Callable[..., list[dict[str, Tensor]]]:
    """:func:`graphshard.testing.run_on_ranks`: runs a program on all its ranks in this process."""
    return meaning.run_on_ranks


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    folders: list[Path] = parent.config.getini(_FOLDERS)
    if file_path.suffix == ".graph" and any(file_path.is_relative_to(folder) for folder in folders):
        return CaseFile.from_parent(parent, path=file_path)
    return None


class CaseFile(pytest.File):
    """One ``.graph`` file."""

    def collect(self) -> Iterator[pytest.Item]:
        try:
            found = cases(self.path.read_text())
        except BadCase as error:
            raise self.CollectError(f"{self.path}: {error}") from None
        for case in found:
            yield CaseItem.from_parent(self, name=case.command or "print", case=case)


class CaseItem(pytest.Item):
    """One RUN line."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case

    def runtest(self) -> None:
        printed = output(self.path, self.case)
        check(printed, self.case.checks)
        check_meaning(self.path, self.case, printed)
        if self.config.getoption("graphshard_mutate") and not self.case.refused:
            self.user_properties.append((_MUTANTS, as_data(case_outcome(self.path, self.case, printed))))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CaseFailed):
            return f"{self.path}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.case.line - 1, self.name
