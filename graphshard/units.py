"""Numbers as a person reads them."""

from __future__ import annotations


def human(count: float, unit: str = "B") -> str:
    """``count`` of ``unit`` with a decimal prefix: ``12.3 MB``, ``4.5 GFLOP``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 1000 or prefix == "T":
            return f"{count:{'.1f' if prefix else '.0f' if abs(count) >= 1 else '.2g'}} {prefix}{unit}"
        count /= 1000
    raise AssertionError


def counted(count: int, one: str, several: str) -> str:
    """``1 micro-batch``, ``2 micro-batches``."""
    return f"{count} {one if count == 1 else several}"
