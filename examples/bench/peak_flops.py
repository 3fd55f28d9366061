"""Model FLOPs utilisation: what part of the products that a GPU could do in a step's time the model itself needs.

Chowdhery et al. 2022 (PaLM), appendix B: a token costs 6 FLOPs for each parameter that multiplies (2 forward, 4
backward), and 12 * layers * width * seq for attention, whose causal half is counted as if it were computed. What is
recomputed is not counted.
"""

from __future__ import annotations

import re

PEAK_BF16 = (
    (("B200",), 2250e12),
    (("GB200",), 2500e12),
    (("GH200",), 989e12),
    (("H200",), 989e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
    (("A10",), 125e12),
    (("4090",), 165e12),
    (("3090",), 71e12),
)
"""Dense bf16 FLOPs a second by the vendors' data sheets, by words of the name that CUDA gives: the first that fit."""


def peak_flops(device_name: str) -> float | None:
    """Of the GPU of that name; None: it is not in the table."""
    words = set(re.split(r"[\s\-]+", device_name))
    return next((peak for wanted, peak in PEAK_BF16 if words.issuperset(wanted)), None)


def model_flops(tokens: int, parameters: int, layers: int, width: int, sequence: int) -> float:
    """Of a training step on ``tokens``; ``parameters``: those that multiply."""
    return float(tokens) * (6 * parameters + 12 * layers * width * sequence)
