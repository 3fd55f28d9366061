"""One interpreter process for all kernels that a test process runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interpreted import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Runs kernels under Triton's interpreter."""
    process = Interpreter()
    yield process
    process.close()
