"""Collects pass tests written as graph text: tests/cases/<pass>/<what>.graph. How they are written: case_runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from case_runner import CaseFile

CASES = Path(__file__).parent / "cases"


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix == ".graph" and file_path.is_relative_to(CASES):
        return CaseFile.from_parent(parent, path=file_path)
    return None
