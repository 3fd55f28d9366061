"""Marks of tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from packaging.version import Version


def full(*values: Any) -> Any:
    """Values of a parametrized test that run with ``-m full`` alone: others are like them, and take less time."""
    return pytest.param(*values, marks=pytest.mark.full)


def few(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """``values``, of which but those that are ``chosen`` run always."""
    return [value if value in chosen else full(value) for value in values]


def has_triton(version: str) -> bool:
    """Whether Triton is as new as that."""
    return Version(pytest.importorskip("triton").__version__) >= Version(version)
