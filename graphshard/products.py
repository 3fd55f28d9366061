"""How a runtime may compute a large float32 matrix product: in parts, each of which takes memory of its own for a
moment. See runtime/products.py."""

from __future__ import annotations

LARGE_PRODUCT = 2**26
"""Multiply-adds from which on it matters which library computes a product."""

BLOCK = 512
"""The inner length of a part."""

_PART_ELEMENTS, _PART_ROWS = 2**20, 256


def part_rows(columns: int) -> int:
    """The rows of a part: 4 MB of them, which stay in a processor's cache, and as many as are worth a call."""
    return max(_PART_ROWS, _PART_ELEMENTS // columns)
