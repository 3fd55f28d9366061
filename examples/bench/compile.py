"""What starting costs: from a model to the end of its first step, graphshard beside torch.compile, cold and cached.

Every start is a process of its own, one thread; caches are folders of this run. "Start" is the processor time, of the
process and the compilers it calls, from the model to the end of the first training step; "compile" is that less a
second step; importing torch and graphshard is before both. torch.compile compiles the model with its loss, and a step
runs that, its backward and torch's fused AdamW. Inductor is kept from starting workers, whose time nobody could count.

    python examples/bench/compile.py --rounds 3
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import graphshard
from model import Sizes, batch_of, loss_fn, make_part
from peers import LEARNING_RATE, adamw

PEER, ONE, FOUR = "torch.compile", "accum4", "zero3+pp2"
RANKS = {ONE: 1, FOUR: 4}
"""graphshard's plans, each with its ranks, all of them in the one process (the local executor)."""
CACHE_SHARE = 1 / 3


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a first start takes more than torch.compile's, or a second more than its share of that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="starts of each kind; medians are shown")
    parser.add_argument("--layers", type=int, default=Sizes.layers)
    parser.add_argument("--start", metavar="WHAT", help=argparse.SUPPRESS)  # this process is one start of WHAT
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sizes = Sizes(layers=options.layers)
    if options.start:
        torch.set_num_threads(1)
        print(json.dumps(started(options.start, sizes, options.cache)))
        return 0
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in track(range(options.rounds), "rounds", transient=True, disable=options.rounds == 1):
        with tempfile.TemporaryDirectory() as folder:
            for what in (PEER, *RANKS):
                for turn in ("cold", "cached"):
                    measured.setdefault((what, turn), []).append(launched(what, options.layers, Path(folder) / "cache"))
    rows = summarised(measured)
    console = Console() if sys.stdout.isatty() else Console(width=130)  # in a file the table keeps its columns
    console.print(table(rows, sizes))
    return int(any(row["ratio"] > row["reach"] for row in rows if row["reach"]))


def started(what: str, sizes: Sizes, cache: Path) -> dict[str, float]:
    """One start in this process: seconds of "start" and "compile", processor and wall, and the first loss."""
    wall, cpu = time.perf_counter(), processor_s()
    step = by_torch(sizes) if what == PEER else by_graphshard(what, sizes, cache)
    loss = step()
    start = {"start_wall_s": time.perf_counter() - wall, "start_s": processor_s() - cpu}
    cpu = processor_s()
    step()
    return {**start, "compile_s": start["start_s"] - (processor_s() - cpu), "loss": loss}


def by_torch(sizes: Sizes) -> Callable[[], float]:
    """A training step of the model, compiled with its loss."""
    model = make_part(sizes)
    optimizer = adamw(model.parameters())
    compiled = torch.compile(lambda x, y: loss_fn(model(x), y))
    count = sizes.microbatches(1)

    def step() -> float:
        x, y = batch_of(sizes, 0)
        total = 0.0
        for xi, yi in zip(x.chunk(count), y.chunk(count), strict=True):
            loss = compiled(xi, yi) / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def by_graphshard(plan: str, sizes: Sizes, cache: Path) -> Callable[[], float]:
    """The same by ``plan``."""
    batch = batch_of(sizes, 0)
    compiled = graphshard.compile(
        make_part(sizes),
        plan=plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=LEARNING_RATE),
        example_inputs=batch,
        executor="local",
        world_size=RANKS[plan],
        cache=cache,
    )
    return lambda: compiled.step(*batch).item()


def processor_s() -> float:
    """Of this process and those it has waited for."""
    return sum(os.times()[:4])


def launched(what: str, layers: int, cache: Path) -> dict[str, float]:
    """What a new process measures."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}-inductor", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, __file__, f"--start={what}", f"--layers={layers}", f"--cache={cache}"]
    ran = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return measured


def summarised(measured: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row for each kind of start: medians, the share of torch.compile's cold compile time, and what to reach."""
    rows: list[dict[str, Any]] = []
    for (what, turn), starts in measured.items():
        row: dict[str, Any] = {key: statistics.median(start[key] for start in starts) for key in starts[0]}
        reach = None if what != ONE else 1.0 if turn == "cold" else CACHE_SHARE
        rows.append({"what": what, "turn": turn, "reach": reach, **row})
    for row in rows:
        row["ratio"] = row["compile_s"] / rows[0]["compile_s"]
        own = next(other for other in rows if other["what"] == row["what"])
        row["own_ratio"] = row["compile_s"] / own["compile_s"]
    return rows


def table(rows: Sequence[Mapping[str, Any]], sizes: Sizes) -> Table:
    """For people."""
    title = f"starting a GPT of {sizes.layers} layers of width {sizes.width}: processor seconds"
    result = Table(title=title, caption="Of peer, of cold: against torch.compile's and its own cold compile.")
    for column in ("what", "start is"):
        result.add_column(column, no_wrap=True)
    for column in ("start", "wall", "compile", "of peer", "at most", "of cold", "loss"):
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row["what"],
            row["turn"],
            *(f"{row[key]:.2f}" for key in ("start_s", "start_wall_s", "compile_s")),
            f"{row['ratio']:.3f}",
            f"{row['reach']:.2f}" if row["reach"] else "",
            f"{row['own_ratio']:.2f}",
            f"{row['loss']:.4f}",
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
