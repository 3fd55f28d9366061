"""What recomputation costs and saves: the benchmark's GPT on one rank, with nothing, half or whole blocks recomputed.

``auto`` is given the budget at which half of what is kept between forward and backward fits. All three take turns in
one process, so that the machine's moods touch all of them; time is that of the processor, on a GPU that on the wall.

    python examples/bench/recompute.py --layers 16 --steps 6
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphshard
from device import moved, seconds_so_far
from model import Sizes, batch_of, loss_fn, make_part

LIMITS = {"none": 1.0, "auto": 1.12, "full": 1.33}
"""Time that a step may take, as a multiple of one that recomputes nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a step takes longer than it may, or a peak is not as predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    torch.set_num_threads(1)
    sizes = Sizes(layers=options.layers)
    plan = f"dp1+accum{sizes.microbatches(1)}"
    none = compiled(sizes, plan, device)
    (rank,) = none.report()["ranks"]
    budget = rank["peak_bytes"] - rank["memory"]["saved activations"] / 2
    runs = {
        "none": none,
        "auto": compiled(sizes, f"{plan}+recompute:policy=auto,budget_gb={budget / 1e9:.6f}", device),
        "full": compiled(sizes, f"{plan}+recompute:policy=full", device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(options.steps + 2):
        for name, run in runs.items():
            batch = moved(batch_of(sizes, step), device)
            begin = seconds_so_far(device)
            run.step(*batch)
            seconds[name].append(seconds_so_far(device) - begin)
    rows = {name: summary(sizes, run, device, seconds[name][2:], seconds["none"][2:]) for name, run in runs.items()}
    show(rows, sizes, device)
    return int(any(row["ratio"] > LIMITS[name] or row["off"] > 0.05 for name, row in rows.items()))


def compiled(sizes: Sizes, plan: str, device: torch.device, **options: Any) -> graphshard.Compiled:
    """The model of ``sizes`` with AdamW, all of the plan's ranks in this process."""
    return graphshard.compile(
        make_part(sizes).to(device),
        plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        example_inputs=batch_of(sizes, 0),
        executor="local",
        **options,
    )


def summary(
    sizes: Sizes, run: graphshard.Compiled, device: torch.device, seconds: list[float], alone: list[float]
) -> dict[str, float]:
    """Time, what the plan says that it holds, and the peak measured in two steps of a run of its own."""
    (rank,) = run.report()["ranks"]
    watched = compiled(sizes, str(run.plan), device, measure_memory=True)
    for step in range(2):
        watched.step(*moved(batch_of(sizes, step), device))
    measured = watched.report()["ranks"][0]["measured_peak_bytes"]
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(seconds, alone, strict=True)),
        "saved": rank["memory"].get("saved activations", 0),
        "peak": rank["peak_bytes"],
        "measured": measured,
        "off": abs(rank["peak_bytes"] / measured - 1),
    }


def show(rows: dict[str, dict[str, float]], sizes: Sizes, device: torch.device) -> None:
    """The table."""
    table = Table(title=f"recomputation, {sizes.layers} layers of width {sizes.width}, one rank, {device}")
    for column in ("recomputed", "s a step", "x none", "at most", "kept MB at the peak", "peak MB", "measured MB"):
        table.add_column(column, justify="left" if column == "recomputed" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.3f}",
            f"{LIMITS[name]:.2f}",
            *(f"{row[key] / 1e6:.1f}" for key in ("saved", "peak", "measured")),
        )
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
