"""What of a trace's copies is hidden behind kernels."""

from __future__ import annotations

from typing import Any

import pytest

from timeline import hidden, overlap, union


def event(cat: str, name: str, ts: float, dur: float, nbytes: int = 0) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"bytes": nbytes}}


def test_copies_are_hidden_while_kernels_run() -> None:
    big = 2 << 20
    found = hidden(
        [
            event("kernel", "gemm", 0, 10),
            event("kernel", "gelu", 8, 4),
            event("kernel", "gemm", 20, 10),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 5, 10, big),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 25, 10, big),
            event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 0, 1, 8),
            event("cuda_runtime", "cudaMemcpyAsync", 0, 50),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found["out"].copy_s == pytest.approx(10e-6) and found["out"].fraction == pytest.approx(0.7)
    assert found["in"].hidden_s == pytest.approx(5e-6) and found["in"].bytes_per_second == pytest.approx(big / 10e-6)
    assert hidden([])["out"].fraction == 1.0


def test_spans() -> None:
    assert union([(3, 4), (0, 1), (1, 2), (0, 3)]) == [(0, 4)]
    assert overlap([(0, 2), (3, 5)], [(1, 4), (4.5, 9)]) == [(1, 2), (3, 4), (4.5, 5)]
