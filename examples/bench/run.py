"""Speed, side by side: graphshard against eager, DDP, FSDP2 and torch.distributed.pipelining on local CPU processes.

Every row runs in processes of its own, one thread each. The rows of a group take turns, a step at a time, so that
whatever happens on the machine touches all of them; a ratio of two is the median over turns. In the times of a row a
step is left out if others used the processors meanwhile, or if a small probe beside it found them slower than at their
fastest, as they are when another guest of the host is busy.

    python examples/bench/run.py --only zero3 --steps 12
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from graphshard.files import write_atomic
from model import Part, Sizes
from rows import GROUPS, ROWS, Comparison, rows_of
from tables import comparison_table, row_table
from turns import RowFailed, Run, orders

Runs = dict[str, list[dict[str, Any]]]
"""What the worker measured, by row, in the order of rounds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a row failed."""
    options = _options(argv)
    sizes = Sizes(**options.sizes)
    console = Console() if sys.stdout.isatty() else Console(width=130)  # in a file the tables keep their columns
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Part(sizes).parameters())
    console.print(
        f"{sizes.layers} layers of width {sizes.width}, vocabulary {sizes.vocabulary}, sequence {sizes.sequence}: "
        f"{parameters / 1e6:.1f} M parameters, float32; {sizes.batch} sequences a step, {sizes.microbatch} "
        f"a micro-batch; one thread a process on {os.cpu_count()} cores"
    )
    runs, failures = _run_all(options, console)
    reference = runs["eager"][0]["losses"] if "eager" in runs else []
    limits = Limits(options.foreign, options.slow, fastest_probes(runs))
    rows = [summarize(name, runs[name], reference, sizes, parameters, limits) for name in ROWS if name in runs]
    comparisons = [compare(c, rows) for group in options.only for c in GROUPS[group]]
    console.print(row_table(rows))
    console.print(comparison_table([c for c in comparisons if c is not None]))
    for name, reason in failures.items():
        console.print(f"[red]failed[/] {name}: {escape(reason)}", highlight=False, soft_wrap=True)
    result = {
        "rows": rows,
        "comparisons": [c for c in comparisons if c is not None],
        "failures": failures,
        "sizes": dataclasses.asdict(sizes),
        "parameters": parameters,
        "machine": _machine(),
        "options": {name: getattr(options, name) for name in ("steps", "rounds", "warmup", "foreign", "slow")},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, json.dumps(result, indent=2) + "\n")
    console.print(f"written to {options.output}")
    return 1 if failures else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="groups to run")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="how often each row runs")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    foreign = "leave out steps with more foreign CPU time than this part of all cores'"
    parser.add_argument("--foreign", type=float, default=0.03, help=foreign)
    slow = "leave out steps beside which a probe of the processors' speed took this part longer than the fastest"
    parser.add_argument("--slow", type=float, default=0.25, help=slow)
    parser.add_argument("--sizes", type=json.loads, default={}, help='JSON of other sizes, such as {"layers": 2}')
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a row to start, and for a step")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    return parser.parse_args(argv)


def _run_all(options: argparse.Namespace, console: Console) -> tuple[Runs, dict[str, str]]:
    """Every run of every group; rows that failed, with the reason, are not tried again."""
    runs: Runs = {}
    failures: dict[str, str] = {}
    groups = [rows_of(name) for name in options.only]
    if not any("eager" in group for group in groups):
        groups.insert(0, ["eager"])  # whose losses the others are held against
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, groups)) * options.rounds * (options.steps + 1))

        def advance(name: str) -> None:
            progress.update(task, description=name, advance=1)

        for group in groups * options.rounds:
            for name, measured in _run_group(group, options, failures, progress.console, advance).items():
                runs.setdefault(name, []).append(measured)
                times = " ".join(f"{step['seconds']:.2f}" for step in measured["steps"])
                progress.console.print(f"{name}: {times} s", highlight=False)
    return runs, failures


def _run_group(
    group: Sequence[str],
    options: argparse.Namespace,
    failures: dict[str, str],
    console: Console,
    advance: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """What the rows of a group measured, in turns, but for those that fail, which ``failures`` is told; ``advance`` is
    called with a row's name when it has started, and after each of its steps."""
    measured: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        running: dict[str, Run] = {}
        for name in group:
            if name in failures:
                continue
            try:
                running[name] = stack.enter_context(closing(_started(name, options, console)))
            except RowFailed as error:
                failures[name] = str(error)
            advance(name)
        for names in orders(group, options.steps):
            for name in filter(running.__contains__, names):
                try:
                    running[name].step()
                except RowFailed as error:
                    failures[name] = str(error)
                    running.pop(name).close()
                advance(name)
        for name, run in running.items():
            try:
                measured[name] = run.result()
            except RowFailed as error:
                failures[name] = str(error)
    return measured


def _started(name: str, options: argparse.Namespace, console: Console) -> Run:
    """A run of a row; another one if that fails, as FSDP2 on gloo does now and then, by a signal in native code."""
    try:
        return Run(name, options)
    except RowFailed as error:
        console.print(f"{name}: once more after: {escape(str(error))}", highlight=False)
        return Run(name, options)


@dataclass(frozen=True)
class Limits:
    """Which steps count; ``probes`` is the fastest probe by number of ranks."""

    foreign: float
    slow: float
    probes: Mapping[int, float]

    def quiet(self, step: Mapping[str, float], ranks: int) -> bool:
        """Whether nothing else took the processors, or slowed them down, while ``step`` ran."""
        cores = os.cpu_count() or 1
        alone = step["foreign_cpu_seconds"] <= self.foreign * cores * step["seconds"]
        return alone and step["probe_seconds"] <= (1 + self.slow) * self.probes[ranks]


def fastest_probes(runs: Runs) -> dict[int, float]:
    """The fastest probe of all runs with the same number of ranks."""
    found: dict[int, float] = {}
    for name, measured in runs.items():
        probes = [step["probe_seconds"] for run in measured for step in run["steps"]]
        found[ROWS[name].world] = min([*probes, found.get(ROWS[name].world, math.inf)])
    return found


def summarize(
    name: str,
    runs: Sequence[dict[str, Any]],
    reference: Sequence[float],
    sizes: Sizes,
    parameters: int,
    limits: Limits,
) -> dict[str, Any]:
    """A row of the result, from all its runs. ``disturbed``: every step was, and all are counted."""
    row = ROWS[name]
    steps = [step for run in runs for step in run["steps"]]
    quiet = [step for step in steps if limits.quiet(step, row.world)]
    kept = quiet or steps
    report = runs[-1]["report"]
    m = sizes.microbatches(row.dp)
    off = [abs(a - b) for run in runs for a, b in zip(run["losses"], reference, strict=False)]
    return {
        "name": name,
        "ranks": row.world,
        "microbatches": m,
        "seconds": _median(s["seconds"] for s in kept),
        "fastest_seconds": min(s["seconds"] for s in kept),
        "steps_kept": len(quiet),
        "steps": len(steps),
        "disturbed": not quiet,
        "foreign_cpu_seconds": _median(s["foreign_cpu_seconds"] for s in steps),
        "own_cpu_seconds": _median(s["own_cpu_seconds"] for s in kept),
        "page_faults": _median(s["page_faults"] for s in steps),
        "peak_rss_bytes": max(max(run["peak_rss_bytes"]) for run in runs),
        "setup_peak_rss_bytes": max(max(run["setup_peak_rss_bytes"]) for run in runs),
        "ready_seconds": _median(run["ready_seconds"] for run in runs),
        "sent_bytes": report.get("sent_bytes"),
        "loopback_bytes": _median(s["loopback_bytes"] for s in kept) / row.world,
        "minimum_bytes": row.minimum_bytes(sizes, parameters),
        "gathers_per_microbatch": report.get("gathers_per_microbatch", row.gathers(m) / m),
        "loss": runs[-1]["losses"][-1],
        "loss_difference": max(off, default=None),
        "report": report,
        "all_steps": steps,
    }


def compare(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Ratios of a row to the faster of its peers, by the steps of one turn and by the fastest of each, which others on
    the machine disturb least; None if either has not run."""
    by_name = {row["name"]: row for row in rows}
    ran = [by_name[name] for name in comparison.peers if name in by_name]
    if comparison.row not in by_name or not ran:
        return None
    row, peer = by_name[comparison.row], min(ran, key=lambda r: r["seconds"])
    turns = zip(row["all_steps"], peer["all_steps"], strict=False)
    return {
        "row": comparison.row,
        "peer": peer["name"],
        "ratio": _median(ours["seconds"] / theirs["seconds"] for ours, theirs in turns),
        "fastest_ratio": row["fastest_seconds"] / min(r["fastest_seconds"] for r in ran),
        "reach": comparison.reach,
        "memory_ratio": row["peak_rss_bytes"] / peer["peak_rss_bytes"],
        "all_peers": {r["name"]: row["seconds"] / r["seconds"] for r in ran},
    }


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {
        "processor": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
