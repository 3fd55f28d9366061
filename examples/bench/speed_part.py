"""One part of the speed benchmark, in a process of its own: a kernel that breaks the device breaks no other part."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from kernel_rows import CASES, kernel_rows
from llama_rows import llama_rows
from speed_rows import GRAPHS, OURS, Record, Setting
from update_rows import update_rows

Part = Callable[[Setting, Record], None]

PARTS: Mapping[str, Part] = {
    "update": update_rows,
    "llama": partial(llama_rows, {OURS: "dp1", GRAPHS: "dp1+cudagraphs"}, False),
    "recompute": partial(llama_rows, {OURS: "dp1+recompute:policy=full"}, True),
    "offload": partial(llama_rows, {OURS: "dp1+offload:optimizer=cpu"}, False),
    **{name.replace(" ", "-").lower(): partial(kernel_rows, name) for name in CASES},
}
"""By the name that ``--only`` takes, in the order in which they run."""


def main() -> None:
    """Run one part; what it measures is in ``--output`` as it goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    record = Record(options.output, options.seconds)
    PARTS[options.part](Setting(torch.device(options.device), options.scale), record)


if __name__ == "__main__":
    main()
