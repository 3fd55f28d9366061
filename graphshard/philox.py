"""Philox-4x32-10: random words by their number, so that any part of a sequence can be drawn, and drawn again.

The generator of Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (2011). Word ``i`` of a seed
is word ``i % 4`` of the block for counter ``i // 4``; kernels draw the same ones (codegen/triton_ops.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_CHUNK = 16384  # counters at a time: what is computed from them stays in a core's cache


def at_least(limit: int, seed: Tensor, first: int, count: int) -> Tensor:
    """Which of the words from number ``first`` on are at least ``limit``: bool [count], on the device of ``seed``, an
    int64 scalar."""
    begin, end = first // 4, -(-(first + count) // 4)
    key = int(seed)
    if not seed.is_cpu:
        found = torch.stack(blocks_on(seed.device, key, begin, end), dim=1) >= limit
    else:
        array = np.empty((end - begin, 4), dtype=np.bool_)
        for at in range(begin, end, _CHUNK):
            blocks = numpy_blocks(key, at, min(at + _CHUNK, end))
            for word, values in enumerate(blocks):
                np.greater_equal(values, limit, out=array[at - begin :][: len(values), word])
        found = torch.from_numpy(array)
    return found.view(-1)[first - 4 * begin :][:count]


def numpy_blocks(seed: int, begin: int, end: int) -> list[Any]:
    """The four words of the blocks for counters ``begin`` to ``end - 1``, each uint64 [end - begin]."""
    counters = np.arange(begin, end, dtype=np.uint64)
    even, odd = [counters & _MASK, np.zeros_like(counters)], [counters >> 32, np.zeros_like(counters)]
    products = [np.empty_like(counters) for _ in even]
    for keys in _keys(seed):
        for word, by, product in zip(even, _MULTIPLIERS, products, strict=True):
            np.multiply(word, by, out=product)
        for product, high, low, key in zip(reversed(products), even, odd, keys, strict=True):
            np.right_shift(product, 32, out=high)
            np.bitwise_xor(high, low, out=high)
            np.bitwise_xor(high, key, out=high)
            np.bitwise_and(product, _MASK, out=low)
    return [even[0], odd[0], even[1], odd[1]]


def blocks_on(device: torch.device, seed: int, begin: int, end: int) -> list[Tensor]:
    """The same by torch on any device: int64, whose products wrap to the bits of unsigned ones."""
    counters = torch.arange(begin, end, device=device)
    even, odd = [counters & _MASK, counters * 0], [counters >> 32, counters * 0]
    for keys in _keys(seed):
        products = [word * by for word, by in zip(even, _MULTIPLIERS, strict=True)][::-1]
        even = [(p >> 32 & _MASK) ^ low ^ key for p, low, key in zip(products, odd, keys, strict=True)]
        odd = [product & _MASK for product in products]
    return [even[0], odd[0], even[1], odd[1]]


def _keys(seed: int) -> Iterator[list[int]]:
    """The two words of each round's key."""
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(_ROUNDS):
        yield key
        key = [(word + step) & _MASK for word, step in zip(key, _KEY_STEPS, strict=True)]
