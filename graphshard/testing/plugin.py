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
from graphshard.testing.cases import Case, CaseFailed, cases, check, output
from graphshard.testing.matchers import Count

_FOLDERS = "graphshard_cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(_FOLDERS, "folders whose .graph files are tests, with RUN and CHECK lines", type="paths", default=[])


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """A failed assertion on how many nodes there are shows the lines of the graph."""
    for count in (left, right):
        if isinstance(count, Count):
            sides = (f"{count.selection}.count" if side is count else repr(side) for side in (left, right))
            return [f" {op} ".join(sides), f"found {int(count)}", *count.selection.lines()]
    return None


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
        check(output(self.path, self.case), self.case.checks)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CaseFailed):
            return f"{self.path}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.case.line - 1, f"{self.path.stem}: {self.name}"
